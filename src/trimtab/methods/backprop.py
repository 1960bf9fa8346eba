"""Back-propagation: gradients by autograd; `training:` names the optimizer and schedule (transformers' own)."""

from __future__ import annotations

from dataclasses import dataclass

from ..contracts import Stepper


@dataclass(frozen=True)
class Backprop(Stepper):
    """`Stepper` as it stands."""
