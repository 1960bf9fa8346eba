"""Causal language modelling: the mean negative log-likelihood of the next token, over the labels that count.

The logits are computed in chunks (model/loss.py), unless the head is of an unknown form (model/head.py). Prompt tokens
have the label -100 and are neither projected nor counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..contracts import Batch, Loss, Objective
from ..model.block_mask import BLOCK
from ..model.loss import next_token_loss


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
