"""A KV cache within a budget: a policy chooses which tokens stay, and each layer may keep another number of them.

transformers' caches grow with the text and are concatenated at each token, and one attention mask serves all layers.
Here each layer keeps the tokens of each row (text) apart, without padding, and an attention function of our own attends
to them. It also sees the queries, which most policies need. Positions are those in the text, even after eviction.

A prompt is read in one pass or in chunks. After each layer has attended, its tokens beyond its share are evicted, so
that the peak is the budget and one layer's chunk. Where the shares depend on what a layer attends to, those reached
before share the whole budget until the next one is reached (CAKE, section 4.3). While tokens are generated, the budget
is divided anew whenever it is full.

Shapes: B rows, A query heads, H key-value heads, T new tokens, N kept tokens, D head size, L layers.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_utils import AttentionInterface

from ..errors import BadInput
from ..foreign import FakeTensor
from .kv_rows import Row, attention
from .kv_scores import water_filling
from .undisturbed import undisturbed

ATTENTION = "trimtab_kv_cache"  # this module's attention, under transformers' registry
LAYER = "trimtab_layer"  # set on the keys that a layer returns


class Policy(Protocol):
    """What chooses the tokens that stay: `bases.cache.CachePolicy`."""

    bits: int  # of a stored number: 16 (as computed), 8 or 4
    window: int  # newest tokens that always stay
    queries: int  # newest queries of each layer that `judge` needs
    slack: int  # tokens that are evicted at a time while tokens are generated
    chunk: int  # tokens of a prompt that are read at a time; 0: all
    floor: int  # tokens before the window that each layer keeps at least
    bounded: bool  # whether tokens are ever evicted

    def tokens(self, row: Row, layers: int) -> int:
        """The budget of a text in tokens, over all layers, of which `row` is one."""

    def shares(self, layers: int) -> Sequence[float] | None:
        """The preference of each layer if it is known beforehand."""

    def judge(self, row: Row, scale: float) -> tuple[Tensor, Tensor | float]:
        """-> scores (H, N), higher stays; and the layer's preference."""


