"""`trimtab schema`: the JSON schema of a recipe, with which editors complete keys and mark mistakes.

It is derived from the dataclasses that check a recipe, so it knows what they know. What only a method itself can check
(a rank above a weight's width, two fields that exclude each other) is found when the recipe is planned.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUndefinedAnnotation

from . import methods
from .quiet import silence_libraries
from .recipe import RENAMED, TRAINING_DEFAULTS, Recipe
from .validation import Block

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FAILURES = (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema, PydanticUndefinedAnnotation, NameError)


@silence_libraries()
def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe file."""
    made = _titles_dropped(TypeAdapter(Recipe).json_schema(ref_template="#/$defs/{model}"))
    blocks = {cls.__name__: cls for cls in _subclasses(Block)}
    for name, of in made["$defs"].items():
        if (cls := blocks.get(name)) is not None:
            _say(of, cls)
            if cls.short:  # a bare value stands for the block
                made["$defs"][name] = {"anyOf": [of["properties"][cls.short], of]}
    keys = made["properties"]
    keys["patches"]["items"] = _named("patch")
    for kind in ("objective", "stepper"):
        keys[kind] = {**_named(kind), "default": keys[kind]["default"]}
    keys["training"] = training = _training()
    made["$defs"].get("StageSpec", {}).get("properties", {})["training"] = training
    sizes = {"anyOf": [{"type": "string"}, {"type": "number"}], "description": "2GiB, 80% or -2GiB"}
    keys["budget"] = {"type": ["object", "null"], "properties": {"fast": sizes, "slow": sizes}, "default": None}
    return {"$schema": DIALECT, "title": "A recipe of trimtab", **made}


def comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass in its source, those of its bases included."""
    sources = [inspect.getsource(c) for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", "\n".join(sources), re.MULTILINE))


def _subclasses(cls: type) -> list[type]:
    return [each for direct in cls.__subclasses__() for each in (direct, *_subclasses(direct))]


def _say(of: dict[str, Any], cls: type) -> None:
    """Add the fields' comments as descriptions."""
    for name, text in comments(cls).items():
        if name in of.get("properties", {}):
            of["properties"][name]["description"] = text


def _titles_dropped(tree: Any, named: bool = False) -> Any:
    """Without pydantic's titles, which repeat the keys. `named`: the keys of `tree` are names, not keywords."""
    if isinstance(tree, dict):
        return {
            key: _titles_dropped(value, not named and key in ("properties", "$defs"))
            for key, value in tree.items() if named or key != "title"
        }  # fmt: skip
    return [_titles_dropped(item) for item in tree] if isinstance(tree, list) else tree


def _named(kind: str) -> dict[str, Any]:
    """A method of one kind: its name, or {name: its fields}."""
    entries: dict[str, Any] = {}
    for name in methods.names(kind):
        cls = methods.find(name, kind)
        of = _titles_dropped(TypeAdapter(cls).json_schema()) if dataclasses.is_dataclass(cls) else {"type": "object"}
        of["additionalProperties"] = False
        of["description"] = methods.TABLE[name].summary
        _say(of, cls)
        entries[name] = {"anyOf": [of, {"type": "null"}], "description": of["description"]}
    block = {"type": "object", "properties": entries, "additionalProperties": False, "minProperties": 1}
    block["maxProperties"] = 1
    return {"anyOf": [{"enum": list(entries)}, block]}


def _training() -> dict[str, Any]:
    """The fields of the trainers' dataclasses, but for those that are refused."""
    from .engine.fields import HONOURED
    from .engine.objectives import arguments_class

    fields: dict[str, Any] = {}
    for name in methods.names("objective"):
        cls = arguments_class(methods.find(name, "objective")())
        for field in dataclasses.fields(cls):
            if field.name in HONOURED and field.name not in fields:
                fields[field.name] = {**_typed(cls, field.name), **_helped(field)}
    fields |= {old: fields[new] for old, new in RENAMED.items() if new in fields}
    for name, value in TRAINING_DEFAULTS.items():
        fields[name]["default"] = value
    fields["max_minutes"] = {"type": "number", "exclusiveMinimum": 0,
                             "description": "stop before this many minutes have passed, with a checkpoint"}  # fmt: skip
    return {"type": "object", "properties": fields, "additionalProperties": False}


def _typed(cls: type, name: str) -> dict[str, Any]:
    """The schema of a library's field; empty where its type has none."""
    try:
        made = _titles_dropped(TypeAdapter(typing.get_type_hints(cls)[name]).json_schema())
    except FAILURES:
        return {}
    return _inlined(made, made.pop("$defs", {}))


def _inlined(tree: Any, found: dict[str, Any]) -> Any:
    """`tree` with the definitions in place of the references to them."""
    if isinstance(tree, dict):
        if "$ref" in tree:
            return {k: v for k, v in found[tree["$ref"].rpartition("/")[2]].items() if k != "description"}
        return {key: _inlined(value, found) for key, value in tree.items()}
    return [_inlined(item, found) for item in tree] if isinstance(tree, list) else tree


def _helped(field: Any) -> dict[str, Any]:
    text = " ".join(str(field.metadata.get("help", "")).split())
    return {"description": text} if text else {}
