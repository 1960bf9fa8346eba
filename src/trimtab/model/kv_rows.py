"""The tokens that one layer keeps of one text: keys, values and positions, in 16 (or 32), 8 or 4 bits.

The buffers are longer than what they hold, so that a new token is written in place and nothing is concatenated. In 8
and 4 bits, each group of 32 neighbouring values of a head is stored as integers with a scale and a least value.

Shapes: H key-value heads, G query heads that share one of them, N tokens that are kept, T new tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 32  # values that share a scale, where the head size is a multiple of it
GROWTH = 8  # a full buffer grows by this part of it
SPARE = 64  # tokens beyond a sliding window that may stay
LEVELS = {8: 255, 4: 15}


class Row:
    """Keys and values (H, N, D) of one text in one layer, and the position of each token in the text, (H, N).

    Heads may keep different tokens. The new tokens of a pass are the last ones, in order; others may be in any order.
    """

    def __init__(self, bits: int, padding: int = 0, prompt: int = 0, expected: int = 0):
        self.bits, self.expected = bits, expected  # `expected`: tokens to reserve memory for
        self.padding, self.prompt = padding, prompt  # tokens before the prompt, and in it; 0: unknown
        self.parts: dict[str, Tensor] = {}  # buffers (H, capacity, width)
        self.length = 0  # N
        self.seen = 0  # tokens of the text so far, evicted ones included
        self.new = 0  # of these, tokens of the current pass
        self.sliding: int | None = None  # a token attends to so many tokens, itself among them; None: to all
        self.queries: Tensor | None = None  # (H G, up to the window, D): those of the newest tokens
        self.scores: Tensor | None = None  # (H, N) while a prompt is read
        self.preference: float | None = None  # the layer's share of the budget, before it is normalised

    def append(self, keys_HTD: Tensor, values_HTD: Tensor) -> None:
        heads, new = keys_HTD.shape[:2]
        self.dtype = keys_HTD.dtype
        at = torch.arange(self.seen, self.seen + new, dtype=torch.int32, device=keys_HTD.device)
        coded = {**self._coded("k", keys_HTD), **self._coded("v", values_HTD), "at": at.expand(heads, new)[..., None]}
        if not self.parts or self.length + new > self.capacity:
            self._move(coded, self.length + new, None)
        for name, part in coded.items():
            self.parts[name][:, self.length : self.length + new].copy_(part)
        self.length, self.seen, self.new = self.length + new, self.seen + new, new

    def _move(self, like: dict[str, Tensor], needed: int, stay_HN: Tensor | None) -> None:
        """Copies what is kept to new buffers for `needed` tokens and more."""
        size = needed
        if stay_HN is None:
            more = needed // GROWTH if needed == self.length + 1 > self.expected else 0
            size = max(needed + more, self.expected)
        old, self.parts, like = self.parts, {}, dict(like)
        for name in list(like):
            part = like.pop(name)
            self.parts[name] = new = part.new_empty(part.shape[0], size, part.shape[2])
            if stay_HN is not None:
                at = stay_HN[..., None].expand(-1, -1, part.shape[2])
                torch.gather(old.pop(name), 1, at, out=new[:, : stay_HN.shape[1]])
            elif old:
                new[:, : self.length] = old.pop(name)[:, : self.length]

    def keep(self, stay_HN: Tensor, room: int) -> None:
        """Evicts all tokens but those at the indices `stay_HN`, ascending; leaves room for `room` new ones."""
        stay_HN = stay_HN.to(next(iter(self.parts.values())).device)
        if self.scores is not None:
            self.scores = self.scores.gather(1, stay_HN)
        self._move(self.parts, stay_HN.shape[1] + room, stay_HN)
        self.length = stay_HN.shape[1]

    def forget(self) -> None:
        """Evicts the tokens that no later one will see, if they are many."""
        if self.sliding is not None and self.length > self.sliding + max(SPARE, self.sliding // GROWTH):
            stay = torch.arange(self.length - self.sliding + 1, self.length)
            self.expected = 0
            self.keep(stay.expand(self.parts["at"].shape[0], -1), SPARE)

    def drop_one(self, gone_H: Tensor) -> None:
        """Evicts the token at index `gone_H` of each head: the newest one takes its slot."""
        for part in self.parts.values():
            at = gone_H[:, None, None].expand(-1, 1, part.shape[2])
            part.scatter_(1, at, part[:, self.length - 1 : self.length].clone())
        self.length -= 1

    @property
    def capacity(self) -> int:
        return self.parts["at"].shape[1]

    @property
    def keys(self) -> Tensor:
        return self._decoded("k")

    @property
    def values(self) -> Tensor:
        return self._decoded("v")

    @property
    def positions(self) -> Tensor:
        return self.parts["at"][:, : self.length, 0]

    def visible(self, asks_W: Tensor) -> Tensor:
        """(H, W, N): which tokens the queries at these positions see."""
        at, asks = self.positions[:, None, :], asks_W[None, :, None]
        seen = at <= asks
        return seen if self.sliding is None else seen & (at > asks - self.sliding)

    @property
    def nbytes(self) -> int:
        beside = [t for t in (self.queries, self.scores) if t is not None]
        return sum(t.nbytes for t in [*self.parts.values(), *beside])

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in this layer."""
        return sum(part.shape[0] * part.shape[2] * part.element_size() for part in self.parts.values())

    def copy(self) -> Row:
        new = Row(self.bits)
        vars(new).update({k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(self).items()})
        new.parts = {name: part.clone() for name, part in self.parts.items()}
        return new

    # --- fewer bits --------------------------------------------------------------------------------------------------

    def _coded(self, name: str, x_HTD: Tensor) -> dict[str, Tensor]:
        if self.bits not in LEVELS:
            return {name: x_HTD}
        heads, new, width = x_HTD.shape
        grouped = x_HTD.float().unflatten(2, (-1, GROUP if width % GROUP == 0 else width))
        low, high = grouped.amin(-1), grouped.amax(-1)
        scale = ((high - low) / LEVELS[self.bits]).half()
        low = low.half()
        codes = (grouped - low.float()[..., None]) / scale.float().clamp(min=1e-12)[..., None]
        codes = codes.round().clamp(0, LEVELS[self.bits]).to(torch.uint8).view(heads, new, width)
        if self.bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        return {name: codes, f"{name}_scale": scale, f"{name}_low": low}

    def _decoded(self, name: str) -> Tensor:
        codes = self.parts[name][:, : self.length]
        if self.bits not in LEVELS:
            return codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(2)
        scale, low = (self.parts[f"{name}_{kind}"][:, : self.length].float() for kind in ("scale", "low"))
        values = codes.unflatten(2, (scale.shape[2], -1)) * scale[..., None] + low[..., None]
        return values.flatten(2).to(self.dtype)


