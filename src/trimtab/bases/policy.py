"""The base of objectives that raise the reward of the model's own replies, by a policy gradient.

The trainer samples G replies to each prompt and rewards them. An objective says which of their tokens are in the loss
and with which weight; the loss of B completions is

    L = -1/B sum_i sum_t w_it log pi(y_it | x, y_i<t)   (+ beta / B sum_i sum_t s_it KL_it),

whose gradient is that of the paper's ratio pi / stopgrad(pi) times w. KL is Schulman's estimate e^d - d - 1 of the
divergence from the reference, d = log pi_ref - log pi, and s the tokens' shares of a completion's mean.

B completions, or rows of trees of completions (model/prefix_trie.py), T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..contracts import Batch, Loss, Objective
from ..model.logprobs import score_tokens
from ..model.loss import next_token_loss

INPUTS = ("input_ids", "attention_mask", "position_ids")
NO_RATIO = "the policy is updated once per rollout, so its ratio is 1 and nothing is clipped or corrected"
# fields of `training:` that act on the ratio, and on the entropy
CORRECTIONS = ("epsilon", "epsilon_high", "delta", "importance_sampling_level", "num_iterations", "loss_type",
               "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
               "vespo_lambda_neg", "off_policy_mask_threshold")  # fmt: skip
ENTROPY = ("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max",
           "entropy_coef_delta", "entropy_target")  # fmt: skip


class Rollouts(NamedTuple):
    """Completions of several prompts, from the left: `ids` int64 (B, T), `mask` bool (B, T), `advantage` (B,) and
    `group` (B,), the number of each one's prompt."""

    ids: Tensor
    mask: Tensor
    advantage: Tensor
    group: Tensor


@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
    """The model's own loss, with which shortcuts are compared."""

    chunk: int | None = None
    whole: bool = False

    def loss(self, model: PreTrainedModel, batch: Batch, count: Tensor | int | None = None) -> Loss:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return Loss(*next_token_loss(model, inputs, batch["labels"], count, self.chunk, self.whole))


@dataclasses.dataclass(frozen=True)
class Policy(Objective):
    """`chunk`, `whole`: as of causal_lm. The other fields are those of `training:`."""

    trainer: ClassVar[str] = "trimtab.engine.rl_trainer:PolicyTrainer"
    evaluator: ClassVar[str] = "trimtab.inference.rewarded:answer"
    defaults: ClassVar[dict[str, Any]] = {
        "lr_scheduler_type": "constant", "warmup_steps": 0, "per_device_train_batch_size": 8, "num_generations": 8,
        "max_completion_length": 128,
    }  # fmt: skip
    ignored: ClassVar[dict[str, str]] = {"label_smoothing_factor": "the loss has no labels"}
    own_loss: ClassVar[bool] = True  # False: TRL's trainer computes the loss in a run
    packs: ClassVar[bool] = False  # whether completions of a prompt are one tree, with shared prefixes once

    chunk: int | None = None
    whole: bool = False
    temperature: float = 1.0  # in `training:` it is temperature
    beta: float = 0.0  # in `training:` it is beta
    use_bias_correction_kl: bool = True  # in `training:` it is use_bias_correction_kl

    def weights(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """-> w (with the advantage) and s, each fp32 (B, T)."""
        raise NotImplementedError

    def replays(self, generations: int) -> int:
        """How many of a prompt's completions start with a part of another one (model/rollouts.py)."""
        return 0

    def counted(self, generations: int, longest: int) -> int:
        """The largest number of tokens of a completion in the loss; of a packed tree, of all its completions."""
        return longest

    def largest(self, rows: int, generations: int, prompt: int, longest: int) -> dict[str, int]:
        """Rows, tokens and counted tokens of a row in the largest batch of `rows` completions of `longest` tokens.

        Of trees, the largest there can be: each two completions part only at their end.
        """
        together = min(rows, generations)
        if self.packs:
            rows, longest = -(-rows // together), -(-together // 2) * longest
        return {"rows": rows, "tokens": prompt + longest, "counted": self.counted(together, longest)}

    def cross_entropy(self) -> Objective:
        return NextToken(self.chunk, self.whole)

    def loss(self, model: PreTrainedModel, batch: Batch, count: Tensor | int | None = None) -> Loss:
        """`batch`: input_ids, attention_mask and labels (B, T), -100 where a token is not in the loss; `weights`
        (default: 1 over the number of labels in the row); `reference` and `shares` for the divergence. Of trees also
        `position_ids`, `parents` and `sees`, bool (B, T, T). `count`: completions in the mean (default: B)."""
        labels_BT = batch["labels"]
        inputs = {key: batch[key] for key in INPUTS if key in batch}
        if "sees" in batch:
            low = torch.finfo(model.dtype).min
            mask = torch.zeros(batch["sees"].shape, dtype=model.dtype, device=labels_BT.device)
            inputs["attention_mask"] = mask.masked_fill(~batch["sees"], low)[:, None]
        found = score_tokens(
            model, inputs, labels_BT, batch.get("parents"), temperature=self.temperature, chunk=self.chunk,
            whole=self.whole,
        )  # fmt: skip
        if (weights_BT := batch.get("weights")) is None:
            weights_BT = 1.0 / (labels_BT[:, 1:] != -100).sum(1, keepdim=True).clamp(min=1).expand_as(labels_BT)
        total = -(weights_BT[found.rows, found.columns] * found.logp).sum()
        if self.beta and "reference" in batch:
            gap_N = batch["reference"][found.rows, found.columns] - found.logp
            shares_N = batch["shares"][found.rows, found.columns]
            divergence_N = gap_N.exp() - gap_N - 1
            if self.use_bias_correction_kl:  # its gradient is then that of the mean over the policy's own samples
                divergence_N = divergence_N * (found.logp - found.logp.detach()).exp()
            total = total + self.beta * (shares_N * divergence_N).sum()
        seen = torch.as_tensor(len(labels_BT), device=labels_BT.device)
        divisor = seen if count is None else torch.as_tensor(count, device=labels_BT.device)
        value = total / divisor.clamp(min=1)
        if found.balance is not None:
            value = value + found.balance * (1.0 if count is None else seen / divisor.clamp(min=1))
        return Loss(value, torch.zeros_like(seen), seen)

    def example_batch(self, rows: int, tokens: int, args: Any) -> Batch:
        batch = super().example_batch(rows, tokens, args)
        batch["weights"] = torch.zeros(rows, tokens)
        if self.packs:
            del batch["attention_mask"]
            batch["position_ids"] = torch.zeros_like(batch["input_ids"])
            batch["parents"] = torch.zeros_like(batch["input_ids"])
            batch["sees"] = torch.ones(rows, tokens, tokens, dtype=torch.bool)
        elif self.beta:
            batch["reference"], batch["shares"] = (torch.zeros(rows, tokens) for _ in range(2))
        return batch
