"""T-SPMO, token-specific prefix matching (Lee and Tong, arXiv 2504.20834).

    A(v | p) = E[R | p, v] - E[R | p]         over the completions of a prompt that start with the prefix p
    J = 1/|U| sum_{(p, v) in U} rho(v | p) A(v | p),    rho = pi / stopgrad(pi)

U are the distinct pairs of a prefix and a next token at which the completions part; everywhere else A is 0. So credit
goes to the few tokens (below 5 %) that decided between better and worse completions (model/prefix_trie.py).

What differs from the paper, and why: U has only the pairs of branching nodes. The others have A = 0, and in the mean
they would only scale the step by the length of the completions. The forward pass runs over the tree, shared prefixes
once, up to the last token in U. Rewards may be scaled by their deviation (`training: {scale_rewards: group}`); the
default is the paper's plain reward. There is no divergence term. Replay (`replay`) restarts within the replies of the
same rollout, at random tokens, rather than within those of an earlier one, which an older policy sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..bases.policy import CORRECTIONS, ENTROPY, NO_RATIO, Policy, Rollouts
from ..errors import BadInput
from ..model.prefix_trie import PrefixTrie
from ..model.token_selector import groups_of


@dataclass(frozen=True)
class TSPMO(Policy):
    """Credit to the tokens at which completions part."""

    packs: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Any]] = {**Policy.defaults, "scale_rewards": "none"}
    ignored: ClassVar[dict[str, str]] = {
        **Policy.ignored, **dict.fromkeys(CORRECTIONS, NO_RATIO),
        **dict.fromkeys(("beta", "use_bias_correction_kl"), "T-SPMO has no divergence term"),
        **dict.fromkeys(ENTROPY, "T-SPMO selects the tokens at which completions part"),
    }  # fmt: skip

    replay: float = 0.0  # share of a prompt's replies that restart within another one, up to 0.5; for long replies

    def __post_init__(self) -> None:
        if not 0 <= self.replay <= 0.5:
            have = "it is a share of the replies, and as many at least must be new"
            raise BadInput(f"t_spmo: replay: {self.replay}", have, "Give 0 to 0.5")

    def replays(self, generations: int) -> int:
        return int(self.replay * generations)

    def weights(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """w = A(v | p) G / |U|, so that the mean over the completions of a prompt is the mean over U."""
        made_BT = torch.zeros(rollouts.mask.shape)
        for rows in groups_of(rollouts.group):
            trie = PrefixTrie.of(rollouts.ids[rows].cpu(), rollouts.mask[rows].cpu())
            branches = trie.branches
            share = len(rows) / max(1, int(branches.sum()))
            gains = torch.where(branches, trie.advantages(rollouts.advantage[rows]), 0.0)
            made_BT[rows.cpu()] = (gains * share).float()
        made_BT = made_BT.to(rollouts.advantage.device)
        return made_BT, (made_BT != 0).float()

    def counted(self, generations: int, longest: int) -> int:
        return 2 * (generations - 1)
