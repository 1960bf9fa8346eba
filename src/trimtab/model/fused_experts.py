"""Frozen stacked experts (MoE) on a CPU in 16 bits, computed by matrix products of few distinct shapes.

oneDNN caches code for each number of rows of a product, and the number of tokens per expert differs in each step, so a
run's memory grows by tens of MiB per step (docs/LOG.md). Here an expert's rows are multiplied in pieces whose sizes are
powers of two. A rest of less than 64 rows is computed as part of the last 64 rows, so some rows are computed twice.
This needs about a dozen sizes and no padding.

Legend: N tokens, K experts of each, S = N K rows sorted by expert, E experts, I and O in and out of a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from .surgery import Swaps

EXPERTS = "trimtab_fused_experts"
LAST = 64  # rows of the last piece, if the expert has that many


def fuse_experts(model: PreTrainedModel, swaps: Swaps) -> None:
    """Puts them into a model whose experts use the library's interface; other models stay unchanged."""
    had = getattr(model.config, "_experts_implementation", None)
    if had != "grouped_mm" or not any(hasattr(module, "_is_expert_parallel") for module in model.modules()):
        return
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
    model.set_experts_implementation(EXPERTS)
    swaps.on_undo(lambda: model.set_experts_implementation(had))


def experts_forward(experts: nn.Module, hidden_NH: Tensor, index_NK: Tensor, share_NK: Tensor) -> Tensor:
    """The library's interface of an experts module; trained weights, and any but 16-bit on a CPU, go to the library."""
    rising = experts.gate_up_proj if experts.has_gate else experts.up_proj
    ours = rising.device.type == "cpu" and rising.element_size() == 2 and hidden_NH.dtype == rising.dtype
    if not ours or rising.requires_grad or experts.down_proj.requires_grad or experts._is_expert_parallel:
        return grouped_mm_experts_forward(experts, hidden_NH, index_NK, share_NK)
    expert_S, order_S = index_NK.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(expert_S, torch.arange(rising.shape[0], device=expert_S.device), right=True)
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _linear(experts, name, hidden_NH[order_S // index_NK.shape[1]], ends_E, expert_S)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    out = _linear(experts, "down_proj", inner, ends_E, expert_S)
    if experts.has_post_expert_norm:
        out = experts.post_expert_norm(out)
    back = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    weighted = (out * share_NK.reshape(-1)[order_S, None])[back]
    return weighted.view(*index_NK.shape, -1).sum(1).to(hidden_NH.dtype)


def _linear(experts: nn.Module, name: str, x_SI: Tensor, ends_E: Tensor, expert_S: Tensor) -> Tensor:
    weight = getattr(experts, name)
    out = rows_by_expert(x_SI, weight if experts.is_transposed else weight.transpose(1, 2), ends_E)
    return out + getattr(experts, f"{name}_bias")[expert_S] if experts.has_bias else out


def pieces(start: int, end: int) -> Iterator[slice]:
    """Slices of power-of-two sizes that cover rows `start` to `end`; a last slice of 64 may overlap those before."""
    first = start
    while start < end:
        if end - start < LAST <= end - first:
            yield slice(end - LAST, end)
            return
        size = 1 << ((end - start).bit_length() - 1)
        yield slice(start, start + size)
        start += size


@torch.library.custom_op("trimtab::rows_by_expert", mutates_args=())
def rows_by_expert(x_SI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """-> (S, O): rows `ends[e - 1]` to `ends[e]` of x times weight e. The weights get no gradient."""
    out_SO = x_SI.new_empty(x_SI.shape[0], weight_EIO.shape[2])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        for rows in pieces(start, end):
            torch.mm(x_SI[rows], weight_EIO[expert], out=out_SO[rows])
        start = end
    return out_SO


@rows_by_expert.register_fake
def _(x_SI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return x_SI.new_empty(x_SI.shape[0], weight_EIO.shape[2])


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, weight_EIO, ends_E = inputs
    ctx.save_for_backward(weight_EIO, ends_E)


def _backward(ctx: Any, slope_SO: Tensor) -> tuple:
    weight_EIO, ends_E = ctx.saved_tensors
    return rows_by_expert(slope_SO.contiguous(), weight_EIO.transpose(1, 2), ends_E), None, None


rows_by_expert.register_autograd(_backward, setup_context=_keep)
