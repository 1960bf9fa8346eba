"""Work in a process of its own."""

from __future__ import annotations

import os

import pytest

from trimtab.process.call import apart


def tell(*words: str) -> list[object]:
    print("a line of its own")
    return [os.getpid(), os.environ.get("TREE"), *words]


def fail(why: str) -> None:
    raise ValueError(why)


def die(code: str) -> None:
    os._exit(int(code))


def test_it_runs_elsewhere_and_what_it_gives_comes_back():
    process, tree, *words = apart(tell, "a lake", "two", TREE="oak")
    assert process != os.getpid() and (tree, words) == ("oak", ["a lake", "two"])
    assert "TREE" not in os.environ


@pytest.mark.parametrize(("work", "told", "said"), [(fail, "no lake", "ValueError: no lake"), (die, "7", "code 7")])
def test_what_fails_there_is_said_here(work, told, said):
    with pytest.raises(RuntimeError, match=said):
        apart(work, told)
