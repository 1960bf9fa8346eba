"""Rows of tables step when an optimiser does, in whichever loop: the engine's, a library's or a stranger's.

A patch whose numbers are rows of tables has one ordinary parameter beside them, of size 0.
Whichever optimiser steps that parameter steps the rows with it, at its own rates: PyTorch calls `stepped` after each
step of any optimiser. Gradients of rows go as the parameter's gradient goes: `zero_grad` takes both away.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..tiered.adam import Rates
from ..tiered.distributed import exchange, settle
from ..tiered.store import TieredStore
from ..tiered.threads import at_once, side_by_side
from .surgery import ModulePatch, Swaps


class RowPatch(ModulePatch):
    """A patch's module whose numbers are rows of `stores`, each of which has its optimiser (RowAdam).

    `trained`: the parameter that stands for the rows in an optimiser.
    """

    stores: list[TieredStore]
    trained: nn.Parameter

    def tend(self, step: int, moved: Sequence[list[int]]) -> None:
        """After step `step`, which moved these rows of each store."""

    def begin(self) -> None:
        """Call at the start of a pass forward (of one back, a module that is used twice would begin twice)."""
        zeroed = self.trained.requires_grad and self.trained.grad is None  # perhaps without a step
        if zeroed and torch.is_grad_enabled():
            for store in self.stores:
                store.forget()


def step_with_optimisers(swaps: Swaps) -> None:
    """From here to the way back, the rows of the model's tables step with its parameters.

    What PyTorch calls does not hold the model: one that is let go of without a way back costs nothing.
    """
    there = weakref.ref(swaps.model)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (model := there()) is not None:
            stepped(model, optimizer)

    swaps.hook(register_optimizer_step_post_hook(after))


@torch.no_grad()
def stepped(model: nn.Module, optimizer: Optimizer) -> None:
    """`optimizer` has made a step: the rows that stand behind its parameters make theirs."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    patches = [m for m in model.modules() if isinstance(m, RowPatch) and id(m.trained) in held]
    if planned := [patch for patch in patches if patch.stores[0].planned]:
        copies = sorted(max(store.optimiser.temporaries for store in patch.stores) for patch in planned)
        torch.empty(sum(copies[-at_once() :]), dtype=torch.uint8)  # for the planner, which counts it
    patches = [patch for patch in patches if not patch.stores[0].planned]
    stores = [store for patch in patches for store in patch.stores]
    exchange(stores)
    coming, turn = iter(stores), Lock()
    _hasten(next(coming, None))

    def step(patch: RowPatch) -> list[list[int]]:
        moved, rates = [], Rates.of(optimizer, patch.trained)
        for store in patch.stores:
            with turn:  # a reader is asked by one thread at a time
                _hasten(next(coming, None))  # what the next table steps with is read while this one steps
            moved.append(store.optimiser.step(rates))
        return moved

    moved = side_by_side(step, patches)
    settle(stores)
    for patch, rows in zip(patches, moved, strict=True):
        patch.tend(patch.stores[0].optimiser.steps - 1, rows)
    settle(stores)  # tending may have written rows


def _hasten(store: TieredStore | None) -> None:
    if store is not None:
        store.hasten(store.pending(), tuple(store.parts))
