"""GRPO (arXiv 2402.03300): every token of each completion, with TRL's own loss.

    A_i = (R_i - mean(R)) / std(R) of the G completions of a prompt
    J   = 1/G sum_i 1/|y_i| sum_t min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i) - beta KL

The loss, its variants (`training: {loss_type: ...}`) and its corrections are TRL's; rollouts, rewards and the
log-probabilities of the completions are trimtab's (model/logprobs.py). It is the baseline of S-GRPO and T-SPMO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..bases.policy import Policy, Rollouts
from ..model.token_selector import All


@dataclass(frozen=True)
class GRPO(Policy):
    """GRPO with TRL's loss."""

    own_loss: ClassVar[bool] = False
    gradient_reason: ClassVar[str] = (
        "TRL's loss takes the policy itself as the old one, so that forward passes alone see no difference"
    )

    def weights(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        shares_BT = All().select(rollouts.mask).weights()
        return shares_BT * rollouts.advantage[:, None], shares_BT
