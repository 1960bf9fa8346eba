"""The prefix tree of the completions of one prompt, for T-SPMO (arXiv 2504.20834, section on token-specific prefix
matching).

The root is the prompt; a node is a prefix p that some completions share, and its children are the next tokens v. With
the mean reward E[R | p] of the completions through p,

    A(v | p) = E[R | p, v] - E[R | p].

It follows that A is 0 where all completions through p go on with v (only branching nodes train), that
sum_v n(v) A(v | p) = 0 at each node that all its completions leave, and that along a completion the advantages sum to
its reward (the mean over identical completions) minus the group's mean.

`pack` lays several sequences out as one row per group in which a shared prefix occurs once: the forward pass then costs
the nodes of the tree, not the sum of the lengths. A mask lets each token see only its own prefix.

G completions of a prompt, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = 0


@dataclass(frozen=True)
class PrefixTrie:
    """`node`: the node after each token, int64 (G, T), -1 where there is no token; node 0 is the root. `parent`,
    `count`: of each node (N,), the node before it, -1 for the root, and the number of completions through it."""

    node: Tensor
    parent: Tensor
    count: Tensor

    @classmethod
    def of(cls, ids_GT: Tensor, mask_GT: Tensor) -> PrefixTrie:
        """The tree of completions, given from the left, with the mask of their tokens."""
        rows = [ids[: int(size)] for ids, size in zip(ids_GT.tolist(), mask_GT.sum(1).tolist(), strict=True)]
        node_GT = torch.full(ids_GT.shape, -1, dtype=torch.int64)
        nodes, parents = _nodes(rows)
        counts = [0] * len(parents)
        for row, path in enumerate(nodes):
            node_GT[row, : len(path)] = torch.tensor(path, dtype=torch.int64)
            for node in (ROOT, *path):
                counts[node] += 1
        return cls(node_GT, torch.tensor(parents), torch.tensor(counts))

    @property
    def mask(self) -> Tensor:
        """Where the completions have tokens, bool (G, T)."""
        return self.node >= 0

    def values(self, rewards_G: Tensor) -> Tensor:
        """The mean reward of the completions through each node, fp64 (N,)."""
        rewards_G = rewards_G.double().cpu()
        sums_N = torch.zeros(len(self.parent), dtype=torch.float64)
        sums_N[ROOT] = rewards_G.sum()
        rows, _ = self.mask.nonzero(as_tuple=True)
        sums_N.index_add_(0, self.node[self.mask], rewards_G[rows])
        return sums_N / self.count

    def advantages(self, rewards_G: Tensor) -> Tensor:
        """A(v | p) of each token v after its prefix p, fp64 (G, T)."""
        values_N = self.values(rewards_G)
        gain_N = values_N - values_N[self.parent.clamp(min=0)]
        return torch.where(self.mask, gain_N[self.node.clamp(min=0)], 0.0)

    @property
    def branches(self) -> Tensor:
        """The tokens that not all completions through their prefix have, each in the first completion with it; bool
        (G, T). A completion that ends where another goes on is a branch too."""
        parts_N = self.count < self.count[self.parent.clamp(min=0)]
        first_GT = torch.zeros_like(self.mask)
        seen: set[int] = set()
        for row, path in enumerate(self.node.tolist()):
            for at, node in enumerate(path):
                if node >= 0 and node not in seen:
                    seen.add(node)
                    first_GT[row, at] = True
        return first_GT & parts_N[self.node.clamp(min=0)] & self.mask


def _nodes(rows: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """-> the nodes of each row's tokens, and each node's parent (the root's is -1)."""
    children: dict[tuple[int, int], int] = {}
    parents, paths = [-1], []
    for row in rows:
        at, path = ROOT, []
        for token in row:
            found = children.get((at, token))
            if found is None:
                found = children[at, token] = len(parents)
                parents.append(at)
            path.append(at := found)
        paths.append(path)
    return paths, parents


class Packed(NamedTuple):
    """Rows of trees, (R, N) each, padded on the right: token ids; positions (depths in the tree); the column of the
    token before each one; the weights, summed over the rows that share a token; and the mask of what each token sees,
    bool (R, N, N)."""

    ids: Tensor
    positions: Tensor
    parents: Tensor
    weights: Tensor
    sees: Tensor


def pack(
    rows: Sequence[Sequence[int]], weights: Sequence[Sequence[float]], groups: Sequence[int], step: int = 1
) -> Packed:
    """Lays sequences out as one tree per group, padded to a multiple of `step`.

    Of each sequence only what its last weight other than 0 needs is kept; sequences without one are left out.
    `weights`: of each token; a token's log-probability is that after its prefix.
    """
    trees: list[tuple[list[int], list[int], list[float]]] = []
    for name in dict.fromkeys(groups):
        cut, kept = [], []
        for row, weight, group in zip(rows, weights, groups, strict=True):
            size = max((at + 1 for at, value in enumerate(weight) if value), default=0)
            if group == name and size:
                cut.append(list(row[:size]))
                kept.append(weight[:size])
        if not cut:
            continue
        paths, parents = _nodes(cut)
        ids, summed = [0] * len(parents), [0.0] * len(parents)
        for row, weight, path in zip(cut, kept, paths, strict=True):
            for token, value, node in zip(row, weight, path, strict=True):
                ids[node] = token
                summed[node] += value
        trees.append((ids[1:], [parent - 1 for parent in parents[1:]], summed[1:]))
    width = -(-max((len(ids) for ids, _, _ in trees), default=0) // step) * step
    shape = (len(trees), width)
    ids_RN, parents_RN = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    positions_RN, weights_RN = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    sees_RNN = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)  # padding sees itself: no row is empty
    for row, (ids, parents, summed) in enumerate(trees):
        size = len(ids)
        ids_RN[row, :size], weights_RN[row, :size] = torch.tensor(ids), torch.tensor(summed)
        parents_RN[row, :size] = torch.tensor(parents).clamp(min=0)
        for node, parent in enumerate(parents):  # a parent comes before its children
            if parent >= 0:
                sees_RNN[row, node] |= sees_RNN[row, parent]
                positions_RN[row, node] = positions_RN[row, parent] + 1
    return Packed(ids_RN, positions_RN, parents_RN, weights_RN, sees_RNN)
