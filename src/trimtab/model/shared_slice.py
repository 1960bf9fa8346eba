"""Gathers columns of a tensor once for several linears that read it (q, k and v; gate and up)."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class SharedSlice:
    """x[..., I] of the tensor that all linears of a group read: gathered once; only autograd keeps it alive."""

    def __init__(self):
        self.of: weakref.ref | None = None
        self.slice: weakref.ref | None = None
        self.version = -1

    def take(self, x_TI: Tensor, columns_of: Callable[[Tensor], Tensor]) -> Tensor:
        """`columns_of(x_TI)`, or its result for another linear that read the same tensor."""
        if x_TI.is_inference():  # such tensors have no version counter, and nothing is saved for backward
            return columns_of(x_TI)
        same = self.slice is not None and self.of() is x_TI and self.version == x_TI._version
        columns = self.slice() if same else None
        if columns is None:
            with torch.no_grad():
                columns = columns_of(x_TI)
            self.of, self.slice, self.version = weakref.ref(x_TI), weakref.ref(columns), x_TI._version
        return columns
