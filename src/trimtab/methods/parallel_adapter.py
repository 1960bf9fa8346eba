"""Parallel Adapter. Towards a Unified View of Parameter-Efficient Transfer Learning (He et al., arXiv 2110.04366).

A second, wide, two-layer ReLU network runs in parallel to each frozen FFN and reads the same input. Column i of W_A is
a *key*, row i of W_B its *value*: a pair that fires adds its value to the FFN's output. MEFT (2406.04984) keeps most of
these pairs in slow memory; this is its dense baseline.

    FFN'(h) = FFN(h) + s * ReLU(h W_A) W_B        (table 1, "Scaled PA"; s is the paper's scale)

    h: what the FFN reads   W_A: `keys`, transposed   W_B: `values`   s: `scale`   bottleneck: `r`

What differs from the paper, and why:
- Both matrices are stored as (r, hidden), one pair per row, as in MEFT's tables.
- There are no bias terms, keys ~ N(0, 0.02^2) and values 0, as in MEFT: the adapter starts as a no-op.
- s is 1 by default (as in MEFT); the paper uses 4. r = 512 is the paper's wide setting.
- In BERT-type blocks the adapter's output is added to the residual, so the FFN's dropout does not act on it.

Only h and the ReLU's output are saved for the backward pass: the mask is where that output is zero. Products are
computed in the model's precision (or autocast's); the weights and their gradients are fp32.
"""

# Shape letters: ... any leading dimensions, T their product (tokens), D hidden size, R pairs.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ..bases.beside_ffn import BesideFFN, BesideSurgery
from ..contracts import ModulePatch, Place
from ..errors import BadInput
from ..model import anatomy


@dataclass(frozen=True)
class ParallelAdapter(BesideFFN):
    """A dense ReLU network of `r` key-value pairs beside each FFN."""

    paper: ClassVar[str] = "2110.04366"
    defaults: ClassVar[dict[str, Any]] = {"learning_rate": 5e-4, "warmup_steps": 0.02}
    shrinkable: ClassVar[tuple[str, ...]] = ("r",)
    attribute: ClassVar[str] = "trimtab_parallel_adapter"

    r: int = 512  # pairs per layer; the paper's "bottleneck dimension" (512 in table 6, FFN rows)
    scale: float = 1.0  # s, section 4.6 (4 there)
    seed: int = 0  # of the keys

    def apply(self, model: PreTrainedModel, place: Place) -> BesideSurgery:
        if self.r < 1:
            raise BadInput(f"parallel_adapter: r: {self.r}", "a layer needs at least one pair", "Set r to 512, say")
        if not 0 < abs(self.scale) < math.inf:
            raise BadInput(f"parallel_adapter: scale: {self.scale}", "it scales the adapter's output", "Set scale: 1")
        return super().apply(model, place)

    def beside(self, ffns: Sequence[anatomy.Ffn], surgery: BesideSurgery, place: Place) -> Iterator[Adapter]:
        random = torch.Generator().manual_seed(self.seed)
        for ffn in ffns:
            yield Adapter(ffn.width, self.r, self.scale, next(ffn.host.parameters()).device, random)


class Adapter(ModulePatch):
    """s * ReLU(h W_A) W_B, added to y. `keys` is W_A transposed and `values` is W_B, both (R, D) in fp32."""

    def __init__(self, width: int, r: int, scale: float, device: torch.device, random: torch.Generator):
        super().__init__()
        self.scale = scale
        keys_RD = torch.empty(r, width, dtype=torch.float32, device="meta" if device.type == "meta" else "cpu")
        self.keys = nn.Parameter(keys_RD.normal_(0, 0.02, generator=random).to(device))
        self.values = nn.Parameter(torch.zeros(r, width, dtype=torch.float32, device=device))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        kind = h.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else h.dtype
        out_TD = _Beside.apply(h, y, self.keys, self.values, self.scale, dtype)
        return out_TD.view(y.shape)  # outside the function, since some models (Falcon) write into it

    def extra_repr(self) -> str:
        return f"{self.keys.shape[1]} -> {self.keys.shape[0]} -> {self.keys.shape[1]}, scale={self.scale}"


class _Beside(torch.autograd.Function):
    """y + s * ReLU(h W_A) W_B, (T, D), its products in `dtype`; y and the result keep y's dtype."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor, keys_RD: Tensor, values_RD: Tensor, scale: float, dtype: torch.dtype):
        h_TD = h.reshape(-1, h.shape[-1]).to(dtype)  # under autocast `dtype` is its dtype, so it casts nothing here
        fired_TR = (h_TD @ keys_RD.to(dtype).T).relu_()
        y_TD = y.reshape(-1, y.shape[-1])
        if y.dtype == dtype:
            out_TD = torch.addmm(y_TD, fired_TR, values_RD.to(dtype), alpha=scale)
        else:
            out_TD = y_TD + (fired_TR @ values_RD.to(dtype)).mul_(scale)
        ctx.save_for_backward(h_TD, fired_TR, keys_RD, values_RD)
        ctx.scale, ctx.shape, ctx.h_dtype = scale, h.shape, h.dtype
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        h_TD, fired_TR, keys_RD, values_RD = ctx.saved_tensors
        needs_h, _, needs_keys, needs_values, _, _ = ctx.needs_input_grad
        dtype = h_TD.dtype
        grad_h = grad_keys_RD = grad_values_RD = None
        grad_TD = grad.reshape(-1, grad.shape[-1]).to(dtype)
        if needs_values:
            grad_values_RD = (fired_TR.T @ grad_TD).to(values_RD.dtype).mul_(ctx.scale)
        if needs_keys or needs_h:
            grad_TR = (grad_TD @ values_RD.to(dtype).T).mul_(fired_TR > 0).mul_(ctx.scale)
            if needs_keys:
                grad_keys_RD = (grad_TR.T @ h_TD).to(keys_RD.dtype)
            if needs_h:
                grad_h = (grad_TR @ keys_RD.to(dtype)).view(ctx.shape).to(ctx.h_dtype)
        return grad_h, grad.view(ctx.shape), grad_keys_RD, grad_values_RD, None, None