def attention(query_ATD: Tensor, row: Row, scale: float | None) -> Tensor:
    """-> (A, T, D): the T newest tokens, with A = H G query heads, attend to what `row` keeps.

    Each sees all tokens before the new ones (those within the layer's sliding window), and the new ones up to itself.
    Grouped heads read views, not copies.
    """
    keys, values = row.keys, row.values
    (many, new, _), (heads, length, _) = query_ATD.shape, keys.shape
    mask = None
    if row.sliding is not None and row.seen > row.sliding:
        asks = torch.arange(row.seen - new, row.seen, device=query_ATD.device)
        mask = row.visible(asks)[:, None]  # (H, 1, T, N)
    if new == 1:  # the heads of a group act as so many queries of one head: keys and values are read once
        grouped = query_ATD.view(1, heads, many // heads, -1)
        mask = None if mask is None else mask.view(1, heads, 1, length)
        return F.scaled_dot_product_attention(grouped, keys[None], values[None], mask, scale=scale).view(many, 1, -1)
    query = query_ATD.unflatten(0, (heads, -1))
    keys, values = (x[:, None].expand(-1, many // heads, -1, -1) for x in (keys, values))
    if mask is None and new < length:
        mask = torch.ones(new, length, dtype=torch.bool, device=query.device).tril(length - new)
    out = F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, is_causal=mask is None)
    return out.flatten(0, 1)
