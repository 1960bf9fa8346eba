"""Applies the patches of a recipe: for training, for a plan on a model without values, and for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..contracts import Batch, Patch, Place, Surgery, When


def apply_patches(
    model: Any, patches: Iterable[Patch], place: Place, phase: When,
    batches: Callable[[Patch], Iterable[Batch]] | None = None,
    applied: Callable[[Surgery], None] = lambda surgery: None, resumed: bool = False,
) -> list[Surgery]:  # fmt: skip
    """Applies those of `patches` that act in `phase` (LOAD, then TRAIN or INFER), in order; -> their surgeries.

    A patch that needs calibration is calibrated before the next is applied: `batches(patch)` returns the rows
    that it needs in batches (None: a plan, whose model has no values). In a `resumed` run the checkpoint has the
    result; only patches that count tokens are calibrated, since the shapes of later patches depend on them. `applied`
    is called with each complete surgery. If one patch is refused, those before it are undone.
    """
    made: list[Surgery] = []
    try:
        for patch in patches:
            if patch.when is phase or (patch.when is When.BOTH and phase is not When.LOAD):
                made.append(patch.apply(model, place))
                if batches is not None and patch.calibration_rows:
                    if not resumed or patch.counts_tokens:
                        made[-1].calibrate(batches(patch))
                    else:  # what it would choose is in the tensors that are read later
                        made[-1].notes = ()
                applied(made[-1])
    except BaseException:
        revert(made)
        raise
    return made


def without_stand_ins(surgeries: Iterable[Surgery]) -> None:
    """A run that trains uses a base's experts as they are: copies of them in few bits are released."""
    for surgery in surgeries:
        if surgery.tiers is not None:
            surgery.tiers.stand_ins = None


def prepare(model: Any, *parts: Any) -> list[Surgery]:
    """The surgeries of an objective and a stepper, applied after the patches."""
    return [surgery for part in parts if (surgery := part.prepare(model)) is not None]


def revert(surgeries: Sequence[Surgery]) -> None:
    """Reverts them, newest first."""
    for surgery in reversed(surgeries):
        surgery.revert()
