"""Runs the probes at the start of a run, in order: packed rows, then the loss and the fused operations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..contracts import Objective, Surgery
from ..model.block_mask import BLOCK
from ..recipe import Recipe
from .packed_rows import PackedRows
from .packing_probe import pack_apart, packed_batch
from .probe import head_read, loss_now, probe, require_unchanged


@contextlib.contextmanager
def loss_compared(model: Any, objective: Objective) -> Iterator[Callable[[list[Surgery], torch.dtype | None], None]]:
    """Yields a function (surgeries, autocast's dtype) that raises BadInput if patches that should change nothing before
    training have changed a language model's loss. Within it the model's head is read once."""
    if objective.head != "causal-lm":
        yield lambda surgeries, autocast: None
        return
    with head_read(model):
        before = loss_now(model)
        yield lambda surgeries, autocast: require_unchanged(model, before, surgeries, autocast)


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
