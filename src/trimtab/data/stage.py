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
    `ring` as many bytes of each stage, its newest rows, `loss_diverse` as many of each, from easy to hard. `mix`: their
    share of the rows of a step. `keep`: `logits` also keeps the `top` most probable tokens after each token of the
    loss (8 if it is left out), which are then learned in place of the text.
    """

    budget: str | int
    policy: Literal["reservoir", "ring", "loss_diverse"] = "reservoir"
    mix: Annotated[float, Field(gt=0, lt=1)] = 0.25
    keep: Literal["text", "logits"] = "text"
    top: Annotated[int, Field(ge=1, le=64)] | None = None

    def __post_init__(self) -> None:
        if self.top is not None and self.keep == "text":
            raise PydanticCustomError("top", "keep: text keeps no probabilities: set keep: logits, or remove it")

    @property
    def kept_tops(self) -> int:
        """How many probabilities are kept per token of the loss; 0: text only."""
        return (self.top or 8) if self.keep == "logits" else 0


Positive = Annotated[float, Field(gt=0, lt=float("inf"))]


@dataclass(frozen=True)
class Ewc(Block):
    """`strength`: the factor of the penalty. `rows`: how many rows of a stage the Fisher information is measured on."""

    strength: Positive
    rows: Annotated[int, Field(ge=1)] = 64


@dataclass(frozen=True)
class L2(Block):
    """`strength`: the factor of the penalty."""

    strength: Positive


@dataclass(frozen=True)
class AnchorSpec(Block):
    """What holds trained weights near those after the stage before: `ewc: {strength: ...}` or `l2: {strength: ...}`."""

    ewc: Ewc | None = None
    l2: L2 | None = None

    @property
    def kind(self) -> str:
        return "ewc" if self.ewc else "l2"

    def __post_init__(self) -> None:
        if (self.ewc is None) == (self.l2 is None):
            raise PydanticCustomError("anchor", "it needs one of ewc and l2, as in anchor: {ewc: {strength: 1000}}")


@dataclass(frozen=True)
class StageSpec(Block):
    """One stage of training: its rows, its training fields, and what it takes over from the stage before.

    `data` and `training` have the keys of the recipe's own blocks, which count where a stage leaves a key out. `carry`:
    `adapter` starts from the adapter of the stage before, with a new optimizer and a new schedule; `full` takes over
    the optimizer's state too; `fresh` starts with a new adapter. The first stage starts fresh. `adapter`: a folder to
    start from, instead of the stage before. `anchor`: instead of the recipe's.
    """

    name: Name
    data: Keys = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    carry: Literal["adapter", "full", "fresh"] = "adapter"
    adapter: FileName | None = None
    anchor: AnchorSpec | None = None

    @property
    def follows(self) -> bool:
        """Whether it starts from the stage before, if there is one."""
        return self.carry != "fresh" and self.adapter is None