class KeptLayer(CacheLayerMixin):
    """One layer: the Row of each text."""

    def __init__(self, cache: KeptCache, number: int):
        super().__init__()
        self.cache = weakref.proxy(cache)  # a cycle would keep its tensors until Python looks for cycles
        self.number, self.seen, self.rows = number, 0, list[Row]()
        self.scale = 1.0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        many, known = len(key_states), self.cache.prompts  # beams repeat each prompt
        texts = [known[i * len(known) // many] if known else (0, 0) for i in range(many)]
        self.rows = [Row(self.cache.policy.bits, *text, self.cache.expected) for text in texts]
        self.width = value_states.shape[-1]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values (B, H, T, D) without padding, and returns them, marked for `attend`."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            have = "it has no backward pass"
            raise BadInput("a gradient through a bounded KV cache", have, "Use torch.no_grad(), or train without it")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        for row, keys, values in zip(self.rows, key_states, value_states, strict=True):
            start = min(new, max(0, row.padding - self.seen))
            row.append(keys[:, start:], values[:, start:])
        self.seen += new
        setattr(key_states, LAYER, self)
        return key_states, value_states

    def attend(self, query_BATD: Tensor, scale: float | None, sliding: int | None = None) -> Tensor:
        """-> (B, T, A, D); zeros at padding. Then tokens beyond the budget are evicted."""
        self.scale = query_BATD.shape[-1] ** -0.5 if scale is None else scale
        new, wanted = query_BATD.shape[2], self.cache.policy.queries
        out = query_BATD.new_zeros(*query_BATD.shape[:3], self.width).transpose(1, 2)
        for number, row in enumerate(self.rows):
            row.sliding = sliding
            if row.new:
                query = query_BATD[number, :, new - row.new :]
                out[number, new - row.new :] = attention(query, row, scale).transpose(0, 1)
                if wanted:
                    before = query[:, :0] if row.queries is None else row.queries
                    row.queries = torch.cat([before[:, max(0, before.shape[1] + row.new - wanted) :],
                                             query[:, -wanted:]], 1)  # fmt: skip
        self.cache.attended(self.number, new)
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Number of tokens seen, including padding and evicted ones."""
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.seen, self.is_initialized, self.rows = 0, False, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            used: set[int] = set()
            again = lambda i: i in used or used.add(i)  # noqa: E731
            self.rows = [self.rows[i].copy() if again(i) else self.rows[i] for i in beam_idx.tolist()]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.rows)).repeat_interleave(repeats))


class KeptCache(Cache):
    """A cache whose tokens `policy` chooses."""

    def __init__(self, layers: int, policy: Policy):
        super().__init__(layers=[KeptLayer(self, number) for number in range(layers)])
        self.policy, self.depth = policy, layers  # a plan's model may have fewer layers than the budget is for
        self.expected = 0  # tokens of the longest text; memory is reserved for them if the policy is not bounded
        self.prompts: list[tuple[int, int]] = []  # of each text: tokens of padding on its left, tokens of the prompt

    def expect(self, prompts: Sequence[tuple[int, int]], new: int = 0) -> None:
        """Before the first pass: the prompts to come, (padding, tokens) each, and how many tokens may follow."""
        self.prompts = list(prompts)
        if not self.policy.bounded:
            self.expected = max((tokens for _, tokens in prompts), default=0) + new

    def attended(self, number: int, new: int) -> None:
        """Layer `number` has attended to `new` tokens more: evict what is beyond the budget."""
        if not self.policy.bounded:
            for row in self.layers[number].rows:
                row.forget()
            return
        if new == 1 and number < len(self.layers) - 1:
            return
        for at, own in enumerate(self.layers[number].rows):
            if own.new == 0:
                continue
            rows = [layer.rows[at] for layer in self.layers if layer.rows]
            total = self.policy.tokens(rows[0], self.depth) * len(self.layers) // self.depth
            if new > 1:
                self._of_prompt(rows, number, total)
            elif sum(row.length for row in rows) > total:
                for row, layer in zip(rows, self.layers, strict=True):
                    self._judge(row, layer.scale)
                self._divide(rows, total - self.policy.slack * len(rows), len(rows))
                for row in rows:
                    row.scores = None

    def _of_prompt(self, rows: Sequence[Row], number: int, total: int) -> None:
        """Divides the budget of a text among the layers up to `number`, which has just attended to a chunk."""
        layers = len(self.layers)
        reached, later = rows[: number + 1], rows[number + 1 :]
        self._judge(rows[number], self.layers[number].scale)
        if self.policy.shares(layers) is not None:  # the layers before it have their shares
            self._divide(reached, total, layers, first=number)
        else:
            self._divide(reached, total - sum(row.length for row in later), len(reached))
        if number == layers - 1:
            for row in rows:
                row.scores = None

    def _judge(self, row: Row, scale: float) -> None:
        scores, preference = self.policy.judge(row, scale)
        row.scores = scores.masked_fill(row.positions >= row.seen - self.policy.window, torch.inf)
        row.preference = 1.0 if isinstance(scores, FakeTensor) else float(preference)

    def _divide(self, rows: Sequence[Row], total: int, layers: int, first: int = 0) -> None:
        """Divides `total` tokens among `layers` layers, those in `rows` first, and evicts from row `first` on.

        A layer that has not attended yet counts like the last one that has.
        """
        known = self.policy.shares(len(self.layers))
        preferences = list(known) if known is not None else [row.preference or 0.0 for row in rows]
        lengths = [row.length for row in rows] + [rows[-1].length] * (layers - len(rows))
        windows = [min(length, self.policy.window) for length in lengths]
        useful = [row.sliding or length for row, length in zip(rows, lengths, strict=False)]
        useful += lengths[len(rows) :]
        most = [max(0, min(n, of) - window) for n, of, window in zip(lengths, useful, windows, strict=True)]
        least = [min(length, self.policy.floor) for length in most]
        shares = water_filling(preferences[:layers], least, most, total - sum(windows), layers < len(self.layers))
        room = self.policy.slack + 1 if rows[-1].new == 1 else 1
        for row, share, window in list(zip(rows, shares, windows, strict=False))[first:]:
            if share + window < row.length:
                self._evict(row, share + window, room)
            row.expected = row.length + room  # it grows no further before the budget is divided again

    def _evict(self, row: Row, share: int, room: int) -> None:
        assert row.scores is not None
        if row.length - share == 1 and self.policy.slack == 0:  # the order of the others does not matter to it
            row.drop_one(row.scores[:, : row.length].argmin(1))
        else:
            row.keep(row.scores.topk(share, dim=1).indices.sort(1).values, room)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for layer in self.layers for row in layer.rows)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """An attention function of transformers: the layer of the cache that marked `key` attends."""
    layer: KeptLayer | None = getattr(key, LAYER, None)
    if layer is None:
        raise ValueError(f"{type(module).__name__} attends to something else than the keys that its cache returned")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} caps its logits or has attention sinks of its own")
    return layer.attend(query, kwargs.get("scaling"), kwargs.get("sliding_window")), None


AttentionInterface.register(ATTENTION, attend)


@contextlib.contextmanager
def attending(model: PreTrainedModel, cache: Cache | None, mask: Tensor | None = None, new: int = 0) -> Iterator[None]:
    """Within it, `model` attends through `cache` if that is a KeptCache. `mask` (B, T): of left-padded prompts; `new`:
    how many tokens may follow them."""
    if not isinstance(cache, KeptCache):
        yield
        return
    if mask is not None:
        cache.expect([((row == 0).sum().item(), (row != 0).sum().item()) for row in mask], new)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def chunk_of(cache: Cache | None, tokens: int) -> int:
    """How many tokens of a prompt of `tokens` are read at a time."""
    return min(tokens, cache.policy.chunk or tokens) if isinstance(cache, KeptCache) else tokens


class _Whole:
    """The policy that keeps everything."""

    bits, bounded = 16, False
    queries = 1


@torch.no_grad()
def require_exact(model: PreTrainedModel, method: str, layers: int) -> Row:
    """-> the first layer's Row of a short text. BadInput if a KeptCache changes what `model` computes even if nothing
    is evicted.

    This is so with soft caps, ALiBi and other attention than SDPA with a causal mask or a sliding window.
    """
    asked = f"{method} on {type(model).__name__}"
    if not model.can_generate():
        raise BadInput(asked, "it does not generate text, and has no KV cache", "Leave the patch out")
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    if other := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise BadInput(asked, f"some of its layers have {other[0].replace('_', ' ')}", "Leave the patch out")
    words = config.vocab_size
    ids = torch.randint(words // 4, words // 2 + 1, (2, 12), generator=torch.Generator().manual_seed(0))
    ids, mask = ids.to(model.device), torch.ones_like(ids, device=model.device)
    mask[1, :3] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = KeptCache(layers, _Whole())  # type: ignore[arg-type]
    with undisturbed(model):
        own = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        try:
            with attending(model, cache, mask):
                ours = [
                    model(
                        input_ids=ids[:, part], attention_mask=mask[:, : part.stop], position_ids=places[:, part],
                        past_key_values=cache, use_cache=True,
                    ).logits
                    for part in (slice(0, 8), slice(8, 11), slice(11, 12))
                ]  # fmt: skip
        except Exception as error:  # a model with its own kind of cache or attention
            why = f"its attention rejects such a cache ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
            raise BadInput(asked, why, "Leave the patch out") from error
    gap = (torch.cat(ours, 1) - own)[mask == 1].float().abs().max() / own.float().abs().max()
    if not gap <= (1e-4 if own.dtype == torch.float32 else 5e-2):
        raise BadInput(
            asked, f"its attention is not plain causal attention (logits differ by {gap:.1%})", "Leave it out"
        )
    window = getattr(config, "sliding_window", None)
    for number, layer in enumerate(cache.layers):
        slides = kinds[number] == "sliding_attention" if kinds else window is not None
        if (layer.rows[0].sliding is not None) != slides:  # it reaches the mask alone, which this attention never sees
            raise BadInput(
                asked, f"layer {number} does not tell its attention about its sliding window", "Leave it out"
            )
    return cache.layers[0].rows[0]
