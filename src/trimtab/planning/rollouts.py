"""Adds the rollouts to the plan of a step that samples replies: their prompts, and the replies' last tokens."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..recipe import Recipe
from .planned_reply import Work, packs, reply_cost

if TYPE_CHECKING:
    from ..cost.trace import StepCost

ROLLOUTS = "rollouts"  # begins the names of their phases


def largest(objective: Any, args: Any, prompt: int) -> dict[str, int]:
    """`rows`, `tokens` and `counted` of the largest micro-batch with prompts of `prompt` tokens."""
    rows = args.per_device_train_batch_size
    return objective.largest(rows, args.num_generations, prompt, args.max_completion_length)


def with_rollouts(cost: StepCost, recipe: Recipe, args: Any, prompt: int) -> tuple[StepCost, str]:
    """`cost` with the phases of the rollouts, and what they are, in a few words."""
    from ..contracts import When
    from ..cost.trace import OPTIMIZER

    patches = recipe.load_patches()
    replies = args.per_device_train_batch_size * args.steps_per_generation
    prompts = max(1, replies // args.num_generations)
    evicts = any(patch.when is When.INFER for patch in patches)  # such a cache is not copied for a group
    new = args.max_completion_length
    work = Work(replies, prompt, new, packed=packs(recipe, new), prompts=None if evicts else prompts)
    found = reply_cost(recipe, patches, work)
    kept = min(kinds.get(OPTIMIZER, 0) for kinds in cost.peaks.values())  # the state stays
    peaks = {f"{ROLLOUTS}: {phase}": {**kinds, OPTIMIZER: kept} for phase, kinds in found.peaks.items()}
    said = f"{replies} replies of {new} tokens to {prompts} prompt{'s' * (prompts > 1)} of {prompt}"
    return dataclasses.replace(cost, peaks={**cost.peaks, **peaks}), said


def phases(cost: StepCost, said: str) -> list[tuple[str, int, str]]:
    """(name, bytes of tensors in the fast tier at its peak, what it is) of the rollouts and of the update."""
    from ..cost.trace import highest, live

    parts = {name: {k: v for k, v in cost.peaks.items() if k.startswith(ROLLOUTS) == (name == ROLLOUTS)}
             for name in (ROLLOUTS, "update")}  # fmt: skip
    lines = []
    for name, peaks in parts.items():
        phase, kinds = highest(peaks)
        lines.append((name, live(kinds), said if name == ROLLOUTS else f"tensors at its peak: {phase}"))
    return lines
