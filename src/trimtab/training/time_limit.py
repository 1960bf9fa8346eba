"""`training.max_minutes`: a run that stops by the clock, with a checkpoint from which it can be resumed exactly.

The limit counts from the start of the process, loading included, and anew after each resume, as the time that a rented
machine allows. The run stops before a step that would end after the limit if it took as long as the longest so far, so
it ends in time; it takes at least one step, so that a run which is resumed again and again comes to its end.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from ..errors import BadInput, Stopped
from .progress import any_process

clock = time.monotonic  # seconds


class StopAtTime(TrainerCallback):
    """Finishes the step, writes a checkpoint and ends the run before `limit` seconds after `began` (None: no limit)."""

    def __init__(self, limit: float | None, began: float):
        self.limit, self.began, self.reached = limit, began, False
        self.longest = 0.0  # seconds of a step, with what comes between two: logs, evaluation, a checkpoint
        self.last: float | None = None  # when the last step ended, or the first began

    def on_step_begin(self, args, state, control, **kwargs):
        if self.last is None:
            self.last = clock()

    def on_step_end(self, args, state, control, **kwargs):
        if self.limit is None:
            return control
        now = clock()
        self.longest, self.last = max(self.longest, now - (self.last or now)), now
        late = now + self.longest > self.began + self.limit and state.global_step < state.max_steps
        self.reached = any_process(late, args)
        if self.reached:
            control.should_save = control.should_training_stop = True
        return control

    def stopped(self, at: str, checkpoint: Any, restarted: bool) -> Stopped:
        """The exception for a run that stopped. `at`: "step 3 of 10"; `checkpoint`: the newest."""
        limit = f"{(self.limit or 0) / 60:g} minutes"
        have = f"the next step could end after training.max_minutes ({limit}); {checkpoint} is complete"
        do = "Continue with resume=true"
        if self.longest > (self.limit or 0) and not restarted:
            do += f", and a larger max_minutes: one step takes {self.longest / 60:.2g} minutes"
        return Stopped(f"stopped after {at}", have, do)


def require_step(limit: float | None, seconds: float | None) -> None:
    """BadInput for a limit that is shorter than one step, where the plan knows how many `seconds` a step takes."""
    if limit is not None and seconds is not None and seconds > limit:
        have = f"one step takes about {seconds / 60:.2g} minutes on this machine"
        raise BadInput(f"training: max_minutes: {limit / 60:g}", have, "Raise it, or make the batch smaller")
