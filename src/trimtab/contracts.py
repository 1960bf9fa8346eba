"""All that a method may be: a Patch (a reversible change to a model), an Objective (batch -> loss) or a Stepper.

This is the thin waist of the house. Methods implement these classes and never import each other; the engine, the
planner and the adapter files know only these classes and no method by name.
"""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import BadInput
from .model import anatomy
from .model.packing import keep_trainable_layout
from .model.surgery import ALONE, Swaps, is_patch
from .model.surgery import ModulePatch as ModulePatch


class When(enum.Enum):
    """When a patch does its work."""

    TRAIN = "train"
    INFER = "infer"
    BOTH = "both"


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
    """A change made to a model: the way back, and what is ours.

    `own_tensors` names every tensor that the patch trained or must remember (keys are module paths of the *unpatched*
    model plus a suffix); nothing of the base is among them. `load_tensors` takes the same dict back.
    """

    patch: Patch
    stores: list = []  # tables in the slow tier (TieredStore), when a method keeps any
    starts_at_zero: bool = True  # the patched model computes at first what it computed without the patch
    notes: tuple[str, ...] = ()  # what a user should know of how the patch was applied, a line each

    @abstractmethod
    def revert(self) -> None:
        """Put the model back exactly as it was: state dict bit for bit, `str(model)`, number of hooks."""

    @abstractmethod
    def own_tensors(self) -> dict[str, Tensor]: ...

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy `tensors` into the patched model in place. Names and shapes must match those of `own_tensors`."""
        own = self.own_tensors()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())[0]
            raise BadInput(
                f"load {len(tensors)} tensors into {type(self.patch).__name__}",
                f"{len(own)} are expected, and {odd} is on one side only",
                "Use the adapter with the base model and the patch it was made with",
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                if own[name].shape != tensor.shape:
                    raise BadInput(
                        f"load {name} of shape {tuple(tensor.shape)}",
                        f"the patched model has {tuple(own[name].shape)} there",
                        "Use the adapter with the base model and the patch it was made with",
                    )
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)

    def merge(self) -> None:
        """Write the change into the base weights and take the patch out: a plain transformers model remains."""
        asked = f"merge {type(self.patch).__name__}"
        raise BadInput(asked, "it depends on its input, so no weight can hold it", "Keep the adapter")

    def adapter_config(self) -> dict[str, Any]:
        """What adapter_config.json holds. PEFT reads it where the method is one of PEFT's own (LoRA overrides this)."""
        return {"peft_type": type(self.patch).__name__.upper(), **self.patch.config()}

    def portable(self) -> Portable:
        """The adapter as stock `peft` knows it, where the mathematics allows."""
        raise BadInput(
            f"export {type(self.patch).__name__} to peft", "no tuner of peft computes it", "Run it through trimtab"
        )

    def before_step(self, step: int) -> None:  # noqa: B027
        """Called by the engine before optimiser step `step` (0, 1, ...), for parts that change on a schedule."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Called by the engine after optimiser step `step`, while the gradients are still there."""


