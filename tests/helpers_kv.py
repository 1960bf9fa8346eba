"""Generation with an evicting KV cache, written naively: no cache, all tokens are computed anew for each new one.

Each layer and head has a set of tokens that it keeps. A token sees those that were kept when it was read. Which stay is
decided after each pass from plain softmax attention, by the functions in REFERENCES, written from the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

Judged = tuple[Tensor, float]  # scores (H, N), the layer's preference
REFERENCE = "naive_kv_cache"


def mean_of_window(A: Tensor, at: Tensor, seen: int, fields: dict) -> Judged:
    """SnapKV: A (H, G, W, N) attention of the newest W queries; at (H, N) positions."""
    return smooth(A.mean(2), fields.get("kernel", 5)).mean(1), 1.0


def cake(A: Tensor, at: Tensor, seen: int, fields: dict) -> Judged:
    spread = A.var(2) if A.shape[2] > 1 else torch.zeros_like(A[:, :, 0])
    old = (at < seen - fields["window"])[:, None].float()
    H = -(A * (A + 1e-10).log() * old[:, :, None]).sum()
    V = (spread * old).sum()
    score = smooth(A.mean(2) + fields.get("gamma", 200.0) * spread, fields.get("kernel", 5)).mean(1)
    return score, float(H ** (1 / fields.get("tau1", 1.0)) * V ** (1 / fields.get("tau2", 1.0)))


def newest_query(A: Tensor, at: Tensor, seen: int, fields: dict) -> Judged:
    return A[:, :, -1].mean((0, 1)).expand(len(at), -1), 1.0


def sinks(A: Tensor, at: Tensor, seen: int, fields: dict) -> Judged:
    return torch.where(at < fields["sinks"], torch.inf, at.float()), 1.0


CASES = {
    "streaming_llm": {"window": 5, "sinks": 2}, "full_cache": {"bits": 4}, "tova": {"budget": 5},
    "snapkv": {"budget": 7, "window": 2}, "pyramidkv": {"budget": 8, "window": 2, "beta": 4.0},
    "cake": {"budget": 8, "window": 3},
}  # fmt: skip
REFERENCES: dict[str, Callable[..., Judged]] = {
    "streaming_llm": sinks, "snapkv": mean_of_window, "pyramidkv": mean_of_window, "tova": newest_query, "cake": cake,
}  # fmt: skip


def smooth(x: Tensor, kernel: int) -> Tensor:
    half = kernel // 2
    padded = torch.nn.functional.pad(x, (half, half))
    return sum(padded[..., i : i + x.shape[-1]] for i in range(kernel)) / kernel


def split(preferences: Sequence[float], least: Sequence[int], most: Sequence[int], total: int) -> list[int]:
    """clip(x p, least, most) by bisection on x, then largest remainders."""
    if sum(most) <= total:
        return list(most)
    low, high = 0.0, 1e30
    for _ in range(400):
        x = math.sqrt(max(low, 1e-30) * high)
        shares = [min(max(x * p, a), b) for p, a, b in zip(preferences, least, most, strict=True)]
        low, high = (x, high) if sum(shares) < total else (low, x)
    whole = [int(share + 1e-9) for share in shares]
    for i in sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))[: total - sum(whole)]:
        whole[i] += 1
    return whole


class Naive:
    """One text; `total` tokens of all layers may stay, `slack` go at a time. `shares`: known preferences."""

    def __init__(self, name: str, fields: dict, total: int, window: int, floor: int, slack: int, shares=None):
        self.judge, self.fields, self.total = REFERENCES[name], fields, total
        self.window, self.floor, self.slack, self.shares = window, floor, slack, shares
        self.kept: dict[int, list[list[int]]] = {}  # layer -> of each head, positions that are kept
        self.sees: dict[int, list[list[set[int]]]] = {}  # layer -> head -> token -> what it saw
        self.judged: dict[int, Judged] = {}

    def attention(self, module, query, key, value, mask, scaling=None, **kwargs):
        layer, heads, size = module.layer_idx, key.shape[1], key.shape[2]
        sees = self.sees.setdefault(layer, [[] for _ in range(heads)])
        kept = self.kept.setdefault(layer, [[] for _ in range(heads)])
        for head in range(heads):
            start = len(sees[head])
            sees[head] += [set(kept[head]) | set(range(start, at + 1)) for at in range(start, size)]
            kept[head] += range(start, size)
        self.sliding = kwargs.get("sliding_window") or 10**9
        q, out = query[0].unflatten(0, (heads, -1)), []
        for head in range(heads):
            seen = torch.zeros(size, size, dtype=torch.bool)
            for at, what in enumerate(sees[head]):
                seen[at, [other for other in what if other > at - self.sliding]] = True
            logits = (q[head] @ key[0, head].T * scaling).masked_fill(~seen, -torch.inf)
            out.append(logits.softmax(-1) @ value[0, head])
        self._judge(layer, q, key[0], scaling, size)
        return torch.cat(out).transpose(0, 1)[None].contiguous(), None

    def _judge(self, layer: int, q: Tensor, keys: Tensor, scaling: float, size: int) -> None:
        """The attention of the newest queries to what is kept now, causal among themselves."""
        at = torch.tensor(self.kept[layer])
        width = min(size, self.fields.get("window", 1))
        asks = torch.arange(size - width, size)
        A = torch.stack([
            (q[head][:, -width:] @ keys[head][at[head]].T * scaling)
            .masked_fill(at[head] > asks[:, None], -torch.inf)
            .masked_fill(at[head] <= asks[:, None] - self.sliding, -torch.inf).softmax(-1)
            for head in range(len(at))
        ])  # fmt: skip
        scores, preference = self.judge(A, at, size, self.fields)
        self.judged[layer] = scores.masked_fill(at >= size - self.window, torch.inf), preference

    def evict(self, new: int) -> None:
        layers = sorted(self.kept)
        lengths = [len(self.kept[layer][0]) for layer in layers]
        if new == 1 and sum(lengths) <= self.total:  # a prompt's tokens before the sliding window go in any case
            return
        total = self.total - (self.slack * len(layers) if new == 1 else 0)
        windows = [min(length, self.window) for length in lengths]
        most = [max(0, min(length, self.sliding) - window) for length, window in zip(lengths, windows, strict=True)]
        least = [min(length, self.floor) for length in most]
        preferences = self.shares or [self.judged[layer][1] for layer in layers]
        shares = split(preferences, least, most, total - sum(windows))
        for layer, share, window in zip(layers, shares, windows, strict=True):
            best = self.judged[layer][0].topk(share + window, dim=1).indices.sort(1).values.tolist()
            self.kept[layer] = [[kept[i] for i in stay] for kept, stay in zip(self.kept[layer], best, strict=True)]

    def generate(self, model: nn.Module, ids: list[int], new: int, forbidden: int) -> list[int]:
        """Greedy search; -> the new ids."""
        AttentionInterface.register(REFERENCE, self.attention)
        before, made = model.config._attn_implementation, []
        model.set_attn_implementation(REFERENCE)
        try:
            for step in range(new):
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids + made]), use_cache=False).logits[0, -1]
                self.evict(len(ids) if step == 0 else 1)
                logits[forbidden] = -torch.inf
                made.append(int(logits.argmax()))
        finally:
            model.set_attn_implementation(before)
        return made
