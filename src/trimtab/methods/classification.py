"""Sequence classification (and regression): a new head on an encoder or decoder, trained with the patch.

The head (BERT's `classifier`, Llama's `score`) is not a part of the pretrained base: the objective trains all of it and
saves it beside the patch's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Batch, Loss, Objective, Patch, Place, Surgery
from ..model import anatomy
from ..model.surgery import Swaps


@dataclass(frozen=True)
class Head(Patch):
    """The trained head of a classifier, as a patch, so that it is saved and loaded like one."""

    def apply(self, model: PreTrainedModel, place: Place) -> HeadSurgery:
        return HeadSurgery(self, model)


class HeadSurgery(Surgery):
    def __init__(self, patch: Head, model: PreTrainedModel):
        self.patch, self.swaps = patch, Swaps(model)
        self.parameters = anatomy.fresh_parameters(model)
        self.original: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            self.original[name] = parameter.detach().clone()
            self.swaps.set_requires_grad(parameter, True)

    def own_tensors(self) -> dict[str, Tensor]:
        return dict(self.parameters)

    def revert(self) -> None:
        with torch.no_grad():
            for name, tensor in self.original.items():
                self.parameters[name].copy_(tensor)
        self.swaps.undo()

    def merge(self) -> None:
        self.swaps.undo()


@dataclass(frozen=True)
class Classification(Objective):
    """Cross-entropy over the labels, or squared error if the labels are numbers (`problem_type: regression`)."""

    head: ClassVar[str] = "classification"
    trainer: ClassVar[str] = "trimtab.engine.trainers:ClassifierTrainer"
    evaluator: ClassVar[str] = "trimtab.inference.evaluate:classify"

    smoothing: float = 0.0  # label smoothing; in `training:` it is label_smoothing_factor

    def prepare(self, model: PreTrainedModel) -> Surgery | None:
        if all(p.requires_grad for p in anatomy.fresh_parameters(model).values()):
            return None  # full fine-tuning trains the head already
        return Head().apply(model, Place())

    def loss(self, model: PreTrainedModel, batch: Batch, count: Tensor | int | None = None) -> Loss:
        labels = batch["labels"]
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
        seen = torch.as_tensor(labels.shape[0], device=labels.device)
        if model.config.problem_type == "regression":
            total = nn.functional.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
            correct = torch.zeros_like(seen)
        else:
            total = nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.smoothing)
            correct = (logits.argmax(-1) == labels).sum()
        return Loss(total / (seen if count is None else count), correct, seen)

    def cross_entropy(self) -> Classification:
        return Classification()

    def example_batch(self, rows: int, tokens: int, args: Any) -> Batch:
        return {**super().example_batch(rows, tokens, args), "labels": torch.zeros(rows, dtype=torch.int64)}
