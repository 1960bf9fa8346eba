"""Causal language modelling: the mean negative log-likelihood of the next token, over the labels that count.

The logits are computed in chunks (model/loss.py), unless the head is of an unknown form (model/head.py). Prompt tokens
have the label -100 and are neither projected nor counted.

`BlackBox` is one minus a metric of the model's answers, for steppers that need no gradient (MeZO, section 3.3):

    accuracy      share of the label tokens that the model predicts, each after the tokens before it
    exact_match   share of the rows whose greedy reply is the labels, token for token
    f1            F1 between the tokens of the greedy reply and those of the labels, mean over the rows

A greedy reply is the labels exactly if each label is the most probable token after the labels before it, so the first
two take one forward pass. F1 generates as many tokens as the row has labels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..contracts import Batch, Loss, Objective
from ..errors import BadInput
from ..model.block_mask import BLOCK
from ..model.loss import next_token_loss, predictions


@dataclass(frozen=True)
class CausalLM(Objective):
    """Next-token cross-entropy. `chunk`: positions projected at once (None: as many as fit a byte limit). `whole`: the
    model itself computes the logits of all positions; the engine sets this if the head cannot be computed in chunks."""

    chunk: int | None = None
    whole: bool = False
    smoothing: float = 0.0  # label smoothing; in `training:` it is label_smoothing_factor
    dft: bool = False  # weights each token by its probability (arXiv 2508.05629); in `training:` it is loss_type: dft

    def loss(self, model: PreTrainedModel, batch: Batch, count: Tensor | int | None = None) -> Loss:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return Loss(
            *next_token_loss(model, inputs, batch["labels"], count, self.chunk, self.whole, self.smoothing, self.dft)
        )

    def cross_entropy(self) -> CausalLM:
        return CausalLM(self.chunk, self.whole)

    def example_batch(self, rows: int, tokens: int, args: Any) -> Batch:
        """A batch of padded rows, of packed rows with their positions, or of full rows."""
        batch = super().example_batch(rows, tokens, args)
        if args.padding_free or (args.packing and args.packing_strategy.startswith("bfd")):
            batch["position_ids"] = torch.ones_like(batch["input_ids"])
            del batch["attention_mask"]
            if (dtype := getattr(args, BLOCK, None)) is not None:
                batch["attention_mask"] = torch.zeros(rows, 1, tokens, tokens, dtype=dtype)
        return batch


@dataclass(frozen=True)
class BlackBox(CausalLM):
    """1 - metric, in [0, 1]. It has no gradient."""

    differentiable: ClassVar[bool] = False

    metric: Literal["accuracy", "exact_match", "f1"] = "accuracy"

    @torch.no_grad()
    def loss(self, model: PreTrainedModel, batch: Batch, count: Tensor | int | None = None) -> Loss:
        labels_BT = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        counts_BT = labels_BT[:, 1:] != -100
        seen = counts_BT.sum()
        if self.metric == "f1":
            scores_B = self._f1(model, inputs, labels_BT)
            correct = (scores_B == 1).sum()
        else:
            right_BT = torch.zeros_like(counts_BT)
            right_BT[counts_BT] = predictions(model, inputs, labels_BT, self.whole) == labels_BT[:, 1:][counts_BT]
            correct = right_BT.sum()
            scores_B = (right_BT | ~counts_BT).all(1).float()
        score = correct / seen.clamp(min=1) if self.metric == "accuracy" else scores_B[counts_BT.any(1)].mean()
        share = 1.0 if count is None else seen / torch.as_tensor(count, device=seen.device).clamp(min=1)
        return Loss((1 - score.float()) * share, correct, seen)

    def _f1(self, model: PreTrainedModel, inputs: Batch, labels_BT: Tensor) -> Tensor:
        if "position_ids" in inputs:
            have = "each reply is generated from its own row"
            raise BadInput("black_box: metric: f1 of packed rows", have, "Set packing: false")
        found = []
        for row, labels_T in enumerate(labels_BT):
            places = (labels_T != -100).nonzero().squeeze(1)
            if not len(places):
                found.append(torch.nan)
                continue
            start, answer = int(places[0]), labels_T[places].tolist()
            ids = inputs["input_ids"][row : row + 1, :start]
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[row : row + 1, :start]
            reply = model.generate(
                ids, attention_mask=mask, max_new_tokens=len(answer), do_sample=False, pad_token_id=0
            )[0, start:].tolist()  # fmt: skip
            shared = sum((Counter(reply) & Counter(answer)).values())
            found.append(2 * shared / (len(reply) + len(answer)))
        return torch.tensor(found, device=labels_BT.device)
