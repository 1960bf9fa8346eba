"""The four things that a method may be: a Patch, its Surgery, an Objective or a Stepper.

- A Patch is a reversible change to a model. It is trained (LoRA), slims the model (pruning), or acts while the model
  generates (a KV-cache policy); `when` says which. Applying it returns a Surgery.
- An Objective turns a batch into a loss, and names the trainer that runs it.
- A Stepper turns losses into gradients and gradients into steps.

Methods implement these classes and never import each other. Everything else (engine, planner, adapter files, inference)
knows only these classes and no method by name. Bases for the common cases are in `bases/`.
"""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import BadInput
from .model.surgery import ModulePatch as ModulePatch

if TYPE_CHECKING:
    from transformers import Cache

Batch = dict[str, Tensor]


class When(enum.Enum):
    """When a patch acts, and where inference takes it from."""

    TRAIN = "train"  # it is trained; inference loads it from the adapter folder
    INFER = "infer"  # it acts while the model generates; nothing is saved, inference takes it from the recipe
    BOTH = "both"  # it is not trained but acts in training too (a pruned base); saved in the adapter folder


@dataclass(frozen=True)
class Place:
    """Which device computes (the fast tier), what lies under it (the slow tier), and where files may go.

    `fast`: "auto" (CUDA when there is one, else the CPU), "cpu", "cuda", "cuda:1"; `slow`: "auto", "ram" or "disk";
    `folder`: where the slow tier keeps its files (None: beside the run).
    """

    fast: str = "auto"
    slow: str = "auto"
    folder: str | None = None

    @property
    def device(self) -> torch.device:
        if self.fast == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.device(self.fast)
        except RuntimeError:
            raise BadInput(f'place: fast: "{self.fast}"', "no such device", 'Say "auto", "cpu" or "cuda"') from None


@dataclass(frozen=True)
class Portable:
    """An adapter in a form that stock `peft` loads: its config and tensors under PEFT's own names."""

    config: Any  # peft.PeftConfig
    tensors: dict[str, Tensor]


class Surgery(ABC):
    """A change made to a model: how it is undone, and which tensors are its own.

    `own_tensors` names every tensor that the patch trained or must remember. Keys are module paths of the *unpatched*
    model plus a suffix; no tensor of the base is among them. `load_tensors` takes the same dict back.
    """

    patch: Patch
    stores: list = []  # tables in the slow tier (TieredStore), when a method keeps any
    starts_at_zero: bool = True  # at first, the patched model computes exactly what the unpatched one does
    notes: tuple[str, ...] = ()  # what a user should know of how the patch was applied, a line each

    @abstractmethod
    def revert(self) -> None:
        """Restore the model exactly: state dict bit for bit, `str(model)`, number of hooks."""

    @abstractmethod
    def own_tensors(self) -> dict[str, Tensor]: ...

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy `tensors` into the patched model in place. Names and shapes must match those of `own_tensors`."""
        own = self.own_tensors()
        do = "Use the adapter with the base model and the patch it was made with"
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())[0]
            asked = f"load {len(tensors)} tensors into {type(self.patch).__name__}"
            raise BadInput(asked, f"{len(own)} are expected, and {odd} is on one side only", do)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if own[name].shape != tensor.shape:
                    have = f"the patched model has {tuple(own[name].shape)} there"
                    raise BadInput(f"load {name} of shape {tuple(tensor.shape)}", have, do)
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)

    def calibrate(self, batches: Iterable[Batch]) -> None:  # noqa: B027
        """Set what depends on data. Called once in a new run, before the next patch is applied, with
        `patch.calibration_rows` rows of `data.train` in batches; a saved adapter has the result in its tensors."""

    def merge(self) -> None:
        """Write the change into the base weights and remove the patch: a plain transformers model remains."""
        asked = f"merge {type(self.patch).__name__}"
        raise BadInput(asked, "it depends on its input, so no weight can hold it", "Keep the adapter")

    def adapter_config(self) -> dict[str, Any]:
        """The content of adapter_config.json. PEFT reads it where the method is one of PEFT's own (LoRA overrides)."""
        return {"peft_type": type(self.patch).__name__.upper(), **self.patch.config()}

    def portable(self) -> Portable:
        """The adapter as stock `peft` knows it, where the mathematics allows."""
        raise BadInput(
            f"export {type(self.patch).__name__} to peft", "no tuner of peft computes it", "Run it through trimtab"
        )

    def penalty(self) -> Tensor | None:
        """A term of the loss, shape (), that does not depend on the batch; added once to each optimizer step."""
        return None

    def cache(self) -> Cache | None:
        """A new, empty KV cache for one call of `generate` (model/kv_cache.py); None: transformers' own."""
        return None

    def before_step(self, step: int) -> None:  # noqa: B027
        """Called by the engine before optimizer step `step` (0, 1, ...), for parts that change on a schedule."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Called by the engine after optimizer step `step`, while the gradients are still there."""


