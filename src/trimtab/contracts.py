"""The four things that a method may be: a Patch, its Surgery, an Objective or a Stepper.

- A Patch is a reversible change to a model. It is trained (LoRA), slims the model (pruning), or acts while the model
  generates (a KV-cache policy); `when` says which. Applying it returns a Surgery.
- An Objective turns a batch into a loss, and names the trainer that runs it.
- A Stepper turns losses into gradients and gradients into steps.

Methods implement these and never import each other; all else knows no method by name. Bases of methods are in `bases/`.
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
from .memory.place import Place as Place
from .model.surgery import ModulePatch as ModulePatch

if TYPE_CHECKING:
    from transformers import Cache

Batch = dict[str, Tensor]


class When(enum.Enum):
    """When a patch acts, and where inference gets it from."""

    TRAIN = "train"  # it is trained; inference loads it from the adapter folder
    INFER = "infer"  # it acts while the model generates; it is not saved, and inference applies it from the recipe
    BOTH = "both"  # it is not trained but acts in training too (a pruned base); saved in the adapter folder
    LOAD = "load"  # where the base's weights are, with the same outputs; applied first, from the recipe, not saved


@dataclass(frozen=True)
class Portable:
    """An adapter in a form that stock `peft` loads: its config and tensors under PEFT's own names."""

    config: Any  # peft.PeftConfig
    tensors: dict[str, Tensor]


class Surgery(ABC):
    """A change made to a model: how it is undone, and which tensors are its own."""

    patch: Patch
    stores: list = []  # tables in the slow tier (TieredStore), if the method has any
    starts_at_zero: bool = True  # before training, the patched model computes exactly what the unpatched one does
    saved: bool = True  # an adapter folder has a part for it
    merges_apart: bool = False  # it changes only weights of linears, and `merged_weight` returns each without merging
    keeps_outputs: bool = False  # inference on the bare base gives the same outputs, so that an export may omit it
    tiers: Any = None  # the base's experts in two tiers (tiered/experts.py), if the patch has moved them
    notes: tuple[str, ...] = ()  # for the user, on how the patch was applied
    in_slow_tier: list[Tensor] = []  # tensors of the base that it has moved to the slow tier
    offloaded: Any = None  # its parameters, if they are trained in the slow tier (tiered/offload.py)

    @abstractmethod
    def revert(self) -> None:
        """Restore the model exactly: state dict bit for bit, `str(model)`, number of hooks."""

    @abstractmethod
    def own_tensors(self) -> dict[str, Tensor]:
        """Every tensor that it trains or must save, and none of the base: path in the *unpatched* model + suffix."""

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy `tensors` into the patched model in place. Names and shapes must match those of `own_tensors`."""
        own = self.own_tensors()
        do = "Use the adapter with the base model and the patch that it was trained with"
        if own.keys() != tensors.keys():
            have = f"{len(own)} are expected, and {min(own.keys() ^ tensors.keys())} is only in one of the two"
            raise BadInput(f"load {len(tensors)} tensors into {type(self.patch).__name__}", have, do)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if (there := tuple(own[name].shape)) != (shape := tuple(tensor.shape)):
                    raise BadInput(f"load {name} of shape {shape}", f"the patched model has {there} there", do)
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)

    def calibrate(self, batches: Iterable[Batch]) -> None:  # noqa: B027
        """Set what depends on data. Called once in a new run, before the next patch is applied, with the first
        `patch.calibration_rows` rows of data in batches; a saved adapter has the result in its tensors."""

    def merge(self) -> None:
        """Write the change into the base weights and remove the patch: a plain transformers model remains."""
        raise BadInput(f"merge {type(self.patch).__name__}", "it depends on its input", "Keep the adapter")

    def merged_weight(self, path: str) -> Tensor | None:
        """If `merges_apart`: the weight (out, in) of the linear `path` as `merge` would leave it, a new tensor."""
        return None

    def adapter_config(self) -> dict[str, Any]:
        """The content of adapter_config.json. PEFT can read it if the method is one of PEFT's own (LoRA overrides)."""
        return {"peft_type": type(self.patch).__name__.upper(), **self.patch.config()}

    def portable(self) -> Portable:
        """The adapter in a form that stock `peft` loads; BadInput if it has none."""
        raise BadInput(f"export {type(self.patch).__name__} to peft", "no tuner of peft computes it", "Use trimtab")

    def penalty(self) -> Tensor | None:
        """A term of the training loss, shape (), asked for after each forward pass; a step takes its mean over them."""
        return None

    def cache(self) -> Cache | None:
        """A new, empty KV cache for one call of `generate` (model/kv_cache.py); None: transformers' own."""
        return None

    def outside(self) -> dict[str, list[Tensor]]:
        """Kind (cost/trace.py) -> tensors that it keeps outside the model, besides `own_tensors` and `stores`."""
        return {}

    def take(self, spare: int) -> int:
        """Use up to `spare` bytes of the fast tier, which a plan leaves over; -> the bytes used."""
        return 0

    def begin(self, steps: int) -> None:  # noqa: B027
        """Called by the engine once before training, also when a run is resumed, with its number of optimizer steps."""

    def before_step(self, step: int) -> None:  # noqa: B027
        """Called by the engine before optimizer step `step` (0, 1, ...), for parts that change on a schedule."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Called by the engine after optimizer step `step`, before the gradients are dropped."""


