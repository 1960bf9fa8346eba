"""Runs the probes at the start of a run, in order: packed rows, then the loss and the fused operations."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch

from ..contracts import Objective, Surgery
from ..errors import BadInput
from ..model.block_mask import BLOCK
from ..recipe import Recipe
from .packed_rows import PackedRows
from .packing_probe import pack_apart, packed_batch
from .probe import head_read, loss_now, probe, require_unchanged


class LossCompared:
    """Checks that patches which start at zero do not change a language model's loss. Within it the model's head is read
    once."""

    def __init__(self, model: Any, objective: Objective):
        self.model, self.applies = model, objective.head == "causal-lm"

    def __enter__(self) -> LossCompared:
        self._stack = contextlib.ExitStack()
        if self.applies:
            self._stack.enter_context(head_read(self.model))
            self.before = loss_now(self.model)
            if not math.isfinite(self.before):
                self._stack.close()
                name = type(self.model).__name__
                have = f"its loss of a test batch is {self.before}: a weight is NaN or infinite, or too large"
                raise BadInput(f"train {name}", have, "Fetch the model again, or load it in another precision")
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def applied(self, surgery: Surgery) -> None:
        """Call after each patch: the loss after one that changes the model is what the next must not change."""
        if self.applies and not surgery.starts_at_zero:
            self.before = loss_now(self.model)

    def require_unchanged(self, surgeries: list[Surgery], autocast: torch.dtype | None) -> None:
        """Raises BadInput if the loss has changed."""
        if self.applies and any(surgery.starts_at_zero for surgery in surgeries):
            require_unchanged(self.model, self.before, surgeries, autocast)


def checked(
    trainer: Any, recipe: Recipe, say: Callable[[str], None], *, gradients: bool, autocast: torch.dtype | None = None
) -> Recipe:
    """-> the recipe without the shortcuts that differ from the model's own forward, each with a line to `say`. BadInput
    if no form of the loss agrees with it. Also sets up the trainer's collator for packed rows.

    `trainer`: its model is patched, without fused operations. `gradients`: whether the run trains.
    """
    model, rows, batch = trainer.model, trainer.data_collator, None
    if isinstance(rows, PackedRows):
        field = "packing" if trainer.args.packing else "padding_free"
        if note := pack_apart(model, rows, trainer.args.max_length, field):
            say(note)
        setattr(trainer.args, BLOCK, rows.block)
        batch = packed_batch(model, rows)
    found = probe(model, recipe, gradients=gradients, autocast=autocast, batch=batch)
    for note in found.notes:
        say(note)
    return found.recipe
