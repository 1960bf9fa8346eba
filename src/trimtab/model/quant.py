"""Dense weights of linears stored in full precision or by bitsandbytes (nf4, int8), and such linears without values
for the planner.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import packed
from .anatomy import dense_view, widths
from .experts import TIERS
from .surgery import is_patch


def stored_as(linear: nn.Module) -> str:
    """ "nf4", "int8" or "dense", by the attributes of the parameter: needs no import of bitsandbytes, and works on fake
    tensors, which cannot be of its classes."""
    if packed.is_packed(linear):
        return "nf4"
    weight = linear.weight
    if getattr(weight, "quant_state", None) is not None:
        return "nf4"
    return "int8" if type(weight).__name__ == "Int8Params" or hasattr(weight, "SCB") else "dense"


def is_quantised(linear: nn.Module) -> bool:
    return stored_as(linear) != "dense"


def dense_weight(linear: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """-> (out, in): a plain linear's own weight (not copied if its dtype is `dtype`), or a new dequantised tensor."""
    if packed.is_packed(linear):
        return packed.dense_weight(linear, dtype)
    weight = linear.weight
    kind = stored_as(linear)
    if kind == "nf4":
        from bitsandbytes.functional import dequantize_4bit

        dense = dequantize_4bit(weight.data, weight.quant_state)
    elif kind == "int8":
        state = linear.state
        rows = state.CB if state.CB is not None else (weight.CB if weight.CB is not None else weight.data)
        scale = state.SCB if state.SCB is not None else weight.SCB
        dense = rows.to(dtype or torch.bfloat16) * (scale.view(-1, 1) / 127).to(dtype or torch.bfloat16)
    else:
        dense = dense_view(linear)
    return dense if dtype is None else dense.to(dtype)


def product(linear: nn.Module, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of `x`, (..., out), a new tensor; W is `weight` if given. A weight that is packed for
    decoding is multiplied by its kernel, which computes no gradients."""
    if weight is None and packed.is_packed(linear):
        return packed.product(linear, x)
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, dense_weight(linear, x.dtype) if weight is None else weight, bias)


def dense_linear(linear: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """A plain nn.Linear with the same weights, for saving a quantised base as a plain model."""
    rows, columns = linear.out_features, linear.in_features
    plain = nn.Linear(columns, rows, bias=linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(dense_weight(linear, dtype).detach().clone(), requires_grad=False)
    if linear.bias is not None:
        plain.bias = nn.Parameter(linear.bias.detach().to(dtype).clone(), requires_grad=False)
    return plain


def parameters_of(model: nn.Module) -> int:
    """The number of parameters of the model without those of patches; packed weights count as what they hold."""
    found: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_patch(module):
                packed = name == "weight" and is_quantised(module)
                found[id(parameter)] = math.prod(widths(module)) if packed else parameter.numel()
    tiers = [vars(module)[TIERS] for module in model.modules() if TIERS in vars(module)]  # experts outside the model
    return sum(found.values()) + sum(layer.numel for layer in tiers)


def quantise_empty(model: nn.Module, config: Any, heads: list[str]) -> None:
    """Replaces the linears of a model on `meta`, except `heads`, with those that bitsandbytes creates under `config` (a
    BitsAndBytesConfig): packed weights with their state, without values."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    replace_with_bnb_linear(model, heads, config)
    empty = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    for linear in model.modules():
        if isinstance(linear, Linear4bit):
            rows, columns = linear.weight.shape
            blocks = math.ceil(rows * columns / BLOCK)
            nested = QuantState(
                absmax=empty(math.ceil(blocks / BLOCK_OF_SCALES), dtype=torch.float32),
                blocksize=BLOCK_OF_SCALES,
                code=empty(256, dtype=torch.float32),
                dtype=torch.float32,
            )
            state = QuantState(
                absmax=empty(blocks, dtype=torch.uint8),
                shape=torch.Size((rows, columns)),
                code=empty(16, dtype=torch.float32),
                blocksize=BLOCK,
                quant_type=config.bnb_4bit_quant_type,
                dtype=model.dtype,
                offset=empty((), dtype=torch.float32),
                state2=nested,
            )
            packed = empty((rows * columns + 1) // 2, 1, dtype=torch.uint8)
            linear.weight = Params4bit(packed, quant_state=state, quant_type=state.quant_type, bnb_quantized=True)
            linear.quant_state = state
            linear.support_avx512bf16_for_cpu = False  # as load_model does
        elif isinstance(linear, Linear8bitLt):
            rows = linear.weight.shape[0]
            packed = empty(*linear.weight.shape, dtype=torch.int8)
            scales = empty(rows, dtype=torch.float32)
            linear.weight = Int8Params(packed, requires_grad=False, CB=packed, SCB=scales)


BLOCK, BLOCK_OF_SCALES = 64, 256  # values per scale, scales per nested scale: bitsandbytes' defaults


def quantised_state(model: nn.Module) -> list[Tensor]:
    """The tensors of a model's quantised linears beside weights and biases: scales and codes."""
    found: list[Tensor | None] = []
    for linear in model.modules():
        if linear._parameters.get("weight") is None or (kind := stored_as(linear)) == "dense":
            continue
        if kind == "nf4":
            state = linear.weight.quant_state
            inner = [] if state.state2 is None else [state.offset, state.state2.absmax, state.state2.code]
            found += [state.absmax, state.code, *inner]
        else:  # the first forward moves the state to the module
            found += [linear.weight.SCB, getattr(linear.state, "SCB", None)]
    return [tensor for tensor in found if tensor is not None]


def rebuild(linear: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replaces each tensor of a quantised linear's weight with `make(tensor)`, on a plain parameter with its state."""
    import copy

    old, kind = linear.weight, stored_as(linear)
    new = nn.Parameter(make(old), requires_grad=False)
    if kind == "nf4":
        state = copy.copy(old.quant_state)
        state.absmax, state.code = make(state.absmax), make(state.code)
        if state.state2 is not None:
            state.offset, state.state2 = make(state.offset), copy.copy(state.state2)
            state.state2.absmax, state.state2.code = make(state.state2.absmax), make(state.state2.code)
        new.quant_state = linear.quant_state = state
    else:
        new.CB, new.SCB, new.has_fp16_weights = new.data, make(old.SCB), False
    linear.weight = new
