"""Predicts the memory of generation and evaluation before they start.

The model is built without values and patched as for inference. The trace on fake tensors (cost/trace.py) is of a prompt
and of the last token of a reply, when the KV cache is largest; or of an evaluated batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..memory.budget import gib
from ..recipe import Recipe
from .calibrate import known_overhead
from .plan import Plan, foreseen, growth, limits, longest_allowed, plan, process_bytes
from .planned_model import PlannedModel, at_whole_depth

if TYPE_CHECKING:
    from ..contracts import Patch
    from ..cost.trace import StepCost, Trace


NEW = 256  # tokens of the reply that a plan without prompts is for


@dataclasses.dataclass(frozen=True)
class Work:
    """The largest batch. `new`: tokens generated after it; 0: evaluation only. `lengths`: how many distinct lengths the
    batches have. `packed`: with 4-bit weights in the form for decoding (model/packed.py)."""

    rows: int
    tokens: int
    new: int = 0
    lengths: int = 1
    packed: bool = False


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
    from ..model import anatomy

    device = recipe.place.device
    machine, budget = limits(recipe)
    overhead = known_overhead()
    with torch.random.fork_rng(devices=[]):
        depths: list[int] = []

        def make(blocks: int | None) -> PlannedInference:
            made = PlannedInference(recipe, blocks, patches, head, labels)
            depths.append(len(anatomy.blocks(made.model)[1]))
            made.depth = depths[0]  # the whole model comes first
            return made

        cost = at_whole_depth(make, lambda model: model.trace(work))
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
    made = [plan_recipe(stage, **options) for stage in recipes]
    at = max(range(len(made)), key=lambda i: (not made[i].fits, made[i].fast_peak_bytes))
    notes = [f"stage {name}: {gib(one.fast_peak_bytes)} at the peak" for name, one in zip(names, made, strict=True)]
    notes.append(f"the plan is of stage {names[at]}, which needs the most")
    return dataclasses.replace(made[at], notes=[*made[at].notes, *notes]), recipes[at]


def plan_recipe(recipe: Recipe, **options: Any) -> Plan:
    """What `trimtab plan` shows: the plan of training, or of a reply where the recipe trains nothing. Of a patch that
    counts tokens, it also says what the peak would be without it."""
    if recipe.stages:
        return plan_largest(recipe, **options)[0]
    if recipe.trains or not recipe.patches:
        made = plan(recipe, **options)
        made = made.settled(recipe.place.device)
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
    work = Work(1, length, NEW if head == "causal-lm" else 0)
    if work.new and recipe.model.precision == "nf4" and recipe.place.device.type == "cpu":
        from ..model.packed import available

        work = dataclasses.replace(work, packed=available())
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


class PlannedInference(PlannedModel):
    """A recipe's model with `patches`, for inference."""

    depth: int  # blocks of the whole model

    def __init__(
        self, recipe: Recipe, blocks: int | None, patches: Sequence[Patch], head: str, labels: int | None
    ):  # fmt: skip
        from ..contracts import When

        super().__init__(recipe, blocks, False, head, labels)
        self.patch(patches, When.LOAD)
        self.patch([patch for patch in patches if patch.when is not When.INFER], When.TRAIN)
        self.patch([patch for patch in patches if patch.when is When.INFER], When.INFER)
        self.model.eval()

    def complete(self, cost: StepCost) -> StepCost:
        self.with_tables(cost.peaks)
        carried = max((store.carried for store in self.stores), default=0)
        return dataclasses.replace(cost, copied_ahead=carried, notes=tuple(self.notes), take=self.take)

    def trace(self, work: Work) -> StepCost:
        """The cost of `work`, before `complete`."""
        from ..cost.trace import trace_inference
        from ..engine.prepare import training_forward

        kept = self.kept()
        run = self._reply if work.new else self._evaluate
        ready = contextlib.nullcontext()
        if not work.new and self.head == "causal-lm":
            ready = training_forward(self.model, self.recipe.load_objective(), self.recipe)
        with ready:
            cost = trace_inference(self.model, self.kind_of, lambda trace: run(trace, work))
        if work.new:  # matrix products of single tokens have the same shapes in all batches
            cost = dataclasses.replace(cost, product_shapes=self.prompt_shapes)
        self.with_kept(cost.peaks, kept)
        return cost

    def _evaluate(self, trace: Trace, work: Work) -> None:
        from ..cost.trace import TEMPORARIES

        batch = _inputs(work.rows, work.tokens)
        trace.enter("evaluation", TEMPORARIES)
        if self.head == "causal-lm":
            self.model(objective_batch={**batch, "labels": batch["input_ids"]})
        else:
            self.model(**batch)

    def _reply(self, trace: Trace, work: Work) -> None:
        if work.packed:
            self._pack(trace)
        most = getattr(getattr(cache := self._cache(trace), "policy", None), "chunk", 0) or work.tokens
        before = max(0, work.tokens - most)  # tokens of the prompt that earlier chunks have read
        with self._attending(cache, work):
            self._fill(trace, cache, work.rows, before)
            self._pass(trace, "prompt", work.rows, work.tokens - before, cache)
        self.prompt_shapes = len(trace.products)
        cache = self._cache(trace)
        with self._attending(cache, work):
            self._fill(trace, cache, work.rows, work.tokens + work.new - 1)
            self._pass(trace, "reply", work.rows, 1, cache)

    @contextlib.contextmanager
    def _attending(self, cache: Any, work: Work) -> Iterator[None]:
        from ..model.kv_cache import KeptCache, attending

        if isinstance(cache, KeptCache):
            cache.depth = self.depth
            cache.expect([(0, work.tokens)] * work.rows, work.new)
        with attending(self.model, cache):
            yield

    def _fill(self, trace: Trace, cache: Any, rows: int, tokens: int) -> None:
        """Fills the cache in a pass that does not happen like this in a run, and does not count."""
        if tokens:
            self._pass(trace, "", rows, tokens, cache)
            trace.peaks.pop("", None)
            trace.heights.pop("", None)

    def _pack(self, trace: Trace) -> None:
        from ..cost.trace import TEMPORARIES, WEIGHTS
        from ..model import packed

        trace.enter("packing", TEMPORARIES)
        for linear in packed.packable(self.model):
            packed.pack(linear)
            trace.relabel(packed.scales(linear), WEIGHTS)

    def _pass(self, trace: Trace, phase: str, rows: int, tokens: int, cache: Any) -> None:
        from ..cost.trace import TEMPORARIES

        trace.enter(phase, TEMPORARIES)
        batch = _inputs(rows, tokens)
        batch["attention_mask"] = batch["attention_mask"].new_ones(rows, cache.get_seq_length() + tokens)
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        logits = self.model(**batch, past_key_values=cache, use_cache=True, **last).logits[:, -1].float()
        logits.log_softmax(-1)  # as sampling does; greedy search copies them as well

    def _cache(self, trace: Trace) -> Any:
        """A new KV cache whose tensors count as kind CACHE."""
        from transformers import DynamicCache

        from ..contracts import cache_of
        from ..cost.trace import CACHE

        cache = cache_of(self.surgeries) or DynamicCache(config=self.model.config.get_text_config(decoder=True))
        reference = weakref.ref(cache)  # a cycle would keep the cache alive

        def counted(name: str) -> Callable[..., Any]:
            own = getattr(type(cache), name)

            def call(*args: Any, **kwargs: Any) -> Any:
                before, trace.kind = trace.kind, CACHE
                try:
                    return own(reference(), *args, **kwargs)
                finally:
                    trace.kind = before

            return call

        for name in ("update", "attended"):  # the second one evicts
            if hasattr(cache, name):
                setattr(cache, name, counted(name))
        return cache


def _inputs(rows: int, tokens: int) -> dict[str, Any]:
    import torch

    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
