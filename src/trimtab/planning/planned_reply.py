"""The model that a plan of replies traces: a prompt, the last token of a reply with its KV cache, or an evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..recipe import Recipe
from .planned_model import PlannedModel, at_whole_depth

if TYPE_CHECKING:
    from ..contracts import Patch
    from ..cost.trace import StepCost, Trace


@dataclasses.dataclass(frozen=True)
class Work:
    """The largest batch. `new`: tokens generated after it; 0: evaluation only. `lengths`: how many distinct lengths the
    batches have. `packed`: with 4-bit weights in the form for decoding (model/packed.py). `prompts`: rows of the pass
    over the prompts, if each is read once for several replies."""

    rows: int
    tokens: int
    new: int = 0
    lengths: int = 1
    packed: bool = False
    prompts: int | None = None


def packs(recipe: Recipe, new: int) -> bool:
    """Whether replies of `new` tokens are generated with 4-bit weights in the form for decoding, if there is room."""
    if recipe.model.precision != "nf4" or recipe.place.device.type != "cpu":
        return False
    from ..model import packed

    return packed.pays(new) and packed.available()


def reply_cost(
    recipe: Recipe, patches: Sequence[Patch], work: Work, head: str = "causal-lm", labels: int | None = None
) -> StepCost:
    """The cost of `work`. `patches`: those of the adapter and for inference."""
    from ..model import anatomy

    depths: list[int] = []

    def make(blocks: int | None) -> PlannedInference:
        made = PlannedInference(recipe, blocks, patches, head, labels)
        depths.append(len(anatomy.blocks(made.model)[1]))
        made.depth = depths[0]  # the whole model comes first
        return made

    return at_whole_depth(make, lambda model: model.trace(work))


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
        from ..model.kv_cache import chunk_of

        cache = self._cache(trace)
        before = work.tokens - chunk_of(cache, work.tokens)  # tokens of the prompt that earlier chunks have read
        with self._attending(cache, work):
            rows = work.prompts or work.rows
            self._fill(trace, cache, rows, before)
            self._pass(trace, "prompt", rows, work.tokens - before, cache)
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
            with unjudged(cache):
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
        from ..model.sampling import last_logits

        trace.enter(phase, TEMPORARIES)
        batch = _inputs(rows, tokens)
        batch["attention_mask"] = batch["attention_mask"].new_ones(rows, cache.get_seq_length() + tokens)
        logits = self.model(**batch, past_key_values=cache, use_cache=True, **last_logits(self.model)).logits
        logits = logits[:, -1].float()
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


class Unjudged:
    """A KV-cache policy that scores tokens by position, at once. Without values, what stays has the same size with any
    scores, while those of `policy` may take as many operations as there are tokens."""

    def __init__(self, policy: Any):
        self.policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def judge(self, row: Any, scale: float) -> tuple[Any, float]:
        return row.positions.float(), 1.0


@contextlib.contextmanager
def unjudged(cache: Any) -> Iterator[None]:
    """Within it, the policy of a bounded cache is Unjudged."""
    from ..model.kv_cache import KeptCache

    if not isinstance(cache, KeptCache):
        yield
        return
    policy, cache.policy = cache.policy, Unjudged(cache.policy)  # type: ignore[assignment]
    try:
        yield
    finally:
        cache.policy = policy


def _inputs(rows: int, tokens: int) -> dict[str, Any]:
    import torch

    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
