"""Stops a run whose loss is no number any more, or far above that of a model that knows nothing.

Guessing evenly among V words costs ln V nats a token (V labels of a classifier: ln V a row). A run whose loss, having
been below it, is above twice that value and three times its own median for two steps in a row has diverged: such runs
do not come back at the same learning rate. A loss or a gradient that is not finite stops the run at once, before the
optimizer step that would spread it to every weight.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import torch
from transformers import TrainerCallback

WINDOW = 20  # steps that the median is of
PATIENCE = 2  # steps in a row above the limit


class Diverged(Exception):
    """Training has diverged. `good`: the last step after which the weights still gave an ordinary loss."""

    def __init__(self, what: str, good: int):
        super().__init__(what)
        self.what, self.good = what, good


class StopIfDiverged(TrainerCallback):
    """Raises `Diverged` before an optimizer step. `chance`: nats of a uniform guess; None where there is no such thing
    (regression), and only what is not finite counts."""

    def __init__(self, trainer: Any, chance: float | None):
        self.trainer, self.chance = trainer, chance
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.above = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        loss, norm = self.trainer.step_loss(), self.trainer.grad_norm
        for name, value in (("loss", loss), ("gradients' norm", norm)):
            if not math.isfinite(value):
                raise Diverged(f"the {name} of step {state.global_step + 1} is {value}", state.global_step)
        if self.chance is None:
            return
        usual = statistics.median(self.recent) if self.recent else loss
        self.above = self.above + 1 if loss > 2 * self.chance and loss > 3 * usual else 0
        if self.above >= PATIENCE:
            what = f"the loss rose from {usual:.2f} to {loss:.2f} by step {state.global_step + 1}"
            raise Diverged(what, max(0, state.global_step - self.above))
        if not self.above:
            self.recent.append(loss)


def chance_of(model: Any, labels: list[str] | None, regression: bool) -> float | None:
    """Nats of a uniform guess: over a language model's vocabulary, or over a classifier's labels."""
    if regression:
        return None
    return math.log(max(2, len(labels) if labels else model.config.get_text_config().vocab_size))


def mean_of(losses: list[torch.Tensor], summed: bool) -> torch.Tensor:
    """A step's loss from its micro-batches': their sum where each is already a share of the step's mean."""
    stacked = torch.stack(losses)
    return stacked.sum() if summed else stacked.mean()
