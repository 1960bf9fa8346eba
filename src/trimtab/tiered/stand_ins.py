"""Copies of all experts in few bits, in the fast tier: they stand in for experts without a slot, whose records are then
not read. Outputs change; only passes without gradients use them."""

from __future__ import annotations

import torch
from torch import Tensor

from .experts import ExpertStore, Form, layers_of


class StandIns:
    """Of the experts of `store`, packed by `form`."""

    def __init__(self, store: ExpertStore, form: Form):
        self.form = form
        self.layers = layers_of([(len(layer.rows), layer.shapes) for layer in store.layers], form)
        last = self.layers[-1]
        size = last.start + len(last.rows) * last.record_bytes
        self.table = torch.empty(size, dtype=torch.uint8, device="meta" if store.planned else store.device)
        self._of_row = [layer for layer in self.layers for _ in layer.rows]
        for row in () if store.planned else range(store.rows):
            made = form.packed(store.original(row), self._of_row[row].shapes)
            for name, part in self._parts(row).items():
                part.copy_(made[name])

    def _parts(self, row: int) -> dict[str, Tensor]:
        layer = self._of_row[row]
        at = layer.start + (row - layer.rows.start) * layer.record_bytes
        return {
            name: self.table[at + part.offset : at + part.offset + part.nbytes].view(part.dtype).view(part.shape)
            for name, part in layer.parts.items()
        }  # fmt: skip

    def weights(self, row: int) -> dict[str, Tensor]:
        """A row's tensors, by name, unpacked."""
        return self.form.unpacked(self._parts(row), self._of_row[row].shapes)