@dataclass(frozen=True)
class Patch(ABC):
    """A reversible change to a model. Its dataclass fields *are* its configuration: YAML and CLI keys are theirs."""

    paper: ClassVar[str] = ""  # arXiv id
    when: ClassVar[When] = When.TRAIN
    trains_base: ClassVar[bool] = False  # True where the base's own weights move (full fine-tuning)
    alone: ClassVar[str] = ""  # why it composes with no other trained patch; "" where it does
    defaults: ClassVar[dict[str, Any]] = {}  # of `training:`, where the method wants others than the recipe's
    tables: ClassVar[bool] = False  # True where it keeps tables in the slow tier
    less: ClassVar[tuple[str, ...]] = ()  # fields of which a smaller number holds less, those that matter least first

    @abstractmethod
    def apply(self, model: PreTrainedModel, place: Place) -> Surgery: ...

    def config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class LinearSurgery(Surgery):
    """Wrapped linears: the wrapper holds the frozen linear as `base` and its own parameters beside it."""

    def __init__(self, patch: LinearPatch, model: PreTrainedModel):
        self.patch, self.model = patch, model
        self.swaps = Swaps(model)
        self.layers: dict[str, Any] = {}  # path -> wrapper

    def own_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, layer in self.layers.items()
            for key, tensor in layer.state_dict(keep_vars=True).items()
            if not key.startswith("base.")
        }

    def revert(self) -> None:
        for layer in self.layers.values():
            if callable(detach := getattr(layer, "detach_base", None)):
                detach()
        self.swaps.undo()

    def merge(self) -> None:
        """Each wrapper's `merge_into_base()` gives the linear that stands there from now on."""
        merged = {name: layer.merge_into_base() for name, layer in self.layers.items()}
        self.swaps.undo()
        for name, linear in merged.items():
            if self.model.get_submodule(name) is not linear:
                self.swaps.replace(name, linear)


@dataclass(frozen=True)
class LinearPatch(Patch):
    """The common case: every targeted linear is wrapped by one module. A method writes `wrap` and the module."""

    targets: str = "all-linear"  # "all-linear", a comma list of name endings ("q_proj,v_proj"), or a regex on the path

    @abstractmethod
    def wrap(self, linear: nn.Module, name: str) -> nn.Module: ...

    def surgery(self, model: PreTrainedModel) -> LinearSurgery:
        return LinearSurgery(self, model)

    def apply(self, model: PreTrainedModel, place: Place) -> LinearSurgery:
        surgery = self.surgery(model)
        targets = anatomy.target_linears(model, self.targets)
        freeze_base(model, surgery.swaps)
        for name, linear in targets.items():
            layer = self.wrap(linear, name)
            surgery.swaps.replace(name, layer)
            surgery.layers[name] = layer
        return surgery


def freeze_base(model: nn.Module, swaps: Swaps) -> None:
    """Freeze what no patch put there, before any other change; `swaps` remembers the flags for the way back."""
    if why := getattr(model, ALONE, ""):
        raise BadInput("apply a second trained patch", why, "Keep one of the two")
    keep_trainable_layout(model, swaps)
    ours = {id(p) for module in model.modules() if is_patch(module) for p in own_parameters(module)}
    for parameter in model.parameters():
        if id(parameter) not in ours and parameter.requires_grad:
            swaps.set_requires_grad(parameter, False)


def own_parameters(layer: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters of a wrapper without those of the module it wraps (its `base`; `base_layer` in peft)."""
    wrapped = (getattr(layer, name, None) for name in ("base", "base_layer"))
    base = {id(p) for module in wrapped if isinstance(module, nn.Module) for p in module.parameters()}
    return (p for p in layer.parameters() if id(p) not in base)


class Loss(NamedTuple):
    """A loss with what it counted on the way, for the log."""

    value: Tensor  # shape ()
    correct: Tensor  # how many items were predicted right
    seen: Tensor  # of how many


class Objective(ABC):
    """A batch -> a loss. `task` says which transformers head the model needs."""

    task: ClassVar[str] = "causal-lm"

    def collect(self, model: PreTrainedModel, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Any]:
        """May sample from the model (RL); by default the batch is used as it is."""
        return batch

    def prepare(self, model: PreTrainedModel) -> Surgery | None:
        """A surgery for what the objective itself trains (a fresh classification head), or None."""
        return None

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: dict[str, Any], count: Tensor | int | None = None) -> Loss:
        """-> mean loss, shape (). `count`: how many items the whole optimiser step averages over (accumulation)."""


class Stepper(ABC):
    """A loss -> new weights. One closure per micro-batch; returns the mean loss."""

    by_trainer: ClassVar[bool] = False  # True: the engine's own backward pass and optimiser are this stepper

    @abstractmethod
    def step(self, losses: Iterable[Callable[[], Tensor]]) -> float: ...
