"""What to change where a plan exceeds its budget: the first change that fits, as a user writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from .errors import DoesNotFit
from .memory.budget import gib
from .plan import Plan, plan
from .recipe import Recipe

MICRO, TIMES, CHECKPOINTING = "per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing"


def require_fit(made: Plan, recipe: Recipe) -> None:
    """DoesNotFit with the first change that would fit, if `made` does not."""
    if made.fits:
        return
    if made.disk is not None and made.table_bytes > made.disk:
        raise DoesNotFit(
            f"{gib(made.table_bytes)} of tables in {recipe.place.folder or recipe.output}",
            f"{gib(made.disk)} are free on that disk",
            "Name a folder with room (place: folder), make room, or take a smaller table",
        )
    what, need = ("fast", made.fast_peak_bytes) if made.fast_peak_bytes > made.fast else ("slow", made.slow_bytes)
    if what == "slow":
        said = "Allow more in the slow tier, or take a smaller model"
    else:
        change, least = _first_that_fits(recipe, made, made.fast)
        said = (
            f"It would fit with {change} ({gib(least)})"
            if change
            else f"The least found is {gib(least)}: allow more, or take a smaller model or max_length"
        )
    limit = made.fast if what == "fast" else made.budget.slow or 0
    raise DoesNotFit(
        f"{gib(limit)} of the {what} tier for this run", f"it would hold {gib(need)} at its peak ({made.phase})", said
    )


def advice(recipe: Recipe, made: Plan | None, held: int, limit: int | None) -> str:
    """How to go on with a run that held `held` bytes where `limit` were allowed, as written on the command line.

    What the run held beyond its plan is added to each alternative's. Without a plan or a limit, the first that holds
    less is named.
    """
    change: str | None = next((said for said, _ in _alternatives(recipe)), None)
    if made is None or limit is None:
        return f"{change}, which holds less" if change else "a smaller model or max_length in a new run"
    over = max(0, held - made.fast_peak_bytes)
    change, least = _first_that_fits(recipe, dataclasses.replace(made, process=made.process + over), limit)
    if change:
        return f"{change} ({gib(least)})"
    return f"a higher budget.fast: {gib(held)} was not enough, and the least found is {gib(least)}"


def _first_that_fits(recipe: Recipe, made: Plan, limit: int) -> tuple[str | None, int]:
    """-> the first change with which the fast tier holds at most `limit`, and how much; None: the least of all."""
    least = made.fast_peak_bytes
    for change, other in _alternatives(recipe):
        rows = min(made.rows, other.training_values()[MICRO])
        tried = plan(other, rows=rows, tokens=made.tokens, counted=made.counted, process=made.process)
        if tried.fast_peak_bytes <= limit and (tried.budget.slow is None or tried.slow_bytes <= tried.budget.slow):
            return change, tried.fast_peak_bytes
        least = min(least, tried.fast_peak_bytes)
    return None, least


def _alternatives(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """(how a user writes it, the changed recipe): what holds less, the least slowing first."""
    values = recipe.training_values()
    whole, times = values[MICRO], values.get(TIMES, 1)

    def training(**changes: Any) -> tuple[str, Recipe]:
        said = " ".join(f"training.{key}={str(value).lower()}" for key, value in changes.items())
        return said, dataclasses.replace(recipe, training={**values, **changes})

    if recipe.engine.lean and recipe.engine.recompute != "ffn":
        engine = dataclasses.replace(recipe.engine, recompute="ffn")
        yield "engine.recompute=ffn", dataclasses.replace(recipe, engine=engine)
    smaller = [{MICRO: size, TIMES: times * (whole // size)} for size in halves(whole)]
    for changes in smaller:
        yield training(**changes)
    if not values[CHECKPOINTING]:
        for changes in ({}, *smaller):
            yield training(**{CHECKPOINTING: True}, **changes)


def halves(size: int) -> list[int]:
    """The half, the quarter and so on of `size`, as far as they are whole."""
    return [size // 2**k for k in range(1, size.bit_length()) if size % 2**k == 0]
