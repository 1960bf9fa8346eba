"""A KV cache of bounded size: after each forward pass, a policy chooses which tokens stay.

transformers' own caches grow with the text, and their attention masks assume that the cached tokens are the last ones
in a row. Here each layer remembers the position of every token that it kept, and computes the mask from these: a query
sees the kept tokens before it, and never padding. Positions are the text's own, also after others were evicted.

Shapes: B rows, H key-value heads, Q new tokens, N cached tokens, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from ..errors import BadInput
from .undisturbed import undisturbed

ATTENTION = "trimtab_kv_cache"  # this module's attention, under transformers' registry
MASK = "trimtab_mask"  # set on the keys that a layer returns: (B, 1, Q, N), True where a query sees a key

Scores = Callable[["BoundedLayer"], Tensor]  # (B, N), higher stays


class BoundedLayer(CacheLayerMixin):
    """One layer's keys and values (B, H, N, D) and their positions (B, N); a negative position is padding."""

    def __init__(self, cache: BoundedCache):
        super().__init__()
        self.cache, self.seen = cache, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.positions = torch.zeros(len(key_states), 0, dtype=torch.int64, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """-> the keys and values that the new tokens attend to; afterwards the policy evicts what exceeds the limit."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new_BQ = self.cache.positions(self.seen, *key_states.shape[:3:2]).to(self.device)
        keys, values = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
        self.positions = torch.cat([self.positions, new_BQ], -1)
        kept_BN, asks_BQ = self.positions[:, None, None, :], new_BQ[:, None, :, None]
        # a padding token sees itself: a query that sees nothing would give NaN, which spreads through the values
        setattr(keys, MASK, (kept_BN <= asks_BQ) & ((kept_BN >= 0) | (kept_BN == asks_BQ)))
        self.seen += key_states.shape[-2]
        self.keys, self.values = keys, values
        self._evict()
        return keys, values

    def _evict(self) -> None:
        if (limit := self.cache.limit) >= self.positions.shape[-1]:
            return
        scores_BN = self.cache.scores(self).masked_fill(self.positions < 0, -torch.inf)
        stay_BN = scores_BN.topk(limit, dim=-1).indices.sort(dim=-1).values
        at = stay_BN[:, None, :, None]
        self.keys = self.keys.gather(-2, at.expand(-1, self.keys.shape[1], -1, self.keys.shape[-1]))
        self.values = self.values.gather(-2, at.expand(-1, self.values.shape[1], -1, self.values.shape[-1]))
        self.positions = self.positions.gather(-1, stay_BN)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that went through it, also those evicted since."""
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.seen, self.is_initialized = 0, False

    def _of_rows(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            self.positions = self.positions.index_select(0, rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._of_rows(beam_idx.to(self.device))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._of_rows(torch.arange(len(self.positions), device=self.device).repeat_interleave(repeats))


class BoundedCache(Cache):
    """`limit`: how many tokens each layer keeps; `scores`: which of them, the highest."""

    def __init__(self, layers: int, limit: int, scores: Scores):
        super().__init__(layers=[BoundedLayer(self) for _ in range(layers)])
        self.limit, self.scores = limit, scores
        self.padding_B: Tensor | None = None  # tokens of padding on the left of each row

    def positions(self, seen: int, rows: int, new: int) -> Tensor:
        """(rows, new): the positions of the next `new` tokens, after `seen`."""
        at = torch.arange(seen, seen + new).expand(rows, new)
        if self.padding_B is None:
            return at
        padding_B = self.padding_B.repeat_interleave(rows // len(self.padding_B))  # beams
        return at - padding_B[:, None].to(at.device)

    @property
    def nbytes(self) -> int:
        layers = (layer for layer in self.layers if layer.is_initialized)
        return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values, layer.positions))


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """SDPA with the mask that the cache's layer has put on `key`."""
    return sdpa_attention_forward(module, query, key, value, getattr(key, MASK), **kwargs)


AttentionInterface.register(ATTENTION, attend)


@contextlib.contextmanager
def attending(model: PreTrainedModel, cache: Cache | None, mask: Tensor | None = None) -> Iterator[None]:
    """Within it, `model` attends through `cache`, if that is one of ours. `mask` (B, T): of prompts, padded left."""
    if not isinstance(cache, BoundedCache):
        yield
        return
    if mask is not None:
        cache.padding_B = (mask == 0).sum(-1)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def require_exact(model: PreTrainedModel, method: str, layers: int) -> None:
    """BadInput where a cache of ours, as long as nothing is evicted, would change what `model` computes.

    So it is with sliding windows, soft caps, ALiBi and other attention that SDPA with a plain causal mask is not.
    """
    asked = f"{method} on {type(model).__name__}"
    if not model.can_generate():
        raise BadInput(asked, "it does not generate text, and has no KV cache", "Leave the patch out")
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(words // 4, words // 2 + 1, (2, 12), generator=torch.Generator().manual_seed(0))
    ids, mask = ids.to(model.device), torch.ones_like(ids, device=model.device)
    mask[1, :3] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = BoundedCache(layers, ids.shape[1], lambda layer: layer.positions.float())
    with undisturbed(model):
        own = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        try:
            with attending(model, cache, mask):
                ours = [
                    model(
                        input_ids=ids[:, part], attention_mask=mask[:, : part.stop], position_ids=places[:, part],
                        past_key_values=cache, use_cache=True,
                    ).logits
                    for part in (slice(0, 8), slice(8, 12))
                ]  # fmt: skip
        except Exception as error:  # a model with a cache or an attention of its own kind
            why = f"its attention takes no such cache ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
            raise BadInput(asked, why, "Leave the patch out") from error
    far = (torch.cat(ours, 1) - own)[mask == 1].float().abs().max() / own.float().abs().max()
    if not far <= (1e-4 if own.dtype == torch.float32 else 5e-2):
        raise BadInput(
            asked, f"its attention is not plain causal attention (logits differ by {far:.1%})", "Leave it out"
        )
