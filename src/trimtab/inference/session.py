"""A run's model for generation or evaluation, with a plan, a meter and a guard, as in training.

`budget.fast` means the same as in training. Work whose plan exceeds it does not start (DoesNotFit); of the possible
batch sizes, the largest that fits is used. Work that exceeds it is stopped (Stopped). The record, with planned and
measured memory, is saved in the run's folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..contracts import When, cache_of
from ..cost.machine import machine, now, versions
from ..engine.tables import expert_bytes, reading
from ..errors import BadInput, DoesNotFit, Stopped
from ..memory.budget import Budget, fast_bytes, gib, slow_bytes
from ..memory.guard import Guard
from ..memory.meter import Meter
from ..model import packed
from ..planning.inference import Work, plan_inference
from ..planning.plan import Plan
from ..planning.planned_model import taken
from ..recipe import Recipe
from .load_run import load_run

Say = Callable[[str], None]
TRIES = 8  # plans with smaller chunks of a prompt or a smaller KV cache, until one fits
LEAST_CHUNK, SPARE = 512, 2**20  # tokens; bytes by which the process may grow while it plans


class Guarded(TrainerCallback):
    """Checks the guard of an Inference at each batch that a trainer evaluates."""

    def __init__(self, made: Inference):
        self.made = made

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.made.check()


class Inference:
    """A run's model with its patches. Within `with`, its memory is metered and guarded, and transfers of tables are
    counted."""

    def __init__(
        self, recipe: Recipe, adapter: str | Path | None = None, base_only: bool = False,
        say: Say = lambda line: None,
    ):  # fmt: skip
        self.recipe, self.say = recipe, say
        self.device = recipe.place.device
        slow = slow_bytes(self.device, recipe.place.folder or recipe.output)
        self.budget = Budget.of(recipe.budget, fast_bytes(self.device), slow)
        self.meter, self.tokens = Meter(device=self.device), 0
        self.plan: Plan | None = None  # of the work that uses the most
        self.each: dict[str, list[float]] | None = None  # metric -> a value per row, if rows are evaluated one by one
        self.run = load_run(recipe, adapter, base_only)
        self.model, self.tokenizer, self.surgeries = self.run.model, self.run.tokenizer, self.run.surgeries
        self.base, self.opened = self.run.base, list(self.run.patches)
        for surgery in self.surgeries:
            for note in surgery.notes if surgery.patch.when is When.LOAD else ():
                say(note)

    def __enter__(self) -> Inference:
        self.began = time.monotonic()
        self._stack = contextlib.ExitStack()
        self.meter.start()
        self._stack.callback(self.meter.stop)
        self.guard = Guard.of(self.budget.fast, self.device)
        self.meter.watchers.append(self.guard.see)
        self._stack.callback(self.meter.stop_watching, self.guard.see)
        self.reads = self._stack.enter_context(reading(self.model, self.surgeries))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    # --- before --------------------------------------------------------------------------------------------------

    def replies(self, lengths: Sequence[int], new: int, beams: int = 1, most: int = 16) -> int:
        """Plans replies of `new` tokens to prompts of these lengths (tokens); -> the batch size."""
        longest = sorted(lengths, reverse=True)
        sizes = [min(most >> k, len(longest)) for k in range(most.bit_length()) if most >> k < 2 * len(longest)]
        works = [Work(size * beams, longest[0], new, len(set(longest[::size]))) for size in sizes]
        if packs := self.packs(new):
            works = [dataclasses.replace(work, packed=True) for work in works] + works
        do = "Allow more, let replies be shorter (max_new_tokens), or bound the KV cache (patches: cake)"
        work = self._first_that_fits(works, f"reply to a prompt of {longest[0]} tokens", do)
        if packs and not work.packed:
            self.say("the budget leaves no room for 4-bit weights in the form that decodes fast: replies will be slow")
        self.pack(work.packed)
        return work.rows // beams

    def packs(self, new: int) -> bool:
        """Whether replies of `new` tokens are faster with the model's 4-bit weights in the form for decoding."""
        return self.is_packed or (packed.pays(new) and bool(packed.packable(self.model)) and packed.available())

    @property
    def is_packed(self) -> bool:
        return packed.any_packed(self.model)

    def pack(self, wanted: bool) -> None:
        """Put 4-bit weights into the form for decoding, until `with` ends, or back into the ordinary one."""
        if not wanted:
            packed.unpack_all(self.model)
        elif not self.is_packed:
            self._stack.enter_context(packed.hold(self.model))

    def evaluation(self, rows: int, tokens: int, lengths: int) -> None:
        """Plans the evaluation of batches of `rows` rows with `lengths` distinct lengths, the longest of `tokens`."""
        do = "Allow more, or lower training.per_device_train_batch_size"
        self._first_that_fits([Work(rows, tokens, 0, lengths)], f"evaluate {rows} rows of {tokens} tokens at once", do)

    def planned(self, work: Work, last: bool = False) -> Plan | None:
        """The plan of one batch, which the record will have if it fits and no other uses more. None: it cannot be
        planned, which is an error only with a budget; rows that are evaluated one by one are planned only within one.
        `last`: chunks and caches may shrink to make it fit."""
        if self.each is not None and not self.recipe.budget:
            return None
        try:
            made = self._within_budget(work, last)
        except BadInput:
            if self.recipe.budget:
                raise
            return None
        if made.fits:
            made = made.settled(self.device, lambda spare: taken(self.surgeries, spare))
        if made.fits and (self.plan is None or made.fast_peak_bytes > self.plan.fast_peak_bytes):
            self.plan = made
        return made

    def _first_that_fits(self, works: list[Work], what: str, do: str) -> Work:
        """DoesNotFit if none fits. Without a budget, work that cannot be planned is done without a plan."""
        made = None
        for work in works:
            made = self.planned(work, last=work.rows == works[-1].rows)
            if made is None:
                return work
            if made.fits:
                if self.recipe.budget:
                    self.say(f"planned: {gib(made.fast_peak_bytes)} of the fast tier at the peak")
                return work
        assert made is not None, "there is a smallest batch"
        have = f"one row at a time would use {gib(made.fast_peak_bytes)} at its peak ({made.phase})"
        raise DoesNotFit(f"{gib(made.fast)} of the fast tier to {what}", have, do)

    def _within_budget(self, work: Work, last: bool) -> Plan:
        """The plan of `work`. If the `last` that is tried does not fit, prompts are read in smaller chunks, and a KV
        cache whose size is left open gets what the budget leaves."""
        size = chunk = 0
        self._fit_caches(size, chunk)
        made = self._planned(work)
        for _ in range(TRIES if last else 0):
            if made.fits or self.budget.fast is None:
                break
            excess = (made.fast_peak_bytes - made.fast + SPARE) // work.rows + 1
            half = min(chunk or work.tokens, self._chunk(work.tokens)) // 2
            if made.phase == "prompt" and half >= LEAST_CHUNK:
                chunk = half
            else:
                size = (size or made.kinds.get("cache", 0) // work.rows) - excess
            if size < 0 or not self._fit_caches(size, chunk):
                break
            made = self._planned(work)
        if made.fits and size:
            self.say(f"the KV cache of a text gets {gib(size)}")
        if made.fits and chunk:
            self.say(f"prompts are read in chunks of {chunk} tokens")
        for surgery, patch in zip(self.surgeries, self.run.patches, strict=True):
            surgery.patch = patch
        return made

    def _chunk(self, tokens: int) -> int:
        """Tokens of a prompt of `tokens` that are read at a time; 0 if no patch reads prompts in chunks."""
        found = (patch.chunk or tokens for patch in self.opened if "chunk" in patch.shrinkable)  # type: ignore
        return min(found, default=0)

    def _fit_caches(self, size: int, chunk: int) -> bool:
        """Set `size` bytes per text for KV caches whose size is left open, and `chunk` tokens of a prompt at a time
        where prompts are read in chunks; 0: as in the recipe. -> whether that changed a patch."""
        before, after = list(self.run.patches), []
        for patch in self.opened:
            patch = (patch.within(size) if size else None) or patch
            if chunk and "chunk" in patch.shrinkable:
                patch = dataclasses.replace(patch, chunk=chunk)  # type: ignore[call-arg]
            after.append(patch)
        self.run.patches[:] = after
        return after != before

    def _planned(self, work: Work) -> Plan:
        made = plan_inference(self.recipe, self.run.patches, work, self.base.task, self.run.labels)
        if self.device.type == "cuda":
            return made
        loaded = made.kinds.get("weights", 0) + made.kinds.get("adapter", 0) + expert_bytes(self.surgeries)
        loaded -= packed.scales_bytes(self.model) if work.packed else 0  # none are left to pack if they are there
        return dataclasses.replace(made, process=max(0, self.meter.rebase() - loaded))

    # --- during --------------------------------------------------------------------------------------------------

    def cache(self) -> Any:
        """A new KV cache of the patch that has one; None: transformers' own."""
        return cache_of(self.surgeries)

    def keep(self, metric: str, value: float) -> None:
        """Keep a row's value, if rows are evaluated one by one."""
        if self.each is not None:
            self.each.setdefault(metric, []).append(value)

    def check(self) -> None:
        """Stopped if the budget is exceeded or the machine has little memory left."""
        if self.guard.why:
            asked, have = self.guard.describe()
            raise Stopped(asked, have, "Allow more with budget.fast, or let replies be shorter (max_new_tokens)")

    def on_token(self, rows: int) -> None:
        """Call after each token of a batch of `rows` replies."""
        self.tokens += rows
        self.check()

    # --- after ---------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Planned and measured memory, as in run.json; and "reads" for an adapter with tables."""
        seconds = time.monotonic() - self.began
        self.meter.sample()
        measured = {**self.meter.result(), "seconds": round(seconds, 2)}
        if self.tokens:
            measured |= {"new_tokens": self.tokens, "tokens_per_second": round(self.tokens / seconds, 2)}
        reads = self.reads()
        return {
            "recipe": self.recipe.hash, "finished": now(), "predicted": self.plan.predicted() if self.plan else {},
            "budget": dataclasses.asdict(self.budget), "measured": measured, **({"reads": reads} if reads else {}),
            "machine": machine(), "versions": versions(),
        }  # fmt: skip
