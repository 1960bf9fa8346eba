"""Base of patches that wrap each targeted linear in a module. A method defines `wrap` and the module."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Patch, Place, Surgery
from ..model import anatomy, quant
from ..model.freeze import freeze_base
from ..model.surgery import Swaps, on_a_copy


class LinearSurgery(Surgery):
    """Wrapped linears. A wrapper has the frozen linear as `base`, and its own parameters."""

    merges_apart = True

    def __init__(self, patch: LinearPatch, model: PreTrainedModel):
        self.patch, self.model = patch, model
        self.swaps = Swaps(model)
        self.layers: dict[str, Any] = {}  # path -> wrapper

    def own_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, layer in self.layers.items()
            for key, tensor in layer.state_dict(keep_vars=True).items()
            if not key.startswith("base.")
        }

    def revert(self) -> None:
        for layer in self.layers.values():
            if callable(detach := getattr(layer, "detach_base", None)):
                detach()
        self.swaps.undo()

    def merge(self) -> None:
        """Replaces each wrapper with the linear that its `merge_into_base()` returns."""
        merged = {name: layer.merge_into_base() for name, layer in self.layers.items()}
        self.swaps.undo()
        for name, linear in merged.items():
            if self.model.get_submodule(name) is not linear:
                self.swaps.replace(name, linear)

    def merged_weight(self, path: str) -> Tensor | None:
        """By `merge_into_base` on a copy of the base's weight; one in 4 or 8 bits it copies itself."""
        if (layer := self.layers.get(path)) is None:
            return None
        if callable(detach := getattr(layer, "detach_base", None)):
            detach()
        if quant.is_quantised(layer.base):
            return layer.merge_into_base().weight.data
        with on_a_copy(layer.base):
            return anatomy.dense_view(layer.merge_into_base()).data


@dataclass(frozen=True)
class LinearPatch(Patch):
    """Wraps each targeted linear in the module that `wrap` returns."""

    targets: str = "all-linear"  # "all-linear", a comma list of name endings ("q_proj,v_proj"), or a regex on the path

    @abstractmethod
    def wrap(self, linear: nn.Module, name: str) -> nn.Module: ...

    def surgery(self, model: PreTrainedModel) -> LinearSurgery:
        return LinearSurgery(self, model)

    def apply(self, model: PreTrainedModel, place: Place) -> LinearSurgery:
        surgery = self.surgery(model)
        targets = anatomy.target_linears(model, self.targets)
        freeze_base(model, surgery.swaps)
        try:
            for name, linear in targets.items():
                layer = self.wrap(linear, name)
                surgery.swaps.replace(name, layer)
                surgery.layers[name] = layer
        except BaseException:  # a refusal leaves the model as it was
            surgery.revert()
            raise
        return surgery
