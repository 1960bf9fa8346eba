"""Finds what to change if a plan exceeds its budget: the first change that fits, as a user writes it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from ..errors import BadInput, DoesNotFit
from ..memory.budget import gib
from ..recipe import Recipe
from .plan import Plan, plan

MICRO, TIMES, CHECKPOINTING = "per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing"
KWARGS = f"{CHECKPOINTING}_kwargs"
TIMES_HALVED = 4


def require_fit(made: Plan, recipe: Recipe) -> None:
    """DoesNotFit with the first change that would fit, if `made` does not."""
    if made.fits:
        return
    full, requested = made.disk is not None and made.table_bytes > made.disk, f"{gib(made.fast)} of the fast tier"
    have, do = f"it would use {gib(made.fast_peak_bytes)} at its peak ({made.phase})", "a smaller model or max_length"
    change, least = _first_that_fits(recipe, made, made.fast, tables=made.fast_peak_bytes <= made.fast)
    if full:
        requested = f"{gib(made.table_bytes)} of tables in {recipe.place.folder or recipe.output}"
        have, do = f"{gib(made.disk or 0)} are free on that disk", "a smaller table"
        do = f"Name a folder with more space (place: folder), free some, or use {change or do}"
    elif made.fast_peak_bytes <= made.fast:
        requested, have = f"{gib(made.budget.slow or 0)} of the slow tier", f"it would use {gib(made.slow_bytes)}"
        do = f"Allow more in the slow tier, or use {change or do}"
    elif change:
        do = f"It would fit with {change} ({gib(least)})"
    else:
        do = f"The least found is {gib(least)}: allow more, or use {do}"
    raise DoesNotFit(requested if full else f"{requested} for this run", have, do)


def advice(recipe: Recipe, made: Plan | None, used: int, limit: int | None) -> str:
    """How to continue a run that used `used` bytes where `limit` were allowed, as written on the command line.

    Each alternative gets the bytes that the run used beyond its plan. Without a plan or a limit, the result is the
    first alternative.
    """
    change: str | None = next((written for written, _ in _computed(recipe)), None)
    if made is None or limit is None:
        return f"{change}, which uses less" if change else "a smaller model or max_length in a new run"
    over = max(0, used - made.fast_peak_bytes)
    process = made.process + over
    change, least = _first_that_fits(recipe, dataclasses.replace(made, process=process), limit, begun=True)
    if change:
        return f"{change} ({gib(least)})"
    return f"a higher budget.fast: {gib(used)} was not enough, and the least found is {gib(least)}"


def _first_that_fits(
    recipe: Recipe, made: Plan, limit: int, *, tables: bool = False, begun: bool = False
) -> tuple[str | None, int]:
    """-> (the first change with which both tiers fit, the fast one within `limit`; its bytes of the fast tier), or
    (None, the least bytes found). `tables`: only tables are too large. `begun`: only changes that a started run
    allows."""
    least = made.fast_peak_bytes
    found = (() if tables else _computed(recipe), () if begun else _smaller(recipe))
    for change, other in itertools.chain(*found):
        rows = min(made.rows, other.training_values()[MICRO])
        try:
            tried = plan(other, rows=rows, tokens=made.tokens, counted=made.counted, process=made.process)
        except BadInput:  # fields that exclude each other
            continue
        tried = dataclasses.replace(tried, disk=made.disk if tried.disk is not None else None)
        if dataclasses.replace(tried, budget=dataclasses.replace(tried.budget, fast=limit)).fits:
            return change, tried.fast_peak_bytes
        least = min(least, tried.fast_peak_bytes)
    return None, least


def _computed(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yields (how a user writes it, the changed recipe): the same steps in less memory, the fastest first."""
    values = recipe.training_values()
    whole, times = values[MICRO], values.get(TIMES, 1)

    def training(**changes: Any) -> tuple[str, Recipe]:
        written = " ".join(f"training.{key}={str(value).lower()}" for key, value in changes.items())
        return written, dataclasses.replace(recipe, training={**values, **changes})

    if recipe.engine.fused_ops and recipe.engine.recompute != "ffn":
        engine = dataclasses.replace(recipe.engine, recompute="ffn")
        yield "engine.recompute=ffn", dataclasses.replace(recipe, engine=engine)
    smaller = [{MICRO: size, TIMES: times * (whole // size)} for size in halves(whole)]
    for changes in smaller:
        yield training(**changes)
    if not values[CHECKPOINTING]:
        for changes in ({}, *smaller):
            yield training(**{CHECKPOINTING: True}, **changes)


def _smaller(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yields (how a user writes it, the changed recipe): tables in a file, and smaller patches."""
    patches = recipe.load_patches()
    if any(patch.uses_tables for patch in patches) and recipe.place.slow == "ram":
        yield "place.slow=disk", dataclasses.replace(recipe, place=dataclasses.replace(recipe.place, slow="disk"))
    for at, patch in enumerate(patches):
        ((name, fields),) = recipe.patches[at].items()
        for key in () if recipe.trains and patch.when.value == "infer" else patch.shrinkable:
            for value in _lower(getattr(patch, key)):
                entry = {name: {**fields, key: value}}
                changed = [*recipe.patches[:at], entry, *recipe.patches[at + 1 :]]
                yield f"patches.{name}.{key}={value}", dataclasses.replace(recipe, patches=changed)


def _lower(value: int | float | str | None) -> list[int | float]:
    """Smaller values: 0 for a share of memory (a fraction); for a count its halves, up to TIMES_HALVED times."""
    if value is None or isinstance(value, str):  # what the plan chooses; a size with a unit
        return []
    if isinstance(value, float):
        return [0.0] if value else []
    return [size for k in range(1, TIMES_HALVED + 1) if (size := value >> k)]


def halves(size: int) -> list[int]:
    """The half, the quarter and so on of `size`, while they are whole."""
    return [size // 2**k for k in range(1, size.bit_length()) if size % 2**k == 0]
