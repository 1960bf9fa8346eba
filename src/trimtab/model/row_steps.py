"""Steps the rows of tables with any optimizer that steps the model: the engine's, a library's, or the user's own.

A patch whose weights are rows of tables also has one ordinary parameter, of size 0. PyTorch calls `stepped` after each
step of any optimizer; if the optimizer has that parameter, the rows are stepped with its learning rate and decay.
Gradients of rows live as long as the parameter's gradient: `zero_grad` drops both.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..tiered.adam import Rates
from ..tiered.distributed import exchange, settle
from ..tiered.planned import PlannedStore, plan_step
from ..tiered.store import TieredStore
from ..tiered.threads import parallel_map
from .surgery import ModulePatch, Swaps


class RowPatch(ModulePatch):
    """A patch's module whose weights are rows of `stores`, each with an optimizer of its own (RowAdam). It adds to the
    output y of the module beside it: its `forward` takes that module's input, and y.

    `trained`: the parameter that represents the rows in an optimizer. If not `enabled`, `forward` returns y.
    """

    enabled = True
    stores: list[TieredStore]
    trained: nn.Parameter

    def after_step(self, step: int, changed: Sequence[list[int]]) -> None:
        """Called after optimizer step `step`, which changed these rows of each store."""

    def begin(self) -> None:
        """Call at the start of a forward pass: drops the gradients of rows if `zero_grad` was called."""
        zeroed = self.trained.requires_grad and self.trained.grad is None
        if zeroed and torch.is_grad_enabled():
            for store in self.stores:
                store.forget()

    @contextlib.contextmanager
    def without_rows(self) -> Iterator[None]:
        """Within it the patch returns y: it reads no rows, and a backward pass adds no gradients to them."""
        self.enabled = False
        try:
            yield
        finally:
            del self.enabled


def step_with_optimizers(swaps: Swaps) -> None:
    """Until undone, every optimizer step also steps the model's tables.

    The hook does not keep the model alive: if the model is freed without undoing, the hook does nothing.
    """
    reference = weakref.ref(swaps.model)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (model := reference()) is not None:
            stepped(model, optimizer)

    swaps.hook(register_optimizer_step_post_hook(after))


@torch.no_grad()
def stepped(model: nn.Module, optimizer: Optimizer) -> None:
    """Called after a step of `optimizer`: steps the rows that its parameters represent."""
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    patches = [m for m in model.modules() if isinstance(m, RowPatch) and id(m.trained) in parameters]
    stores = [store for patch in patches for store in patch.stores]
    if any(isinstance(store, PlannedStore) for store in stores):
        plan_step([patch.stores for patch in patches])
        return
    exchange(stores)
    coming, turn = iter(stores), Lock()
    _read(next(coming, None))

    def step(patch: RowPatch) -> list[list[int]]:
        changed, rates = [], Rates.of(optimizer, patch.trained)
        for store in patch.stores:
            with turn:  # one thread at a time may send requests to a reader
                _read(next(coming, None))  # reads the next table while this one steps
            changed.append(store.optimizer.step(rates))
        return changed

    changed = parallel_map(step, patches)
    settle(stores)
    for patch, rows in zip(patches, changed, strict=True):
        patch.after_step(patch.stores[0].optimizer.steps - 1, rows)
    settle(stores)  # `after_step` may have written rows


def _read(store: TieredStore | None) -> None:
    if store is not None:
        store.demand_read(store.pending(), tuple(store.parts))
