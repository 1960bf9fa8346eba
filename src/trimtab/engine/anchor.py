"""Weight anchoring: what an earlier stage has trained is held near where that stage left it.

With theta the trained parameters and theta* their values after the stage before, each step's loss gets

    l2    strength / 2 sum_i (theta_i - theta*_i)^2
    ewc   strength / 2 sum_i F_i (theta_i - theta*_i)^2       (Kirkpatrick et al., arXiv 1612.00796, equation 3)

F_i is the diagonal of the empirical Fisher information: the mean over rows of the squared gradient of the row's loss
(the mean over its tokens, or a classifier's), without dropout, at theta*. From stage to stage the new F is added to
the old one, and theta* is the newest: one anchor for all earlier tasks, as in online EWC (arXiv 1805.06370) with
gamma = 1. The paper keeps a theta* and an F for each task.

In memory both have as many numbers as are trained, in fp32, from a stage's first step on; on disk they are in
`anchor.safetensors` of the stage's folder. The next stage reads them there, also when it is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Patch, Place, Surgery
from ..cost.trace import ADAPTER
from ..data.stage import AnchorSpec
from ..errors import BadInput
from ..files import writing
from ..foreign import FakeTensor


class _Pull(torch.autograd.Function):
    """strength / 2 sum F (theta - theta*)^2 of one parameter, shape (); F None: 1. It saves no tensor of its own."""

    @staticmethod
    def forward(ctx, theta, at, fisher, strength):
        ctx.tensors, ctx.strength = (theta.detach(), at, fisher), strength
        apart = (theta.detach().float() - at).square_()
        return (apart if fisher is None else apart.mul_(fisher)).sum() * (strength / 2)

    @staticmethod
    def backward(ctx, slope):
        theta, at, fisher = ctx.tensors
        apart = (theta.float() - at).mul_(ctx.strength)
        return (apart if fisher is None else apart.mul_(fisher)).mul_(slope).to(theta.dtype), None, None, None


@dataclass(frozen=True)
class Anchored(Patch):
    """Holds the trained parameters near those of `before`, and measures F for the next stage."""

    strength: float = 0.0
    fisher: bool = True

    @classmethod
    def of(cls, spec: AnchorSpec) -> Anchored:
        return cls(spec.ewc.strength, True) if spec.ewc else cls(spec.l2.strength, False)  # type: ignore[union-attr]

    def apply(self, model: PreTrainedModel, place: Place) -> Anchor:
        return Anchor(self, model)


class Anchor(Surgery):
    """`at`, `fisher`: name of a trained parameter -> theta* and F. It pulls once `read` has set them."""

    saved = False

    def __init__(self, patch: Anchored, model: PreTrainedModel):
        self.patch, self.model = patch, model  # type: ignore[assignment]
        self.at = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self._trained()}
        self.fisher = {name: torch.zeros_like(value) for name, value in self.at.items()} if patch.fisher else {}
        self.pulls = any(value.is_meta for value in self.at.values())  # a plan is of a stage that is pulled

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p.detach()) if p.is_meta else (name, p) for name, p in self.model.named_parameters()
                if p.requires_grad]  # fmt: skip

    def revert(self) -> None:
        self.at, self.fisher = {}, {}

    def own_tensors(self) -> dict[str, Tensor]:
        return {}

    def outside(self) -> dict[str, list[Tensor]]:
        return {ADAPTER: [*self.at.values(), *self.fisher.values()]}

    def penalty(self) -> Tensor | None:
        if not self.pulls:
            return None
        strength: float = self.patch.strength  # type: ignore[attr-defined]
        terms = []
        for name, theta in self.model.named_parameters():
            if theta.requires_grad:
                # a trace has no values, and counts theta* and F as `outside`
                at = theta.detach() if isinstance(theta, FakeTensor) else self.at[name]
                fisher = (at if isinstance(theta, FakeTensor) else self.fisher[name]) if self.fisher else None
                terms.append(_Pull.apply(theta, at, fisher, strength))
        return torch.stack(terms).sum()

    def read(self, path: Path) -> None:
        """theta* and F from the stage before. BadInput for a file that is damaged or of other parameters."""
        try:
            held = load_file(path)
            for key, tensors in (("at", self.at), ("fisher", self.fisher)):
                for name, tensor in tensors.items():
                    tensor.copy_(held[f"{key}.{name}"].view(tensor.shape))
        except Exception as error:  # safetensors raises its own types
            have = f"it cannot be read ({' '.join(str(error).split())[:100]})"
            raise BadInput(f"anchor {path}", have, "Start again with overwrite=true") from None
        self.pulls = True

    def write(self, path: Path, trainer: Any, own: int, rows: int) -> None:
        """Measures F on `rows` of the trainer's first `own` rows, adds it, and writes it with the parameters as they
        are."""
        if self.fisher:
            self.add_fisher(trainer, own, rows)
        parts = {f"at.{name}": p.detach().float().cpu().contiguous() for name, p in self._trained()}
        parts |= {f"fisher.{name}": value.cpu().contiguous() for name, value in self.fisher.items()}
        partial = path.with_name(f".{path.name}.partial")
        with writing(f"write {path}", "Free some space and resume"):
            save_file(parts, partial)
            partial.replace(path)

    def add_fisher(self, trainer: Any, own: int, rows: int) -> None:
        model, was = trainer.model, trainer.model.training
        model.eval()
        model.zero_grad(set_to_none=True)
        taken = min(own, rows)
        for batch in _single(trainer, numpy.random.default_rng(trainer.args.seed).permutation(own)[:taken].tolist()):
            with trainer.compute_loss_context_manager():
                loss = trainer.job.objective.loss(model, batch)[0]
            if not loss.requires_grad:
                continue  # no token of the row counts
            loss.backward()
            for name, parameter in self._trained():
                if parameter.grad is not None:
                    self.fisher[name].addcmul_(parameter.grad.float(), parameter.grad.float(), value=1 / taken)
            model.zero_grad(set_to_none=True)
        model.train(was)
        if not all(math.isfinite(float(value.sum())) for value in self.fisher.values()):
            raise BadInput("anchor: ewc", "gradients of the stage's rows are not finite", "Lower the learning rate")


def _single(trainer: Any, places: Iterable[int]) -> Iterable[dict[str, Tensor]]:
    """Rows of the trainer's data, each a batch of its own."""
    size, drop = trainer.args.per_device_eval_batch_size, trainer.args.dataloader_drop_last
    trainer.args.per_device_eval_batch_size, trainer.args.dataloader_drop_last = 1, False
    try:
        for batch in trainer.get_eval_dataloader(trainer.train_dataset.select(list(places))):
            yield {key: value.to(trainer.args.device) for key, value in batch.items()}
    finally:
        trainer.args.per_device_eval_batch_size, trainer.args.dataloader_drop_last = size, drop


def anchored(model: PreTrainedModel, spec: AnchorSpec | None, trainable: Any, processes: int = 1) -> list[Surgery]:
    """The anchor that a recipe asks for, after its patches; none without. `trainable`: the stepper and the surgeries.
    BadInput where the trained numbers are not parameters with gradients."""
    if spec is None:
        return []
    stepper, surgeries = trainable
    what = "anchor: ewc" if spec.ewc else "anchor: l2"
    if any(surgery.stores for surgery in surgeries):
        raise BadInput(what, "rows in the slow tier are trained, which it does not reach", "Use rehearsal")
    if spec.ewc and not stepper.uses_gradients:
        raise BadInput(what, f"{type(stepper).__name__} has no gradients to measure F with", "Use l2, or rehearsal")
    if processes > 1:
        raise BadInput(what, "only a run of one process has it", "Start one process, or use rehearsal")
    return [Anchored.of(spec).apply(model, Place())]
