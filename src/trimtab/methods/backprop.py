"""Back-propagation: gradients by autograd, the optimiser and schedule named in `training:` (transformers' own)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..contracts import Stepper


@dataclass(frozen=True)
class Backprop(Stepper):
    """The stepper that transformers' Trainer is: the engine leaves it its loop."""

    by_trainer: ClassVar[bool] = True

    def step(self, losses: Iterable[Callable[[], Tensor]]) -> float:
        """Accumulate gradients over the micro-batches; the caller steps the optimiser. Returns the mean loss."""
        values = []
        for loss in losses:
            value = loss()
            value.backward()
            values.append(float(value.detach()))
        return sum(values) / max(len(values), 1)
