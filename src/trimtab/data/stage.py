"""One item of `stages:` in a recipe. Plain data: importing it loads neither torch nor datasets."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from ..validation import Block, FileName


def _folder_name(name: str) -> str:
    if not name or "/" in name or name in (".", ".."):
        raise PydanticCustomError("name", "a stage's name is the name of a folder")
    return name


def _keys(value: Any) -> Any:
    return {"train": value} if isinstance(value, str | list) else value or {}


Name = Annotated[FileName, AfterValidator(_folder_name)]
Keys = Annotated[dict[str, Any], BeforeValidator(_keys)]


@dataclass(frozen=True)
class RehearsalSpec(Block):
    """Rows of earlier stages that later ones are trained on again.

    `budget`: bytes of the kept rows, as token ids (`4MiB`). `policy`: `reservoir` keeps each row with the same chance,
    `ring` as many bytes of each stage, its newest rows. `mix`: their share of the rows of a step.
    """

    budget: str | int
    policy: Literal["reservoir", "ring"] = "reservoir"
    mix: Annotated[float, Field(gt=0, lt=1)] = 0.25


@dataclass(frozen=True)
class StageSpec(Block):
    """One stage of training: its rows, its training fields, and what it takes over from the stage before.

    `data` and `training` have the keys of the recipe's own blocks, which count where a stage leaves a key out. `carry`:
    `adapter` starts from the adapter of the stage before, with a new optimizer and a new schedule; `full` takes over
    the optimizer's state too; `fresh` starts with a new adapter. The first stage starts fresh. `adapter`: a folder to
    start from, instead of the stage before.
    """

    name: Name
    data: Keys = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    carry: Literal["adapter", "full", "fresh"] = "adapter"
    adapter: FileName | None = None
