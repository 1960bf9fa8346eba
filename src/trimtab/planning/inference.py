"""Predicts the memory of generation and evaluation before they start.

The model is built without values and patched as for inference. The trace on fake tensors (cost/trace.py) is of a prompt
and of the last token of a reply, when the KV cache is largest; or of an evaluated batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data.stage import RehearsalSpec
from ..memory.budget import gib, parse
from ..recipe import Recipe
from .calibrate import known_overhead
from .plan import Plan, foreseen, growth, limits, longest_allowed, plan, process_bytes
from .planned_reply import Work, packs, reply_cost

if TYPE_CHECKING:
    from ..contracts import Patch


RESIDENT = 9  # bytes in memory of a kept row of text, as columns of a data set, per byte of its file
NEW = 256  # tokens of the reply that a plan without prompts is for


def plan_inference(
    recipe: Recipe, patches: Sequence[Patch], work: Work, head: str = "causal-lm", labels: int | None = None,
    process: int = 0,
) -> Plan:  # fmt: skip
    """The plan of `work`. `patches`: those of the adapter and for inference. `process`: anonymous bytes that the
    process uses beside tensors.

    Untraceable, a BadInput, if the model's own code cannot be traced.
    """
    import torch

    from ..cost.trace import highest

    device = recipe.place.device
    machine, budget = limits(recipe)
    overhead = known_overhead()
    with torch.random.fork_rng(devices=[]):
        cost = reply_cost(recipe, patches, work, head, labels)
    phase, kinds = highest(cost.peaks)
    shapes = cost.product_shapes * (work.lengths - 1)
    beside = 0 if device.type == "cuda" else overhead.of(growth(kinds), 0, False, 0, shapes)
    return Plan(
        kinds, phase, 0 if device.type == "cuda" else process, beside + cost.copied_ahead, 0, budget, machine,
        work.rows, work.tokens, notes=list(cost.notes), take=cost.take,
    )  # fmt: skip


def plan_largest(recipe: Recipe, **options: Any) -> tuple[Plan, Recipe]:
    """The plan of the recipe, and the recipe. Of several stages, those of the stage that needs the most, with a note on
    each."""
    if not recipe.stages:
        return plan_recipe(recipe, **options), recipe
    names, recipes = [stage.name for stage in recipe.stages], recipe.stage_recipes()
    made: list[Plan] = []
    for stage in recipes:
        one = plan_recipe(stage, **options)
        if recipe.rehearsal and made:
            one = _with_earlier_rows(one, made, stage, recipe.rehearsal, options)
        made.append(one)
    at = max(range(len(made)), key=lambda i: (not made[i].fits, made[i].fast_peak_bytes))
    notes = [f"stage {name}: {gib(one.fast_peak_bytes)} at the peak" for name, one in zip(names, made, strict=True)]
    notes.append(f"the plan is of stage {names[at]}, which needs the most")
    return dataclasses.replace(made[at], notes=[*made[at].notes, *notes]), recipes[at]


def _with_earlier_rows(
    one: Plan, before: list[Plan], stage: Recipe, rehearsal: RehearsalSpec, options: dict[str, Any]
) -> Plan:
    """The plan of a stage that rehearses: its longest row may be an earlier stage's; kept rows are in memory."""
    budget = parse(rehearsal.budget, None, "rehearsal: budget")
    if stage.place.device.type == "cpu":
        one = dataclasses.replace(one, process=one.process + RESIDENT * budget)
    tokens = max(plan.tokens for plan in before)
    known = [plan.counted for plan in (*before, one) if plan.counted is not None]
    counted = max(known) if len(known) > len(before) else None
    if tokens <= one.tokens and counted == one.counted:
        return one
    longest = {"rows": one.rows, "tokens": max(tokens, one.tokens), "counted": counted, "process": one.process}
    made = plan_recipe(stage, **{**options, **longest})
    made.notes.append(f"rows of earlier stages have up to {tokens} tokens")
    return made


def plan_recipe(recipe: Recipe, **options: Any) -> Plan:
    """What `trimtab plan` shows: the plan of training, or of a reply where the recipe trains nothing. Of a patch that
    counts tokens, it also says what the peak would be without it."""
    if recipe.stages:
        return plan_largest(recipe, **options)[0]
    if recipe.trains or not recipe.patches:
        made = plan(recipe, **options).settled(recipe.place.device)
        others = [patch for patch in recipe.load_patches() if not patch.counts_tokens]
        if recipe.trains and len(others) < len(recipe.patches):
            alike = {name: getattr(made, name) for name in ("rows", "tokens", "counted", "process")}  # not read again
            bare = dataclasses.replace(recipe, patches=others)
            made.notes.append(_saved(made, plan(bare, **{**options, **alike})))
        return made
    length, process, notes = longest_allowed(recipe), process_bytes(known_overhead()), list[str]()
    if any(patch.counts_tokens for patch in recipe.load_patches()) and (seen := foreseen(recipe, notes)) is not None:
        recipe, notes = seen.recipe, list(seen.notes)
    head = recipe.load_objective().head
    new = NEW if head == "causal-lm" else 0
    work = Work(1, length, new, packed=packs(recipe, new))
    made = plan_inference(recipe, recipe.load_patches(), work, head, None, process).settled(recipe.place.device)
    what = f"a prompt of {length} tokens (max_length)" + (f" and a reply of {work.new}" if work.new else "")
    made.notes.extend(notes)
    made.notes.append(f"nothing is trained: for {what}")
    return made


def _saved(made: Plan, without: Plan) -> str:
    """How much less tensors use at the peak of `made` than of the plan `without` a patch, as a note."""
    less = without.live_peak_bytes - made.live_peak_bytes
    word = "saves" if less >= 0 else "costs"
    return f"at the peak it {word} {gib(abs(less))} ({made.phase}; without it, the peak is at: {without.phase})"
