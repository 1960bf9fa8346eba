"""YAML from others, within bounds: what is too large, too deep or grows by aliases is refused before it is built."""

from __future__ import annotations

from typing import Any

import yaml

from .errors import BadInput

LONGEST = 2**18  # characters
DEEPEST = 40  # collections within each other
MOST = 20_000  # values, those behind aliases counted as often as they are named
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(text: str, asked: str) -> Any:
    """What `text` holds. BadInput, with the line where there is one, for what is no YAML or beyond the bounds."""
    if len(text) > LONGEST:
        raise BadInput(asked, f"it has {len(text):,} characters, where {LONGEST:,} are taken", "Keep data in files")
    try:
        _measure(text, asked)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise BadInput(asked, f"{where}{getattr(error, 'problem', error)}", "Write it as YAML") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a date that there is not
        raise BadInput(asked, f"a value cannot be read ({error})", "Write it as YAML") from None


def _measure(text: str, asked: str) -> None:
    sizes: dict[str, int] = {}  # of what has an anchor
    open_: list[list[Any]] = [["", 0]]  # anchor, values so far
    for event in yaml.parse(text, Loader=_Loader):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append([event.anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
            sizes[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor], size = 1, 1
        open_[-1][1] += size
        if len(open_) > DEEPEST or open_[-1][1] > MOST:
            line = event.start_mark.line + 1
            have = f"line {line}: it is nested more than {DEEPEST} deep" if len(open_) > DEEPEST else \
                f"line {line}: it holds more than {MOST:,} values, aliases counted"  # fmt: skip
            raise BadInput(asked, have, "Write a recipe of fewer keys")
