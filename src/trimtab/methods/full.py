"""Full fine-tuning: every weight is trained. It is the baseline of all other methods, and the most expensive one.

A copy is trained, and the original tensors are kept for reverting. If the base is mapped from its file (the usual case
on a CPU) the originals cost no fast memory; otherwise they cost as much as the base.

By default the copy is fp32. bf16 has 8 significant bits: a step smaller than 1/512 of a weight is rounded away, as are
most of AdamW's steps at a learning rate of 1e-5. `dtype: bf16` halves weights, gradients and Adam's state at that
price. The engine multiplies fp32 copies of a bf16 base under bf16 autocast, so that the products stay fast; an fp32
base is multiplied in fp32 unless `training: {bf16: true}`.

`offload: slow` keeps the copy, its gradients and Adam's moments in a mapped file, 16 bytes a parameter in fp32, as
optimizers are offloaded elsewhere to a CPU's memory. Each operation is that of training in memory, so that the result
is the same bit for bit.

`train` restricts training to the parameters whose path the regex matches ("norm"). If these have a wider dtype than the
frozen rest, their modules compute in fp32 and return the dtype that the base would return.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Patch, Place, Portable, Surgery
from ..cost.trace import OFFLOADED
from ..errors import BadInput
from ..model.surgery import Swaps, require_unpatched
from ..tiered.offload import Offloaded

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "keep": None}


@dataclass(frozen=True)
class Full(Patch):
    """All weights, or those that `train` names, are trained in place."""

    trains_base: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Any]] = {"learning_rate": 2e-5}
    exclusive_reason: ClassVar[str] = "full fine-tuning changes the base weights, which every other patch needs frozen"

    variants: ClassVar[tuple[dict[str, Any], ...]] = ({"offload": "slow"},)

    dtype: Literal["fp32", "bf16", "keep"] = "fp32"  # of the weights while they are trained; bf16 loses small updates
    train: str = "all"  # "all", or a regex on parameter paths
    offload: Literal["none", "slow"] = "none"  # slow: weights, gradients and Adam's moments in a mapped file

    @property
    def uses_tables(self) -> bool:  # type: ignore[override]
        return self.offload == "slow"

    @property
    def shards(self) -> bool:  # type: ignore[override]
        return self.offload == "none" and self.train == "all"

    @property
    def gradient_reason(self) -> str:  # type: ignore[override]
        return "offload: slow keeps gradients and moments, of which it has none" if self.offload == "slow" else ""

    @property
    def autocast(self) -> bool:
        """fp32 copies of a 16-bit base are multiplied in the base's own precision."""
        return self.dtype == "fp32"

    def apply(self, model: PreTrainedModel, place: Place) -> FullSurgery:
        if self.dtype not in DTYPES:
            raise BadInput(f'full: dtype: "{self.dtype}"', "there is no such dtype", f"Use one of {', '.join(DTYPES)}")
        chosen = self._chosen(model)
        surgery = FullSurgery(self, model)
        require_unpatched(model, surgery.swaps, self.exclusive_reason)
        for parameter in model.parameters():
            surgery.swaps.set_requires_grad(parameter, False)
        dtypes = {name: DTYPES[self.dtype] or parameter.dtype for name, parameter in chosen.items()}
        surgery.train(chosen, dtypes, place if self.offload == "slow" else None)
        surgery.bridge()
        return surgery

    def _chosen(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Path -> parameter of those to train; a tied one once, under its first path."""
        try:
            wanted = {n for n, _ in model.named_parameters() if self.train == "all" or re.search(self.train, n)}
        except re.error as error:
            raise BadInput(f'full: train: "{self.train}"', f"it is not a regex ({error})", 'Use "all"') from None
        chosen = {name: p for name, p in model.named_parameters() if name in wanted}
        if not chosen:
            raise BadInput(f'full: train: "{self.train}"', "it matches no parameter's path", 'Use "all", or "norm"')
        if quantised := [name for name, p in chosen.items() if not p.is_floating_point()]:
            raise BadInput(
                f"full fine-tuning of {len(quantised)} quantised weights",
                f"{quantised[0]} is stored in {chosen[quantised[0]].dtype}, which cannot take small steps",
                "Load the base in bf16, or train an adapter (lora, paca) on it",
            )
        return chosen


class FullSurgery(Surgery):
    def __init__(self, patch: Full, model: PreTrainedModel):
        self.patch, self.model = patch, model
        self.swaps = Swaps(model)
        self.trained: dict[str, nn.Parameter] = {}
        self.originals: dict[str, Tensor] = {}

    def train(self, chosen: dict[str, nn.Parameter], dtypes: dict[str, torch.dtype], slow: Place | None) -> None:
        """Give the parameters copies of their values, in the slow tier of `slow` unless that is None. The objects stay
        the same, so they stay tied."""
        self.trained, self.originals = chosen, {name: parameter.data for name, parameter in chosen.items()}
        for name, parameter in chosen.items():
            self.swaps.on_undo(functools.partial(_put_back, parameter, parameter.data))
            self.swaps.set_requires_grad(parameter, True)
            if slow is None:
                parameter.data = parameter.data.to(dtypes[name], copy=True)
        if slow is not None:
            self.offloaded = Offloaded(chosen, dtypes, slow)
            for handle in self.offloaded.keep_gradients():
                self.swaps.hook(handle)

    def bridge(self) -> None:
        """Add casts around each module whose trained weights have another dtype than the frozen rest of the model."""
        trained = {id(parameter): self.originals[name].dtype for name, parameter in self.trained.items()}
        rest = {p.dtype for p in self.model.parameters() if id(p) not in trained and p.is_floating_point()}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                before = trained.get(id(parameter), parameter.dtype)
                if rest and before != parameter.dtype:
                    self.swaps.hook(module.register_forward_pre_hook(_Cast(parameter.dtype).inputs))
                    self.swaps.hook(module.register_forward_hook(_Cast(before).output))
                    break

    def revert(self) -> None:
        self.swaps.undo()

    def merge(self) -> None:
        """Keep the trained values, in the base's own dtype; everything else is reverted."""
        values = {name: p.data.to(self.originals[name].dtype) for name, p in self.trained.items()}
        self.swaps.undo()
        for name, parameter in self.trained.items():
            parameter.data = values[name]

    def outside(self) -> dict[str, list[Tensor]]:
        return {} if self.offloaded is None else {OFFLOADED: self.offloaded.outside()}

    def own_tensors(self) -> dict[str, Tensor]:
        return dict(self.trained)

    def portable(self) -> Portable:
        raise BadInput("export full to peft", "it has no adapter: it trained the model's weights", "Use --to merged")


class _Cast:
    """Hooks that cast the floating-point inputs, or outputs, of a module."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def _to(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def inputs(self, module: nn.Module, args: tuple) -> tuple:
        return tuple(self._to(value) for value in args)

    def output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return tuple(self._to(value) for value in output) if isinstance(output, tuple) else self._to(output)


def _put_back(parameter: nn.Parameter, original: Tensor) -> None:
    parameter.grad = None
    parameter.data = original
