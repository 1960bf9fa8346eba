"""Which tokens of sampled completions are in the loss of a policy gradient, and with which probability.

A selector gets the mask of the completions' tokens and chooses some of them:

    All              every token
    FirstAndSome     the first `alpha`, then each with probability `p` while fewer than `k` are chosen: S-GRPO's rule
                     (arXiv 2504.20834)
    UniformK         `k` of them at random
    TopEntropy       the share with the highest entropy, over the whole batch (TRL's top_entropy_quantile)
    TrieBranches     the tokens at which completions of one prompt part: T-SPMO's rule (model/prefix_trie.py)

Each also states the inclusion probability q of every token, so that a sparse gradient can be made unbiased: with
weights 1 / (q L) for a completion of L tokens (Horvitz and Thompson), its mean over all choices is the gradient of all
tokens with weights 1 / L. The paper's weights, 1 / (number of chosen tokens), are biased: tokens after the cap count
less or not at all.

B completions, T tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from .prefix_trie import PrefixTrie


@dataclass(frozen=True)
class Selected:
    """The chosen tokens, bool (B, T); the inclusion probability of every token, fp32 (B, T), 0 where there is no token;
    and the mask of the tokens, bool (B, T)."""

    chosen: Tensor
    probability: Tensor
    mask: Tensor

    def weights(self, unbiased: bool = False) -> Tensor:
        """The weight of each token in its completion's mean, fp32 (B, T), 0 for tokens that are not chosen."""
        if not unbiased:
            return self.chosen.float() / self.chosen.sum(1, keepdim=True).clamp(min=1)
        if bool((self.mask & (self.probability == 0)).any()):
            raise BadInput(
                "unbiased weights of chosen tokens", "some tokens are never chosen, so no weights make up for them",
                "Choose with a probability above 0, or set unbiased: false",
            )  # fmt: skip
        lengths = self.mask.sum(1, keepdim=True).clamp(min=1)
        return torch.where(self.chosen, 1.0 / self.probability.clamp(min=1e-30), 0.0) / lengths


class Selector:
    """Chooses tokens of a batch of completions."""

    def select(self, mask_BT: Tensor, generator: torch.Generator | None = None, **known: Tensor) -> Selected:
        """`mask_BT`: where the completions' tokens are, from the left. `known`: what a selector needs beside it:
        `entropy` (B, T), or `ids` (B, T) with `group` (B,), the prompt of each completion."""
        raise NotImplementedError


@dataclass(frozen=True)
class All(Selector):
    """Every token."""

    def select(self, mask_BT: Tensor, generator: torch.Generator | None = None, **known: Tensor) -> Selected:
        mask_BT = mask_BT.bool()
        return Selected(mask_BT, mask_BT.float(), mask_BT)


@dataclass(frozen=True)
class FirstAndSome(Selector):
    """The first `alpha` tokens, then each with probability `p` while fewer than `k` are chosen (`k` counts the first
    ones too)."""

    alpha: int = 50
    k: int = 100
    p: float = 0.25

    def select(self, mask_BT: Tensor, generator: torch.Generator | None = None, **known: Tensor) -> Selected:
        coins_BT = torch.rand(mask_BT.shape, generator=generator, device=mask_BT.device) < self.p
        return self.with_coins(mask_BT, coins_BT)

    def with_coins(self, mask_BT: Tensor, coins_BT: Tensor) -> Selected:
        """The choice for given random coins, bool (B, T)."""
        mask_BT = mask_BT.bool()
        first_T = torch.arange(mask_BT.shape[1], device=mask_BT.device) < self.alpha
        wanted_BT = coins_BT & ~first_T & mask_BT
        chosen_BT = wanted_BT & (wanted_BT.cumsum(1) <= max(0, self.k - self.alpha)) | (first_T & mask_BT)
        chances_T = _chances(mask_BT.shape[1], self.alpha, self.k, self.p).to(mask_BT.device)
        return Selected(chosen_BT, chances_T * mask_BT, mask_BT)


@functools.lru_cache(maxsize=32)
def _chances(tokens: int, alpha: int, k: int, p: float) -> Tensor:
    """The inclusion probability of each position under `FirstAndSome`, fp32 (tokens,): 1 for the first `alpha`, then
    p P(fewer than k - alpha of the positions between were chosen), from the distribution of that number."""
    room = max(0, k - alpha)
    found = torch.ones(tokens, dtype=torch.float64)
    counts = torch.zeros(room + 1, dtype=torch.float64)  # P(so many are chosen); the last: the cap is reached
    counts[0] = 1.0
    for at in range(min(alpha, tokens), tokens):
        found[at] = p * counts[:-1].sum()
        moved = counts[:-1] * p
        counts[:-1] -= moved
        counts[1:] += moved
    return found.float()


@dataclass(frozen=True)
class UniformK(Selector):
    """`k` tokens of each completion at random, all of a shorter one."""

    k: int = 100

    def select(self, mask_BT: Tensor, generator: torch.Generator | None = None, **known: Tensor) -> Selected:
        mask_BT = mask_BT.bool()
        keys_BT = torch.rand(mask_BT.shape, generator=generator, device=mask_BT.device).masked_fill(~mask_BT, 2.0)
        rank_BT = keys_BT.argsort(1).argsort(1)
        lengths_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
        chance_BT = (self.k / lengths_B1).clamp(max=1.0) * mask_BT
        return Selected((rank_BT < self.k) & mask_BT, chance_BT.float(), mask_BT)


@dataclass(frozen=True)
class TopEntropy(Selector):
    """The `share` of the batch's tokens with the highest `entropy` (nats, (B, T)). Nothing is drawn."""

    share: float = 0.2

    def select(self, mask_BT: Tensor, generator: torch.Generator | None = None, **known: Tensor) -> Selected:
        mask_BT, entropy_BT = mask_BT.bool(), known["entropy"].float()
        if not mask_BT.any():
            return Selected(mask_BT, mask_BT.float(), mask_BT)
        chosen_BT = (entropy_BT >= torch.quantile(entropy_BT[mask_BT], 1.0 - self.share)) & mask_BT
        return Selected(chosen_BT, chosen_BT.float(), mask_BT)


@dataclass(frozen=True)
class TrieBranches(Selector):
    """The tokens at which completions of one prompt part, each (prefix, next token) once: in the first completion that
    has it. Needs `ids` (B, T) and `group` (B,). Nothing is drawn."""

    def select(self, mask_BT: Tensor, generator: torch.Generator | None = None, **known: Tensor) -> Selected:
        mask_BT, chosen_BT = mask_BT.bool(), torch.zeros_like(mask_BT, dtype=torch.bool)
        for rows in groups_of(known["group"]):
            trie = PrefixTrie.of(known["ids"][rows], mask_BT[rows])
            chosen_BT[rows] = trie.branches.to(mask_BT.device)
        return Selected(chosen_BT, chosen_BT.float(), mask_BT)


def groups_of(group_B: Tensor) -> list[Tensor]:
    """The rows of each group, in the order of their first row."""
    names = dict.fromkeys(group_B.tolist())
    return [(group_B == name).nonzero().squeeze(1) for name in names]
