"""What comes from outside, checked: YAML within bounds, blocks of typed keys, JSON files. Imports no torch.

A user's mistake becomes a `BadInput` that names the block and the key, with the nearest name that would be right.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from .errors import BadInput, nearest

LONGEST = 2**18  # characters
DEEPEST = 40  # collections within each other
MOST = 20_000  # values, those behind aliases counted as often as they are named

# --- YAML ------------------------------------------------------------------------------------------------------------

# PyYAML follows YAML 1.1: it reads 1e-4 as text, and a bare yes, on, no or off as a boolean. These follow YAML 1.2.
_FLOAT = "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
_BOOL = "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
_WORDS = {"yes": True, "on": True, "no": False, "off": False}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != _BOOL[0]]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that either version of YAML would read as something else."""


_Loader.add_implicit_resolver(*_BOOL)
_Loader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)


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
    except BadInput:
        raise
    except Exception as error:  # a number of thousands of digits, a date that does not exist, a tag without a value
        raise BadInput(asked, f"a value cannot be read ({error})", "Write it as YAML") from None


def write_yaml(tree: Any) -> str:
    """`tree` as YAML, which `read_yaml` reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def booleans(value: Any) -> Any:
    """`value` with yes, on, no and off read as booleans: for places whose types nobody declares."""
    if isinstance(value, dict):
        return {key: booleans(item) for key, item in value.items()}
    return _WORDS.get(value.lower(), value) if isinstance(value, str) else value


def _measure(text: str, asked: str) -> None:
    """BadInput for YAML that is nested too deep or holds too many values, before any of it is built."""
    sizes: dict[str | None, int] = {}  # of what has an anchor
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
            line = event.start_mark.line + 1  # type: ignore[union-attr]
            have = f"line {line}: it is nested more than {DEEPEST} deep" if len(open_) > DEEPEST else \
                f"line {line}: it holds more than {MOST:,} values, aliases counted"  # fmt: skip
            raise BadInput(asked, have, "Write a recipe of fewer keys")


def require_text_keys(tree: Any, where: str) -> None:
    """BadInput for a key that is not text, at any depth: YAML reads 1 and 1e5 as numbers."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if isinstance(tree, dict) and not isinstance(key, str):
            raise BadInput(f"{where}: {key!r}", "a key is text", f'Write "{key}" in quotes, or check the indentation')
        require_text_keys(value, f"{where}: {key}" if isinstance(tree, dict) else where)


# --- blocks of keys --------------------------------------------------------------------------------------------------


def _nameable(name: str) -> str:
    if "\0" in name or len(name) >= 4096 or any(len(part.encode()) >= 256 for part in name.split("/")):
        raise PydanticCustomError("name", "no file can have such a name")
    return name


# The name of a file, a folder or something on the hub; file systems raise errors of their own for others.
FileName = Annotated[
    str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value), AfterValidator(_nameable)
]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Block:
    """Base of the blocks of a recipe: dataclasses whose fields are checked, and of which unknown keys are refused.

    `short`: the key that is meant where a bare value stands for the block.
    """

    short: ClassVar[str] = ""

    @classmethod
    def key(cls) -> str:
        """The recipe's key for the block, which messages name."""
        return cls.__name__.removesuffix("Spec").lower()

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, values: Any, handler: Any) -> Any:
        if values is None:
            values = {}
        elif cls.short and isinstance(values, str | list | Path):
            values = {cls.short: values}
        try:
            return handler(values)
        except ValidationError as error:
            raise _bad_input(error, cls, cls.key()) from None


def build(cls: type, values: Any, where: str) -> Any:
    """`cls(**values)` for a dataclass `cls`, with every key and type checked. `where` is named in messages."""
    try:
        return TypeAdapter(cls).validate_python({} if values is None else values, extra="forbid")
    except ValidationError as error:
        raise _bad_input(error, cls, where) from None


def read_json(path: Path, kind: Any = dict[str, Any]) -> Any:
    """The JSON in a file as a value of the type `kind`; None where it cannot be read or is something else."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True, extra="forbid")
    except (OSError, ValidationError):
        return None


def _bad_input(error: ValidationError, cls: type, where: str) -> BadInput:
    """The most telling of pydantic's errors as one of ours."""
    found = error.errors()
    first = next((e for e in found if e["type"] in ("unexpected_keyword_argument", "literal_error")), found[0])
    kind, value, loc = first["type"], first["input"], first["loc"]
    if kind == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(cls)]
        return BadInput(f'{where}: "{loc[0]}"', "there is no such key", nearest(str(loc[0]), known))
    asked = ": ".join([where, *map(str, loc[:1]), repr(value)])
    if kind == "literal_error":
        known = re.findall("'(.*?)'", first["msg"]) or re.findall(r"-?\d+", first["msg"])
        return BadInput(asked, "there is no such choice", nearest(str(value), known))
    if kind in _WANTED:
        return BadInput(asked, f"{_WANTED[kind]} is wanted there", "Check the indentation")
    return BadInput(asked, first["msg"].lower(), "Give a value of that kind")


_WANTED = {"dict_type": "a block of keys", "dataclass_type": "a block of keys", "list_type": "a list"}