@dataclass(frozen=True)
class Patch(ABC):
    """A reversible change to a model. Its dataclass fields *are* its configuration, in YAML and on the command line."""

    paper: ClassVar[str] = ""  # arXiv id
    when: ClassVar[When] = When.TRAIN
    trains_base: ClassVar[bool] = False  # whether the base's own weights are trained (full fine-tuning)
    exclusive_reason: ClassVar[str] = ""  # why no other trained patch can be applied with it; "" if one can
    defaults: ClassVar[dict[str, Any]] = {}  # of `training:`; they override the objective's
    gradient_reason: ClassVar[str] = ""  # why no stepper without gradients can train it; "" if one can
    uses_tables: ClassVar[bool] = False  # whether it trains tables or weights in the slow tier, which only Adam steps
    shards: ClassVar[bool] = False  # whether it trains with weights split over processes (engine/sharding.py)
    reads_experts: ClassVar[bool] = False  # it reads stacked experts from the checkpoint; the loader leaves them out
    counts_tokens: ClassVar[bool] = False  # calibration needs only token ids, and a plan counts them for it (`counted`)
    shrinkable: ClassVar[tuple[str, ...]] = ()  # fields that use less memory when smaller, the least harmful first
    variants: ClassVar[tuple[dict[str, Any], ...]] = ()  # fields of other forms that a search for a plan tries too

    @abstractmethod
    def apply(self, model: PreTrainedModel, place: Place) -> Surgery: ...

    @property
    def calibration_rows(self) -> int:
        """The number of rows of data that `Surgery.calibrate` needs; 0: it is not called."""
        return 0

    @property
    def calibration_file(self) -> str:
        """The file of these rows, as in `data.train`, for a language model; "": data.train itself."""
        return ""

    def counted(self, model: Any, counts: Tensor) -> tuple[Patch, tuple[str, ...]]:
        """The patch for a plan, with what follows from how often each id occurs in data.train, `counts` (V,), and
        notes for the user. `model` has no values."""
        return self, ()

    def within(self, size: int) -> Patch | None:
        """The patch with at most `size` bytes of KV cache per text; None: its fields do not leave that open."""
        return None

    def config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Loss(NamedTuple):
    """A loss, and the counts for the accuracy in the log; each has shape ()."""

    value: Tensor
    correct: Tensor  # number of items predicted correctly
    seen: Tensor  # number of items


class Objective(ABC):
    """Computes the loss of a batch."""

    head: ClassVar[str] = "causal-lm"  # the transformers head that the model needs: "causal-lm" or "classification"
    trainer: ClassVar[str] = "trimtab.engine.trainers:CausalTrainer"  # an `engine.objectives.ObjectiveTrainer`
    evaluator: ClassVar[str] = "trimtab.inference.evaluate:answer"  # what `trimtab eval` calls
    defaults: ClassVar[dict[str, Any]] = {"lr_scheduler_type": "linear", "warmup_steps": 0}  # of `training:`
    differentiable: ClassVar[bool] = True  # whether the loss has a gradient
    gradient_reason: ClassVar[str] = ""  # as a patch's
    ignored: ClassVar[dict[str, str]] = {}  # fields of `training:` that would do nothing -> why; they are refused

    def prepare(self, model: PreTrainedModel) -> Surgery | None:
        """A surgery for what the objective itself trains (a new classification head), or None."""
        return None

    def cross_entropy(self) -> Objective:
        """The objective whose loss is the model's own: for perplexity, and to compare shortcuts with."""
        return self

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: Batch, count: Tensor | int | None = None) -> Loss:
        """-> the mean loss. `count`: how many items the whole optimizer step averages over (gradient accumulation)."""

    def example_batch(self, rows: int, tokens: int, args: Any) -> Batch:
        """A batch of zeros with the shapes of the trainer's collator under `args`, for the planner's trace."""
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}


class Stepper:
    """Turns losses into gradients, and gradients into steps. This class does it by the ordinary backward pass and the
    optimizer of `training.optim`."""

    defaults: ClassVar[dict[str, Any]] = {}  # of `training:`; they override the patches'
    uses_gradients: ClassVar[bool] = True  # whether `backward` runs a backward pass
    ignored: ClassVar[dict[str, str]] = {}  # as an objective's

    def prepare(self, model: PreTrainedModel) -> Surgery | None:
        """A surgery for what the stepper itself needs on the model, or None."""
        return None

    def optimizer(self, parameters: Sequence[nn.Parameter], args: Any) -> torch.optim.Optimizer | None:
        """The optimizer for the trained `parameters` under the training arguments; None: transformers creates it."""
        return None

    def backward(self, loss: Callable[[], Tensor], back: Callable[[Tensor], None] = Tensor.backward) -> Tensor:
        """Processes one micro-batch: computes `loss`, sets `.grad` for the optimizer, and returns the loss, detached.
        Each call of `loss` runs a forward pass. `back`: runs a backward pass from a loss."""
        value = loss()
        back(value)
        return value.detach()

    def record(self) -> dict[str, Any]:
        """What run.json says about the stepper at the end."""
        return {}


def cache_of(surgeries: Iterable[Surgery]) -> Cache | None:
    """A new KV cache from the surgery that has one; None: use transformers' own."""
    return next((cache for surgery in surgeries if (cache := surgery.cache()) is not None), None)


def penalty_of(surgeries: Iterable[Surgery]) -> Tensor | None:
    """The sum of the surgeries' penalties, shape (); None if there is none."""
    found = [penalty for surgery in surgeries if (penalty := surgery.penalty()) is not None]
    return torch.stack(found).sum() if found else None
