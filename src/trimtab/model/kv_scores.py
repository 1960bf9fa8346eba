"""Which tokens of a KV cache matter: attention of the newest queries, and the split of a budget over layers.

Shapes: H key-value heads, G query heads that share one, A = H G, W newest queries, N tokens that are kept, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .kv_rows import Row

BLOCK = 4096  # keys whose attention is computed at a time


@dataclass
class Attention:
    """How the newest queries of a row attend to its tokens, in fp32."""

    mean_AN: Tensor  # over the queries
    variance_AN: Tensor  # over the queries, unbiased
    entropy: Tensor  # (): -sum A log(A + 1e-10) over heads, queries and the tokens before the window
    variance: Tensor  # (): sum of the variance over heads and the tokens before the window


def window_attention(row: Row, scale: float, window: int) -> Attention:
    """The attention A = softmax(Q K^T scale) of the newest queries, causal among themselves.

    Keys are processed in blocks: never more than (G W, BLOCK) numbers of A are held.
    """
    queries, positions, keys = row.queries, row.positions, row.keys
    assert queries is not None, "its policy asks for queries"
    (_, width, _), (heads, length) = queries.shape, positions.shape
    asks = torch.arange(row.seen - width, row.seen, device=positions.device)
    before = row.seen - window
    means, variances, entropies, sums = [], [], [], []
    for head in range(heads):
        q = queries.view(heads, -1, *queries.shape[1:])[head].float() * scale  # (G, W, D)

        def logits(at: int, head: int = head, q: Tensor = q) -> Tensor:
            there = positions[head, None, at : at + BLOCK]
            unseen = there > asks[:, None]
            if row.sliding is not None:
                unseen |= there <= asks[:, None] - row.sliding
            return (q @ keys[head, at : at + BLOCK].float().T).masked_fill(unseen, -torch.inf)

        blocks = range(0, length, BLOCK)
        total = torch.stack([logits(at).logsumexp(-1) for at in blocks]).logsumexp(0)[..., None]  # (G, W, 1)
        mean, variance = [], []
        for at in blocks:
            share = (logits(at) - total).exp()
            spread = share.var(1) if width > 1 else torch.zeros_like(share[:, 0])
            mean.append(share.mean(1))
            variance.append(spread)
            old = positions[head, at : at + BLOCK] < before
            entropies.append((-(share * (share + 1e-10).log()).sum((0, 1)) * old).sum())
            sums.append((spread.sum(0) * old).sum())
        means.append(torch.cat(mean, -1))
        variances.append(torch.cat(variance, -1))
    return Attention(torch.cat(means), torch.cat(variances), torch.stack(entropies).sum(), torch.stack(sums).sum())


def pooled(scores: Tensor, kernel: int) -> Tensor:
    """The average of each score and its neighbours, (..., N); beyond the ends are zeros."""
    flat = scores.reshape(-1, 1, scores.shape[-1])
    return F.avg_pool1d(flat, kernel, stride=1, padding=kernel // 2).view(scores.shape)


def per_group(scores_AN: Tensor, heads: int) -> Tensor:
    """-> (H, N): the mean over the query heads that share a key-value head."""
    return scores_AN.unflatten(0, (heads, -1)).mean(1)


def water_filling(
    preferences: Sequence[float], least: Sequence[int], most: Sequence[int], total: int, up: bool = False
) -> list[int]:
    """-> tokens per layer: clip(x p, least, most), with x such that the sum is `total`, rounded to it exactly; `up`:
    each rounded up.

    `most` is at least `least`. If all of `most` is less than `total`, it is `most`. With more layers x only falls, so a
    layer's share never grows when another is added, which CAKE's cascade relies on (proposition 1).
    """
    if sum(most) <= total:
        return list(most)
    if sum(least) >= total:
        return list(least)
    wanted = [p if math.isfinite(p) and p > 0 else 0.0 for p in preferences]
    wanted = [max(p, 1e-9 * max(wanted)) or 1.0 for p in wanted]

    def filled(x: float) -> list[float]:
        return [min(max(x * p, low), high) for p, low, high in zip(wanted, least, most, strict=True)]

    bends = sorted({end / p for p, *ends in zip(wanted, least, most, strict=True) for end in ends})
    at = next(i for i, bend in enumerate(bends) if sum(filled(bend)) >= total)  # linear in x between two bends
    low, bend = bends[at - 1] if at else 0.0, bends[at]
    ends = sum(filled(low)), sum(filled(bend))
    x = low + (bend - low) * (total - ends[0]) / (ends[1] - ends[0]) if ends[1] > ends[0] else bend
    if up:
        return [min(math.ceil(share - 1e-9), high) for share, high in zip(filled(x), most, strict=True)]
    return _rounded(filled(x), most, total)


def _rounded(shares: list[float], most: Sequence[int], total: int) -> list[int]:
    """Whole numbers with the sum `total` or, if `most` does not allow it, the nearest below: largest remainders."""
    whole = [min(int(share + 1e-9), high) for share, high in zip(shares, most, strict=True)]
    order = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
    left = total - sum(whole)
    for i in order * 2:
        if left > 0 and whole[i] < most[i]:
            whole[i] += 1
            left -= 1
    return whole
