"""Members of the table that only tests have: a stepper, a penalty and an objective that are nothing of ours.

They prove that engine, planner and files know methods by their contract alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from trl import SFTConfig

from trimtab import methods
from trimtab.contracts import Batch, Loss, Stepper, Surgery
from trimtab.engine.trainers import CausalTrainer
from trimtab.methods.causal_lm import CausalLM
from trimtab.methods.parallel_adapter import ParallelAdapter


@dataclass(frozen=True)
class PlainSGD(Stepper):
    """w <- w - lr g, by a backward pass and an optimizer of its own."""

    seen: ClassVar[list[float]] = []  # the losses of micro-batches since an optimizer was made, a plan's among them

    momentum: float = 0.0

    def optimizer(self, parameters: Sequence[nn.Parameter], args: Any) -> torch.optim.Optimizer:
        self.seen.clear()
        return torch.optim.SGD(parameters, lr=args.learning_rate, momentum=self.momentum)

    def backward(self, loss: Callable[[], Tensor], back: Callable[[Tensor], None] = Tensor.backward) -> Tensor:
        value = loss()
        back(value)
        self.seen.append(float(value.detach()))
        return value.detach()


class PenalisedSurgery(Surgery):
    """A Parallel Adapter whose keys are drawn to zero: R = decay / 2 * sum of squares."""

    def __init__(self, patch: Penalised, inner: Surgery):
        self.patch, self.inner = patch, inner
        self.notes = inner.notes

    def own_tensors(self) -> dict[str, Tensor]:
        return self.inner.own_tensors()

    def revert(self) -> None:
        self.inner.revert()

    def penalty(self) -> Tensor:
        keys = [t for name, t in self.own_tensors().items() if name.endswith("keys")]
        return self.patch.decay / 2 * torch.stack([t.float().square().sum() for t in keys]).sum()


@dataclass(frozen=True)
class Penalised(ParallelAdapter):
    decay: float = 0.0

    def apply(self, model: Any, place: Any) -> PenalisedSurgery:
        return PenalisedSurgery(self, super().apply(model, place))


@dataclass
class ScaledConfig(SFTConfig):
    """SFTConfig and a field of the objective's own."""

    scale_of_loss: float = field(default=1.0, metadata={"help": "The loss is multiplied by it."})


class ScaledTrainer(CausalTrainer):
    arguments = ScaledConfig
    made: ClassVar[list[ScaledTrainer]] = []

    @classmethod
    def build(cls, job: Any, recipe: Any, model: Any, args: Any, inputs: Any) -> ScaledTrainer:
        made = super().build(job, recipe, model, args, inputs)
        cls.made.append(made)
        return made

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, False, num_items_in_batch) * self.args.scale_of_loss
        return (loss, None) if return_outputs else loss


def counted(made: Any, limit: int | None) -> dict[str, Any]:
    """An evaluator: how many parameters the model has."""
    return {"rows": 0, "metrics": {"parameters": float(sum(p.numel() for p in made.model.parameters()))}}


@dataclass(frozen=True)
class Scaled(CausalLM):
    trainer: ClassVar[str] = f"{__name__}:ScaledTrainer"
    evaluator: ClassVar[str] = f"{__name__}:counted"
    defaults: ClassVar[dict[str, Any]] = {"lr_scheduler_type": "constant", "scale_of_loss": 0.5}

    def loss(self, model: Any, batch: Batch, count: Tensor | int | None = None) -> Loss:
        return super().loss(model, batch, count)


class TestRow(methods.Row):
    """A row whose class is in a module of the tests."""

    __test__ = False

    def load(self) -> Any:
        return globals()[self.target.split(":")[1]]


ROWS = {
    "plain_sgd": TestRow("doors:PlainSGD", "stepper", "Plain SGD", "steps along the gradient"),
    "penalised": TestRow("doors:Penalised", "patch", "Penalised", "an adapter with a penalty"),
    "scaled": TestRow("doors:Scaled", "objective", "Scaled", "next-token loss times a number"),
}


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The table with these rows."""
    for name, row in ROWS.items():
        monkeypatch.setitem(methods.TABLE, name, row)
    yield
    ScaledTrainer.made.clear()
