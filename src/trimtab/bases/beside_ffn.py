"""Patches that put a network beside each feed-forward network: it reads what the FFN reads, and adds to its output."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Patch, Place, Surgery
from ..errors import BadInput
from ..model import anatomy
from ..model.freeze import freeze_base
from ..model.surgery import Swaps


class BesideSurgery(Surgery):
    """`adapters`: path of an FFN -> the module beside it."""

    def __init__(self, patch: BesideFFN, model: PreTrainedModel):
        self.patch = patch
        self.swaps = Swaps(model)
        self.adapters: dict[str, Any] = {}

    def revert(self) -> None:
        self.swaps.undo()

    def own_tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": p for name, adapter in self.adapters.items() for key, p in adapter.named_parameters()}


@dataclass(frozen=True)
class BesideFFN(Patch):
    """A method writes `beside`, and the module: forward(h, y) returns y, the FFN's output, with something added."""

    attribute: ClassVar[str]  # under which the module is set on the block or the FFN

    @abstractmethod
    def beside(self, ffns: Sequence[anatomy.Ffn], surgery: Any, place: Place) -> Iterator[nn.Module]:
        """Yield the module for each of `ffns`, in order."""

    def surgery(self, model: PreTrainedModel) -> Any:
        return BesideSurgery(self, model)

    def apply(self, model: PreTrainedModel, place: Place) -> Any:
        surgery, ffns = self.surgery(model), anatomy.ffns(model)
        if any(hasattr(ffn.host, self.attribute) for ffn in ffns):
            asked = f"apply a second {self.attribute.removeprefix('trimtab_')}"
            raise BadInput(asked, "the model has one already", "Give that one a larger r")
        freeze_base(model, surgery.swaps)
        try:
            for ffn, adapter in zip(ffns, self.beside(ffns, surgery, place), strict=True):
                surgery.swaps.set_attribute(ffn.host, self.attribute, adapter)
                surgery.swaps.hook(ffn.beside(adapter))
                surgery.adapters[ffn.name] = adapter
        except BaseException:
            surgery.revert()
            raise
        return surgery
