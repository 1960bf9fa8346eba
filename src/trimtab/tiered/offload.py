"""Trained parameters in the slow tier: their values, gradients and Adam's moments in one mapped file.

Each parameter gets a part of the file as its data. The moments of an optimizer are set to parts of the file before its
first step, and a gradient is moved there when the backward pass has completed it. The rest is left to the libraries:
autograd adds later micro-batches in place, clipping scales in place, and PyTorch's optimizer steps in place. So all
values are those of training in memory, bit for bit. Of the fast tier only the gradients that the backward pass is
working on are needed: the file's pages are the kernel's to write back and to drop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..memory.place import Place
from .mapped_file import mapped_like, slow_kind

VALUE, GRADIENT, MOMENTS = "value", "gradient", ("exp_avg", "exp_avg_sq")


class Offloaded:
    """`parameters`: path -> parameter whose data is replaced. `dtypes`: path -> the dtype of the new data, gradient and
    moments."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtypes: Mapping[str, torch.dtype], place: Place):
        if place.device.type != "cpu":
            have = "the optimizer steps where the parameters are, and the slow tier of a GPU is another memory"
            raise BadInput(f"offload: slow on {place.device}", have, "Set place: cpu, or train an adapter (lora, paca)")
        if slow_kind(place.slow, place.device) != "disk":
            have = "on a CPU the fast tier is RAM, so that nothing would be saved"
            raise BadInput("offload: slow with place: slow: ram", have, "Set place: slow: disk")
        self.parameters = dict(parameters)
        self.tensors: dict[str, dict[str, Tensor]] = {}  # of a plan, whose parameters have no values: empty
        if any(parameter.is_meta for parameter in parameters.values()):
            for name, parameter in parameters.items():
                parameter.data = parameter.data.to(dtypes[name], copy=True)
            return
        like = {
            (name, part): torch.empty(parameter.shape, dtype=dtypes[name], device="meta")
            for name, parameter in parameters.items() for part in (VALUE, GRADIENT, *MOMENTS)
        }  # fmt: skip
        made = mapped_like(like, place.folder, "weights, gradients and Adam's moments")
        for name, parameter in parameters.items():
            parameter.data = made[name, VALUE].copy_(parameter.data)
            self.tensors[name] = {part: made[name, part] for part in (GRADIENT, *MOMENTS)}

    def keep_gradients(self) -> list[Any]:
        """Moves each gradient to the file as soon as it is complete; -> the handles of the hooks."""
        handles = []
        for name, parts in self.tensors.items():
            handles.append(self.parameters[name].register_post_accumulate_grad_hook(_Move(parts[GRADIENT])))
        return handles

    def hold(self, optimizer: Any) -> None:
        """Puts the moments of `optimizer`, one of PyTorch's AdamW or transformers' wrapper of it, into the file: those
        that it has, or zeros. Also called after a state was loaded."""
        for name, parts in self.tensors.items():
            state = optimizer.state[self.parameters[name]]
            state.setdefault("step", torch.tensor(0.0))
            for moment in MOMENTS:
                if moment in state and state[moment] is not parts[moment]:
                    parts[moment].copy_(state[moment])
                state[moment] = parts[moment]

    def outside(self) -> list[Tensor]:
        """Everything in the file, for a count of bytes."""
        values = [self.parameters[name].data for name in self.tensors]
        return [*values, *(tensor for parts in self.tensors.values() for tensor in parts.values())]


class _Move:
    def __init__(self, gradient: Tensor):
        self.gradient = gradient

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.data_ptr() != self.gradient.data_ptr():
            self.gradient.copy_(parameter.grad)
            parameter.grad = self.gradient
