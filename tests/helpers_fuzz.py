"""Input as nobody would write it: JSON values, valid files with parts exchanged, and what a reader may do with them."""

from __future__ import annotations

import contextlib
import copy
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from trimtab.errors import TrimtabError

SECONDS = 5.0  # of computing that one input may take
LONGEST = 2000  # characters of a message

ODD_NUMBERS = [0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), True]
ODD_TEXTS = ["", " ", "\0", "\ud800", "x" * 5000, "../..", "/", ".", "~", "~nobody/x", "-", "null", "1e5", "é\u202e",
             "{}", "[", "{{", "%", "\n", "a\nb", "9" * 400, "/dev/null", "a/b/c.jsonl"]  # fmt: skip


def values(words: list[str]) -> st.SearchStrategy[Any]:
    """Values of JSON; texts and keys are `words`, odd ones, or any."""
    texts = st.sampled_from(words) | st.sampled_from(ODD_TEXTS) | st.text(max_size=8)
    plain = st.none() | st.booleans() | st.sampled_from(ODD_NUMBERS) | st.integers(-9, 99) | texts
    nested = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)  # noqa: E731
    return st.recursive(plain, nested, max_leaves=6)


def places(tree: Any) -> list[tuple]:
    """The paths of all parts of a tree, the whole first."""
    found: list[tuple] = [()]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return found + [(key, *path) for key, value in items for path in places(value)]


def words_in(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        return [word for key, value in tree.items() for word in (str(key), *words_in(value))]
    if isinstance(tree, list):
        return [word for value in tree for word in words_in(value)]
    return [tree] if isinstance(tree, str) else []


@st.composite
def changed(draw: Any, tree: Any, words: tuple[str, ...] = (), most: int = 3, whole: bool = True) -> Any:
    """`tree` with one to `most` parts replaced, removed, renamed or added. `whole`: all of it may be replaced."""
    tree = copy.deepcopy(tree)
    known = sorted({*words_in(tree), *words, "a"})
    some = values(known)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(places(tree)))
        if not path:
            if whole and draw(st.integers(0, 9)) == 0:
                tree = draw(some)
            elif isinstance(tree, dict):
                tree[draw(st.sampled_from(known))] = draw(some)
            continue
        node = tree
        for key in path[:-1]:
            node = node[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "wrap"]))
        if how == "replace":
            node[path[-1]] = draw(some)
        elif how == "wrap":
            node[path[-1]] = draw(st.sampled_from([[node[path[-1]]], {"a": node[path[-1]]}, str(node[path[-1]])]))
        elif isinstance(node, list):
            del node[path[-1]]
        else:
            value = node.pop(path[-1])
            if how == "rename":
                node[draw(st.sampled_from(known))] = value
    return tree


@st.composite
def damaged(draw: Any, content: bytes, tokens: tuple[bytes, ...] = ()) -> bytes:
    """`content` with one to four pieces cut out, doubled, overwritten or put in."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        much = draw(st.sampled_from([0, 1, 4, 30, len(content)]))
        pieces = st.binary(max_size=6) | st.sampled_from(tokens or (b"\0", b"\xff", b"\n"))
        new = draw(st.just(b"") | pieces | st.just(content[at : at + much] * 2))
        content = content[:at] + new + content[at + much :]
    return content


@contextlib.contextmanager
def in_time(seconds: float = SECONDS) -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"it took more than {seconds} seconds")

    had = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, had)


def read(reader: Callable[[Any], Any], value: Any) -> None:
    """`reader` returns, or raises one of trimtab's errors with a short message, in time."""
    with in_time():
        try:
            reader(value)
        except TrimtabError as error:
            assert len(str(error)) < LONGEST, str(error)
            assert error.exit_code in (2, 3), error


def fuzz(reader: Callable[[Any], Any], strategy: st.SearchStrategy[Any], count: int, examples: list[Any],
         seconds: float = 0) -> None:  # fmt: skip
    """Give `reader` its `examples` and `count` values more, the same ones each time; or new ones for `seconds`."""
    until, done = time.monotonic() + seconds, 0

    def body(value: Any) -> None:
        nonlocal done
        done += 1
        read(reader, value)

    for one in examples:
        body = example(one)(body)
    phases = [Phase.explicit, Phase.generate, *([] if seconds else [Phase.shrink])]
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    how = settings(max_examples=count, deadline=None, derandomize=not seconds, database=None, phases=phases,
                   report_multiple_bugs=False, suppress_health_check=quiet)  # fmt: skip
    while True:
        how(given(strategy)(body))()
        if time.monotonic() >= until:
            break
    print(f"{done:,} inputs")
