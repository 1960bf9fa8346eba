"""The dense weight behind a linear, whatever it is stored in: full precision, bitsandbytes nf4/fp4 or int8."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_quantised(linear: nn.Module) -> bool:
    """bitsandbytes' Linear4bit and Linear8bitLt; told by the parameter's class, so that nothing is imported for it."""
    return type(linear.weight).__name__ in ("Params4bit", "Int8Params")


def dense_weight(linear: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """-> (out, in). A plain linear's own weight (no copy when `dtype` fits), or a fresh de-quantised one."""
    weight = linear.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        dense = dequantize_4bit(weight.data, weight.quant_state)
    elif kind == "Int8Params":
        state = linear.state
        rows = state.CB if state.CB is not None else (weight.CB if weight.CB is not None else weight.data)
        scale = state.SCB if state.SCB is not None else weight.SCB
        dense = rows.to(dtype or torch.bfloat16) * (scale.view(-1, 1) / 127).to(dtype or torch.bfloat16)
    else:
        dense = weight
    return dense if dtype is None else dense.to(dtype)


def dense_linear(linear: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """A plain nn.Linear with the same weights, for a base that is to be written out without its quantiser."""
    rows, columns = linear.out_features, linear.in_features
    plain = nn.Linear(columns, rows, bias=linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(dense_weight(linear, dtype).detach().clone(), requires_grad=False)
    if linear.bias is not None:
        plain.bias = nn.Parameter(linear.bias.detach().to(dtype).clone(), requires_grad=False)
    return plain
