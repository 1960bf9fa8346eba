"""Causal language modelling: the mean negative log-likelihood of the next token, over the labels that count.

The logits are never whole (model/loss.py), unless a head is of no known form (model/head.py). Prompt tokens carry the
label -100 and are neither projected nor counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from ..contracts import Loss, Objective
from ..model.loss import next_token_loss


@dataclass(frozen=True)
class CausalLM(Objective):
    """Next-token cross-entropy. `chunk`: positions projected at once (None: by bytes). `whole`: the logits of all
    positions at once, as the model itself makes them; the engine sets it where a head cannot be computed in chunks."""

    task: ClassVar[str] = "causal-lm"

    chunk: int | None = None
    whole: bool = False
    smoothing: float = 0.0  # of labels; TRL's name in `training:` is label_smoothing_factor
    dft: bool = False  # weights each token by its probability (arXiv 2508.05629); in `training:` loss_type: dft

    def loss(self, model: PreTrainedModel, batch: dict[str, Any], count: Tensor | int | None = None) -> Loss:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return Loss(
            *next_token_loss(model, inputs, batch["labels"], count, self.chunk, self.whole, self.smoothing, self.dft)
        )
