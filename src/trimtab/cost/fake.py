"""Fake tensors for the trace: a model of fake parameters, and results whose size depends on data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import anatomy
from ..model.quant import is_quantised, rebuild


def _nonzero(counted: int | None, x: Tensor) -> Tensor:
    return x.new_empty((x.numel() if counted is None else min(counted, x.numel()), x.dim()), dtype=torch.int64)


def _unique(
    _: int | None, x: Tensor, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False
) -> tuple:
    index = functools.partial(x.new_empty, dtype=torch.int64)
    return x.new_empty(x.numel()), index(x.shape if return_inverse else 0), index(x.numel() if return_counts else 0)


def _int8(_: int | None, x: Tensor, threshold: float = 0.0) -> tuple:
    """bitsandbytes' quantizing of activations; no column counts as an outlier (in a real step a few do)."""
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32),
        (x.new_empty(0, dtype=torch.int64) if threshold > 0 else None),
    )


def _grouped_mm(_: int | None, a: Tensor, b: Tensor, offs: Tensor | None = None, *rest: Any, **named: Any) -> Tensor:
    """Products by groups of rows, or of columns; PyTorch's own fake form takes bf16 only."""
    if a.dtype == torch.bfloat16:
        return torch.ops.aten._grouped_mm(a, b, offs, *rest, **named)
    groups = () if a.dim() != b.dim() else (len(a) if offs is None else len(offs),)
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


BOUNDS: dict[str, Callable[..., Any]] = {  # by name, since bitsandbytes may not be installed
    "aten::nonzero": _nonzero, "aten::_unique2": _unique, "bitsandbytes::int8_vectorwise_quant": _int8,
    "aten::_grouped_mm": _grouped_mm,
    "aten::equal": lambda *_: True,  # a cached value counts as current
}  # fmt: skip


def empty_like_meta(model: nn.Module, device: torch.device) -> None:
    """In a FakeTensorMode, replaces each parameter and buffer of `model` with a fake one on `device`; keeps ties."""
    made: dict[int, Any] = {}

    def empty(old: Tensor) -> Tensor:
        return torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)

    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        if anatomy.is_linear(module) and is_quantised(module):
            rebuild(module, empty)
            made[id(module._parameters["weight"])] = module._parameters["weight"]
        for table in tables:
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = empty(old)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[id(old)]
