"""Columns of one tensor that several linears read (q, k and v; gate and up), gathered once."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class SharedSlice:
    """x[..., I] of the tensor that all linears of a group read: gathered once, kept by no one but autograd."""

    def __init__(self):
        self.of: weakref.ref | None = None
        self.slice: weakref.ref | None = None
        self.version = -1

    def take(self, x_TI: Tensor, columns_of: Callable[[Tensor], Tensor]) -> Tensor:
        """`columns_of(x_TI)`, or what it gave to another linear for this very tensor."""
        if x_TI.is_inference():  # such tensors count no versions, and nothing is saved for backward
            return columns_of(x_TI)
        kept = self.slice() if self.slice is not None and self.of() is x_TI and self.version == x_TI._version else None
        if kept is None:
            with torch.no_grad():
                kept = columns_of(x_TI)
            self.of, self.slice, self.version = weakref.ref(x_TI), weakref.ref(kept), x_TI._version
        return kept