@dataclass(frozen=True)
class Patch(ABC):
    """A reversible change to a model. Its dataclass fields *are* its configuration: YAML and CLI keys are theirs."""

    paper: ClassVar[str] = ""  # arXiv id
    when: ClassVar[When] = When.TRAIN
    trains_base: ClassVar[bool] = False  # True where the base's own weights move (full fine-tuning)
    exclusive_reason: ClassVar[str] = ""  # why no other trained patch can be applied with it; "" where one can
    defaults: ClassVar[dict[str, Any]] = {}  # of `training:`, above the objective's
    uses_tables: ClassVar[bool] = False  # True where it keeps tables in the slow tier
    shrinkable: ClassVar[tuple[str, ...]] = ()  # fields that use less memory when smaller, the least harmful first

    @abstractmethod
    def apply(self, model: PreTrainedModel, place: Place) -> Surgery: ...

    @property
    def calibration_rows(self) -> int:
        """How many rows of `data.train` `Surgery.calibrate` needs; 0: it needs none and is not called."""
        return 0

    def config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Loss(NamedTuple):
    """A loss, with the counts that the log reports."""

    value: Tensor  # shape ()
    correct: Tensor  # how many items were predicted right
    seen: Tensor  # of how many


class Objective(ABC):
    """A batch -> a loss."""

    head: ClassVar[str] = "causal-lm"  # the transformers head that the model needs: "causal-lm" or "classification"
    trainer: ClassVar[str] = "trimtab.engine.trainers:CausalTrainer"  # an `engine.objectives.ObjectiveTrainer`
    evaluator: ClassVar[str] = "trimtab.inference.evaluate:answer"  # what `trimtab eval` calls
    defaults: ClassVar[dict[str, Any]] = {"lr_scheduler_type": "linear", "warmup_steps": 0}  # of `training:`

    def prepare(self, model: PreTrainedModel) -> Surgery | None:
        """A surgery for what the objective itself trains (a new classification head), or None."""
        return None

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: Batch, count: Tensor | int | None = None) -> Loss:
        """-> mean loss, shape (). `count`: how many items the whole optimizer step averages over (accumulation)."""

    def example_batch(self, rows: int, tokens: int, args: Any) -> Batch:
        """A batch of zeros, as the trainer's collator would make it under `args`; the planner traces it."""
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}


class Stepper:
    """How losses become gradients, and gradients a step. As it stands: the ordinary backward pass, and the optimizer
    that `training.optim` names."""

    def prepare(self, model: PreTrainedModel) -> Surgery | None:
        """A surgery for what the stepper itself needs on the model, or None."""
        return None

    def optimizer(self, parameters: Sequence[nn.Parameter], args: Any) -> torch.optim.Optimizer | None:
        """The optimizer for the trained `parameters` under the training arguments; None: transformers makes it."""
        return None

    def backward(self, loss: Callable[[], Tensor], back: Callable[[Tensor], None] = Tensor.backward) -> Tensor:
        """One micro-batch: compute `loss`, leave what the optimizer needs (`.grad`), return the loss, detached.

        `loss` runs the forward pass anew each time it is called. `back`: runs a backward pass from a loss.
        """
        value = loss()
        back(value)
        return value.detach()


def cache_of(surgeries: Iterable[Surgery]) -> Cache | None:
    """A new KV cache of the surgery that has one; None: transformers' own."""
    return next((cache for surgery in surgeries if (cache := surgery.cache()) is not None), None)


def penalty_of(surgeries: Iterable[Surgery]) -> Tensor | None:
    """The sum of the surgeries' penalties, shape (); None where there is none."""
    found = [penalty for surgery in surgeries if (penalty := surgery.penalty()) is not None]
    return torch.stack(found).sum() if found else None
