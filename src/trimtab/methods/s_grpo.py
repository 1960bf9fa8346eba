"""S-GRPO, GRPO on a random part of the tokens (Lee and Tong, arXiv 2504.20834).

    J = 1/G sum_i 1/|T_i| sum_{t in T_i} rho_it A_i - beta KL,    rho = pi / stopgrad(pi)

The first `alpha` tokens of a completion are in T_i; each later one is with probability `p` while |T_i| < `k`. There is
one update per rollout, so rho is 1: no clipping, no log-probabilities of an older policy.

What differs from the paper, and why: tokens after the cap have a smaller chance, so the gradient is not that of all
tokens; `unbiased` weights each token by 1 / (its chance x the completion's length), which makes it so in expectation
(model/token_selector.py). Completions whose advantage is 0 are left out of the forward pass, which ends with the last
selected token; the loss is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..bases.policy import CORRECTIONS, ENTROPY, NO_RATIO, Policy, Rollouts
from ..errors import BadInput
from ..model.token_selector import FirstAndSome


@dataclass(frozen=True)
class SGRPO(Policy):
    """GRPO on a random part of the tokens."""

    ignored: ClassVar[dict[str, str]] = {
        **Policy.ignored, **dict.fromkeys(CORRECTIONS, NO_RATIO),
        **dict.fromkeys(ENTROPY, "S-GRPO selects tokens at random, and its loss has no entropy"),
    }  # fmt: skip

    alpha: int = 50  # the first tokens of each completion
    k: int = 100  # the largest number of tokens of a completion
    p: float = 0.25  # the chance of each later token
    unbiased: bool = False  # weights that make the mean over selections the gradient of all tokens

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= self.k and self.k >= 1):
            have = "alpha must be 0 or more, and k at least alpha and 1"
            raise BadInput(f"s_grpo: alpha: {self.alpha}, k: {self.k}", have, "The paper has alpha 50 and k 100")
        if not 0 <= self.p <= 1:
            raise BadInput(f"s_grpo: p: {self.p}", "it must be between 0 and 1", "The paper has 0.25")
        if self.unbiased and not (self.p > 0 and self.k > self.alpha):
            have = "with p: 0 or k: alpha later tokens are never selected, so no weights make up for them"
            raise BadInput("s_grpo: unbiased: true", have, "Raise p and k, or set unbiased: false")

    def weights(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        shares_BT = FirstAndSome(self.alpha, self.k, self.p).select(rollouts.mask).weights(self.unbiased)
        return shares_BT * rollouts.advantage[:, None], shares_BT

    def counted(self, generations: int, longest: int) -> int:
        return min(self.k, longest)
