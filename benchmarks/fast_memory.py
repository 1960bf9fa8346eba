"""What training with a patch uses of fast memory beyond the frozen base, counted in the same way for all methods.

trained       16 bytes per trained parameter outside the slow tier: weight, gradient and Adam's two moments
other         a patch's tensors that are not trained: indices, a router; of a router with a slow table, its fast copy
bookkeeping   what Adam records for each row in the slow tier: its last step, and whether it has changed
rows          rows of the slow tier in use: the most of one layer in one micro-batch, as if they were gathered for an
              accelerator. In the forward pass the rows of all experts probed; in the backward pass the rows, and as
              many gradients, of the experts with a pair that fired
activations   what autograd saves for the backward pass of one micro-batch, beyond what it saves for the frozen base
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import told_of_experts
from trimtab.contracts import Surgery


class Rows:
    """Counts the rows in use while it is open. `tokens` of a micro-batch: larger passes are counted in parts."""

    def __init__(self, tokens: int | None = None):
        self.most, self.tokens, self._told = 0, tokens, told_of_experts(self._count)

    def __enter__(self) -> Rows:
        self._told.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._told.__exit__(*error)

    def _count(self, probed_TP: Tensor, store: Any, alive_TP: Tensor | None) -> None:
        if not torch.is_inference_mode_enabled():
            part_T1 = (
                torch.arange(len(probed_TP)).div(self.tokens or len(probed_TP), rounding_mode="floor").unsqueeze(1)
            )
            at_TP = probed_TP + part_T1 * store.rows
            at_TP = at_TP if alive_TP is None else at_TP[alive_TP]
            count = int((at_TP.unique() // store.rows).bincount().max()) if at_TP.numel() else 0
            self.most = max(self.most, count * store.parts["values"].nbytes * (1 if alive_TP is None else 2))


def kept(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves for the backward pass of `loss()`: each storage once, without weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        value = loss()
    del value
    return sum(found.values())


def fast_bytes(surgery: Surgery, rows: int, activations: int) -> dict[str, int]:
    """By kind. `rows`: `Rows.most`; `activations`: `kept` with the patch less `kept` without it."""
    tables, trained, other = surgery.stores, 0, 0
    for tensor in surgery.own_tensors().values():
        if any(table.holds(tensor) for table in tables):
            continue
        trained += 16 * tensor.numel() if tensor.requires_grad else 0
        other += 0 if tensor.requires_grad else tensor.nbytes
    for adapter in getattr(surgery, "adapters", {}).values():
        router = getattr(adapter, "router", None)
        other += router.weight.nbytes if router is not None and router.table is not None else 0
    notes = sum(table.optimizer.last.nbytes + table.optimizer.moved.nbytes for table in tables)
    return {"trained": trained, "other": other, "bookkeeping": notes, "rows": rows, "activations": max(0, activations)}
