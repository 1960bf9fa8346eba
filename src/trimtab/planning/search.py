"""`trimtab plan --search`: plans combinations of methods and settings, and ranks those that fit.

It combines methods, micro-batches (at an equal effective batch), activation checkpointing, precisions of the base and
chunks of the loss, and plans each combination. For the best methods it then tries what lies between no checkpointing
and checkpointing of all blocks. Settings in the recipe (a precision, checkpointing, a chunk) are not changed.
Combinations that fit are ranked by predicted speed, then by the number of trained parameters; how well a method learns
is not known here. If back-propagation fits with none of them, the stepper mezo is tried, which needs the least memory
and learns far more slowly.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import methods
from ..cost.rates import Rates
from ..errors import BadInput, DoesNotFit, TrimtabError
from ..files import write_text
from ..memory.budget import gib
from ..quiet import silence_libraries
from ..recipe import RENAMED, Recipe
from . import calibrate
from .fit import CHECKPOINTING, KWARGS, MICRO, TIMES, halves
from .plan import Plan, foreseen, plan, process_bytes

PRECISIONS, USUAL = ("bf16", "nf4", "fp32", "int8"), 2  # the first two win unless the processor lacks bf16
SMALL_CHUNK = 32  # positions; the loss's own choice is 128 or more
MOST, MOST_CHUNKS = 48, 2  # combinations that are planned, and how many of them again with the small chunk
MOST_BETWEEN = 3  # methods, each on one precision, for which partial checkpointing is planned
EVERY = (4, 2)  # blocks of which one is checkpointed, between none and all
MEZO = "mezo"
ALIKE = 1.05  # speeds within this factor count as equal; then the number of trained parameters decides


@dataclass(frozen=True)
class Candidate:
    """One combination: its settings, its recipe, and its plan (None: `refused`, with the reason)."""

    method: str
    micro_batch: int
    checkpointing: bool
    precision: str
    chunk: int | None  # of the loss, in positions; None: chosen by bytes, or an objective without chunks
    recipe: Recipe
    plan: Plan | None = None
    refused: str = ""

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits

    @property
    def how(self) -> dict[str, Any]:
        """`every_n_layers` and `offload`, if it checkpoints with them."""
        return (self.recipe.training.get(KWARGS) or {}) if self.checkpointing else {}

    @property
    def blocks(self) -> str:
        """Which blocks are checkpointed, in four letters at most: "no", "yes", "1/2" of them; "+off" with offload."""
        every, offload = self.how.get("every_n_layers", 1), self.how.get("offload", False)
        which = "no" if not self.checkpointing else "yes" if every == 1 else f"1/{every}"
        return "off" if offload and every == 1 else which + ("+" if offload else "")

    def to_dict(self) -> dict[str, Any]:
        assert self.plan is not None
        speed = self.plan.tokens_per_second
        return {
            "method": self.method, "micro_batch": self.micro_batch, "activation_checkpointing": self.checkpointing,
            **({KWARGS: self.how} if self.how else {}),
            "precision": self.precision, "chunk": self.chunk, "fast_peak_bytes": self.plan.fast_peak_bytes,
            "slow_bytes": self.plan.slow_bytes, "tokens_per_second": speed and round(speed, 2),
            "trained": self.plan.trained, "fits": self.fits,
        }  # fmt: skip


@dataclass(frozen=True)
class Found:
    """The result of a search: candidates that fit, best first, then the others, smallest first."""

    candidates: list[Candidate]
    refused: list[Candidate]
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Candidate | None:
        return next((c for c in self.candidates if c.fits), None)

    def to_dict(self) -> dict[str, Any]:
        """What `trimtab plan --search --json` prints."""
        return {
            "fits": self.best is not None, "best": self.best and self.best.to_dict(),
            "recipe": self.best and self.best.recipe.to_dict(),
            "candidates": [c.to_dict() for c in self.candidates],
            "refused": [{"method": c.method, "precision": c.precision, "why": c.refused} for c in self.refused],
            "notes": self.notes,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """The table for people."""
        wide = max([len(c.method) for c in self.candidates] + [6])
        yield f"{'method':<{wide}} batch ckpt base chunk   fast peak  tokens/s       trained  fits"
        for c in self.candidates:
            assert c.plan is not None
            yield (
                f"{c.method:<{wide}} {c.micro_batch:>5} {c.blocks:<4} {c.precision:<4} "
                f"{c.chunk or '':>5} {gib(c.plan.fast_peak_bytes):>11} "
                f"{_speed(c.plan):>9} {c.plan.trained:>13,}  {_word(c.fits)}"
            )
        yield from self.notes

    def require_fit(self) -> Candidate:
        """The best; DoesNotFit with the smallest if none fits."""
        if self.best is not None:
            return self.best
        if not self.candidates:
            first = self.refused[0]
            raise BadInput(
                f"search for {first.recipe.model.name}", f"{first.method}: {first.refused}", "Fix that first"
            )
        least = self.candidates[0]
        assert least.plan is not None
        made = least.plan
        raise DoesNotFit(
            f"{gib(made.fast)} of the fast tier for a run of {least.recipe.model.name}",
            f"of {len(self.candidates)} combinations the smallest would use {gib(made.fast_peak_bytes)} fast and "
            f"{gib(made.slow_bytes)} slow ({_described(least)})",
            "Allow more, or use a smaller model or max_length",
        )


@silence_libraries()
def search(
    recipe: Recipe,
    *,
    tokens: int | None = None,
    process: int | None = None,
    rates: Rates | None = None,
    workers: int = 1,
) -> Found:
    """Plans variants of `recipe` and ranks them. `workers`: processes; more than one needs a main program that can be
    imported (`if __name__ == "__main__"`), since each process imports it.

    `rates`: those of the machine (default: this one's, measured now if necessary). `tokens`, `process`: as in `plan`.
    """
    import torch

    from ..engine.objectives import arguments_class

    arguments_class(recipe.load_objective())  # loads the libraries that a run's process has, before it is measured
    device = recipe.place.device.type
    if rates is None and (device == "cpu" or torch.cuda.is_available()):  # a plan for another machine has no speed
        rates = calibrate.measured_rates(device)
    notes: list[str] = []
    at_start = process_bytes(calibrate.known_overhead())  # once for all: a process that makes many plans grows
    if tokens is None and (seen := foreseen(recipe, notes)) is not None:
        recipe, tokens, at_start = seen.recipe, seen.batch["tokens"], at_start + seen.nbytes
    process = at_start if process is None else process
    wanted = list(_combinations(recipe))
    requested, left_out = wanted[:MOST], len(wanted) - MOST
    options = {"rates": rates, "tokens": tokens, "process": process}
    tried = _plan_all(requested, workers, options)
    chunked: list[Candidate] = []
    if _chunk_is_free(recipe):  # a smaller chunk helps only if logits are live at the peak
        logits = [c for c in tried if c.plan is not None and c.plan.kinds.get("logits")]
        logits.sort(key=lambda c: (c.fits, c.plan.fast_peak_bytes if c.plan else 0))
        chunked = _plan_all([_with_chunk(c, SMALL_CHUNK) for c in logits[:MOST_CHUNKS]], workers, options)
    between = _plan_all(list(_between(recipe, tried)), workers, options)
    if recipe.stepper == "backprop" and not any(c.fits for c in (*tried, *between, *chunked)):
        last = [c for c in _plan_all(list(_without_gradients(recipe)), workers, options) if c.plan is not None]
        notes += [_about_mezo(recipe)] if any(c.fits for c in last) else []
        tried += last
    planned = [c for c in (*tried, *between, *chunked) if c.plan is not None]
    refused = [c for c in tried if c.plan is None]
    notes += dict.fromkeys(f"not possible: {c.method} on {c.precision}: {c.refused}" for c in refused)
    if left_out > 0:
        notes.append(
            f"{left_out} more combinations were not tried: state a precision or one patch to narrow the search"
        )
    return Found(sorted(planned, key=_rank), refused, notes)


def write(found: Found, path: Path, overwrite: bool = False) -> Recipe:
    """Writes the best candidate as a recipe; BadInput if the file exists and may not be replaced."""
    check_free(path, overwrite)
    best = found.require_fit()
    try:
        write_text(path, best.recipe.to_yaml())
    except OSError as error:
        raise BadInput(f"write {path}", error.strerror or str(error), "Name a file that can be written") from None
    return best.recipe


def check_free(path: Path, overwrite: bool) -> None:
    """BadInput if `path` exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise BadInput(f"write {path}", "the file exists already", "Name another, or add --overwrite")


# --- what is combined ------------------------------------------------------------------------------------------------


def _combinations(recipe: Recipe) -> Iterator[Candidate]:
    """The extremes first (the whole batch at once; the smallest micro-batch with checkpointing), on the precisions that
    are usually best; then the other precisions, then what lies between."""
    sizes = _sizes(recipe)
    ways = [False, True] if _way_is_free(recipe) else [recipe.training_values()[CHECKPOINTING]]
    ends = list(dict.fromkeys([(sizes[0], ways[0]), (sizes[-1], ways[-1])]))
    between = [(size, again) for again in ways for size in sizes if (size, again) not in ends]
    free = recipe.model.precision == "auto"
    groups = (PRECISIONS[:USUAL], PRECISIONS[USUAL:]) if free else ((recipe.model.precision,),)
    for variants in (ends, between):
        for group, (size, again) in itertools.product(groups, variants):
            for precision, (name, patches) in itertools.product(group, _methods(recipe)):
                model = dataclasses.replace(recipe.model, precision=precision)
                changed = dataclasses.replace(recipe, patches=patches, model=model)
                yield _trained(Candidate(name, size, again, precision, _chunk(recipe), changed), size, again)


def _sizes(recipe: Recipe) -> list[int]:
    """Micro-batches, from the whole batch down."""
    values = recipe.training_values()
    whole = values[MICRO] * values.get(TIMES, 1)
    sizes = [whole, *halves(whole)]
    return sizes if len(sizes) <= 4 else [*sizes[:3], sizes[-1]]


def _way_is_free(recipe: Recipe) -> bool:
    return not {CHECKPOINTING, "gradient_checkpointing"} & recipe.training.keys()


def _trained(candidate: Candidate, size: int, again: bool, **how: Any) -> Candidate:
    """The candidate, not yet planned, with micro-batches of `size` and checkpointing, under the options `how`."""
    recipe = candidate.recipe
    whole = _sizes(recipe)[0]
    stated = {RENAMED.get(key, key): value for key, value in recipe.training.items()}  # methods differ in defaults
    training = {**stated, MICRO: size, TIMES: whole // size, CHECKPOINTING: again, **({KWARGS: how} if how else {})}
    changed = dataclasses.replace(recipe, training=training)
    return dataclasses.replace(candidate, micro_batch=size, checkpointing=again, plan=None, recipe=changed)


def _between(recipe: Recipe, tried: list[Candidate]) -> Iterator[Candidate]:
    """For the best methods that fit somewhere, but not with the whole batch at once and no checkpointing: every n-th
    block checkpointed, on a GPU also with offloading, at the whole batch and at half of it."""
    options = {KWARGS, "gradient_checkpointing_kwargs"}
    if not _way_is_free(recipe) or options & recipe.training.keys() or not recipe.load_stepper().uses_gradients:
        return
    sizes = _sizes(recipe)[:2]
    planned = {(c.method, c.precision, c.micro_batch, c.checkpointing): c for c in tried if c.plan is not None}
    fits = sorted((c for c in planned.values() if c.fits), key=_rank)
    chosen = {(c.method, c.precision): c for c in reversed(fits)}
    best = sorted(chosen.values(), key=_rank)
    best = [c for c in best if (whole := planned.get((c.method, c.precision, sizes[0], False))) and not whole.fits]
    ways: list[dict[str, Any]] = [{"every_n_layers": every} for every in EVERY]
    if recipe.place.device.type != "cpu":
        ways += [{"offload": True}]
    for found in best[:MOST_BETWEEN]:
        for size in sizes:
            for again in (False, True):
                if (found.method, found.precision, size, again) not in planned:
                    yield _trained(found, size, again)
            yield from (_trained(found, size, True, **how) for how in ways)


def _without_gradients(recipe: Recipe) -> Iterator[Candidate]:
    """Every method with the stepper mezo: the whole batch at once, and the smallest micro-batch. Fields of `training:`
    that belong to back-propagation, its learning rate among them, are left out."""
    mezo = methods.find(MEZO, "stepper")
    others = {"optim", CHECKPOINTING, KWARGS, *mezo.ignored, *mezo.defaults}
    stated = {key: value for key, value in recipe.training.items() if RENAMED.get(key, key) not in others}
    whole, *smaller = _sizes(recipe)
    precision = recipe.model.precision
    for size in dict.fromkeys((whole, *smaller[-1:])):
        for kind in PRECISIONS[:USUAL] if precision == "auto" else (precision,):
            for name, patches in _methods(recipe):
                training = {**stated, MICRO: size, TIMES: whole // size}
                model = dataclasses.replace(recipe.model, precision=kind)
                made = dataclasses.replace(recipe, patches=patches, training=training, model=model, stepper=MEZO)
                yield Candidate(f"{name}, {MEZO}", size, False, kind, _chunk(recipe), made)


def _about_mezo(recipe: Recipe) -> str:
    mezo = methods.find(MEZO, "stepper")
    rate = mezo.defaults["learning_rate"]
    note = "back-propagation does not fit in any combination. mezo has no backward pass, but learns far more slowly: "
    note += f"it needs ten to a hundred times as many steps, at its own learning rate ({rate:g})"
    left = [key for key in recipe.training if key in ("optim", *mezo.ignored, *mezo.defaults)]
    return note + (f". Left out for it: training: {', '.join(left)}" if left else "")


def _methods(recipe: Recipe) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, patches): those of the recipe; each training patch of the table, with its defaults and as its variants."""
    own = [(" + ".join(next(iter(entry)) for entry in recipe.patches), recipe.patches)] if recipe.patches else []
    found = {name: {name: {}} for name in methods.names("patch", "train")}
    for name in list(found):
        for fields in methods.find(name).variants:
            found[f"{name} {_form(fields)}"] = {name: dict(fields)}
    return own + [(name, [entry]) for name, entry in found.items() if [entry] != recipe.patches]


def _form(fields: dict[str, Any]) -> str:
    """What a variant is called: "fa", "offload: slow"."""
    return ", ".join(key if value is True else f"{key}: {value}" for key, value in fields.items())


def _chunk(recipe: Recipe) -> int | None:
    return getattr(recipe.load_objective(), "chunk", None)


def _chunk_is_free(recipe: Recipe) -> bool:
    objective = recipe.load_objective()
    return hasattr(objective, "chunk") and objective.chunk is None


def _with_chunk(candidate: Candidate, chunk: int) -> Candidate:
    objective = candidate.recipe.load_objective()
    values = {**dataclasses.asdict(objective), "chunk": chunk}
    recipe = dataclasses.replace(candidate.recipe, objective={methods.name_of(objective): values})
    return dataclasses.replace(candidate, recipe=recipe, chunk=chunk, plan=None)


def _rank(candidate: Candidate) -> tuple:
    """Sort key: those that fit first, then the faster, among equals those that train more and use less."""
    made = candidate.plan
    assert made is not None
    if not made.fits:
        return (1, made.fast_peak_bytes, made.slow_bytes)
    speed = round(math.log(made.tokens_per_second) / math.log(ALIKE)) if made.tokens_per_second else 0
    return (0, -speed, -made.trained, made.fast_peak_bytes)


def _speed(made: Plan) -> str:
    return f"{made.tokens_per_second:,.0f}" if made.tokens_per_second else "-"


def _word(yes: bool) -> str:
    return "yes" if yes else "no"


def _described(candidate: Candidate) -> str:
    parts = [candidate.method, f"micro-batch {candidate.micro_batch}", candidate.precision]
    parts += [f"checkpointing ({candidate.blocks})"] if candidate.how else ["checkpointing"] * candidate.checkpointing
    return ", ".join(parts)


# --- planning many ---------------------------------------------------------------------------------------------------


def _plan_all(candidates: list[Candidate], workers: int, options: dict[str, Any]) -> list[Candidate]:
    """The candidates with their plans, made with `options` by `workers` processes."""
    one = functools.partial(_planned, options=options)
    if workers == 1 or len(candidates) < 4:
        return list(map(one, candidates))
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch threads may hang
    with ProcessPoolExecutor(workers, context) as pool:
        return list(pool.map(one, candidates))


def _planned(candidate: Candidate, options: dict[str, Any]) -> Candidate:
    try:
        made = plan(candidate.recipe, **options)
    except TrimtabError as error:
        return dataclasses.replace(candidate, refused=error.have)
    if not made.trained:
        return dataclasses.replace(candidate, refused="it trains nothing by itself")
    return dataclasses.replace(candidate, plan=dataclasses.replace(made, take=None))  # it holds the model
