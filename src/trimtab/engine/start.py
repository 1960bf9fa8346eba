"""The probes of a run, in their order: packed rows, then the loss and the fused forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..recipe import Recipe
from .packing_probe import pack_apart, packed_batch
from .prepare import BLOCK
from .probe import probe
from .trainers import PackedRows


def checked(
    trainer: Any, recipe: Recipe, say: Callable[[str], None], *, gradients: bool, autocast: torch.dtype | None = None
) -> Recipe:
    """-> the recipe as it can be run with `trainer` (its model is patched, no form of ours is in it): what differs from
    the model's own forward is taken out, with a line to `say`. BadInput where nothing is right.

    Packed rows are set up on the trainer's collator. `gradients`: whether the run trains.
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
