"""Causal language modelling: the mean negative log-likelihood of the next token, over the labels that count.

The logits are computed in chunks (model/loss.py), unless the head is of an unknown form (model/head.py). Prompt tokens
have the label -100 and are neither projected nor counted. A batch may have probabilities that an earlier stage kept
(`SOFT`): the loss is then the cross-entropy against them.

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
from ..model.loss import SOFT, next_token_loss, predictions


@dataclass(frozen=True)
class CausalLM(Objective):
    """Next-token cross-entropy. `chunk`: positions projected at once (None: as many as fit a byte limit). `whole`: the
    model itself computes the logits of all positions; the engine sets this if the head cannot be computed in chunks."""

    chunk: int | None = None
    whole: bool = False
    smoothing: float = 0.0  # label smoothing; in `training:` it is label_smoothing_factor
    dft: bool = False  # weights each token by its probability (arXiv 2508.05629); in `training:` it is loss_type: dft
    soft: int = 0  # kept probabilities per token, of rehearsed rows; stages set it (rehearsal: {keep: logits})

    def loss(self, model: PreTrainedModel, batch: Batch, count: Tensor | int | None = None) -> Loss:
        inputs = {key: value for key, value in batch.items() if key not in ("labels", *SOFT)}
        soft = (batch[SOFT[0]], batch[SOFT[1]]) if SOFT[0] in batch else None
        return Loss(*next_token_loss(
            model, inputs, batch["labels"], count, self.chunk, self.whole, self.smoothing, self.dft, soft
        ))  # fmt: skip

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
        if self.soft:
            batch |= {SOFT[0]: torch.zeros(rows, tokens, self.soft, dtype=torch.int64),
                      SOFT[1]: torch.zeros(rows, tokens, self.soft)}  # fmt: skip
        return batch


@dataclass(frozen=True)
class BlackBox(CausalLM):
    """1 - metric, in [0, 1]. It has no gradient."""

    differentiable: ClassVar[bool] = False
    ignored: ClassVar[dict[str, str]] = dict.fromkeys(("label_smoothing_factor", "loss_type"), "a metric has no labels")

    metric: Literal["accuracy", "exact_match", "f1"] = "accuracy"  # what is one minus the loss

    def __post_init__(self) -> None:
        if self.smoothing or self.dft:
            have = "they change a cross-entropy, and this is a metric"
            raise BadInput("black_box: smoothing or dft", have, "Remove them")

    @torch.no_grad()
    def loss(self, model: PreTrainedModel, batch: Batch, count: Tensor | int | None = None) -> Loss:
        labels_BT = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if self.metric != "accuracy" and "position_ids" in inputs:
            have = "a reply belongs to one row, and these are several in one"
            raise BadInput(f"black_box: metric: {self.metric} of packed rows", have, "Set packing: false")
        places_N, said_N = predictions(model, inputs, labels_BT, self.whole, self.chunk or 128)
        wanted_M = labels_BT[:, 1:].reshape(-1)
        seen = torch.as_tensor(places_N.numel(), device=labels_BT.device)
        wrong_M = torch.zeros(wanted_M.shape, device=labels_BT.device)
        wrong_M = wrong_M.index_copy(0, places_N, (said_N != wanted_M[places_N]).float())
        wrong_BT, counts_B = wrong_M.view(len(labels_BT), -1), (labels_BT[:, 1:] != -100).any(1)
        correct = seen - wrong_M.sum().long()
        if self.metric == "accuracy":
            score = correct / seen.clamp(min=1)
        elif self.metric == "f1" and type(labels_BT) is Tensor:  # a plan, without values, has one forward pass
            score = self._f1(model, inputs, labels_BT, counts_B)
        else:
            score = ((wrong_BT.sum(1) == 0) & counts_B).sum() / counts_B.sum().clamp(min=1)
        share = 1.0 if count is None else seen / torch.as_tensor(count, device=seen.device).clamp(min=1)
        return Loss((1 - score.float()) * share, correct, seen)

    def _f1(self, model: PreTrainedModel, inputs: Batch, labels_BT: Tensor, counts_B: Tensor) -> Tensor:
        """The mean over rows that have labels. Replies are greedy, whatever the model's generation config says."""
        found, mask_BT = [], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        for row in counts_B.nonzero().squeeze(1).tolist():
            places = (labels_BT[row] != -100).nonzero().squeeze(1)
            start, answer = int(places[0]), labels_BT[row, places].tolist()
            if not start:
                have = "its first label is its first token, so there is no prompt to reply to"
                raise BadInput("black_box: metric: f1 of a row of plain text", have, "Give rows with a prompt")
            ids = inputs["input_ids"][row, :start][mask_BT[row, :start]][None]
            for _ in answer:
                ids = torch.cat([ids, model.forward(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            reply = ids[0, -len(answer) :].tolist()
            shared = sum((Counter(reply) & Counter(answer)).values())
            found.append(2 * shared / (len(reply) + len(answer)))
        return torch.tensor(found, device=labels_BT.device).mean()
