"""Reads `training:` of a recipe into the libraries' own dataclass: SFTConfig, GRPOConfig or
TrainingArguments."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from transformers import TrainingArguments, get_scheduler

from ..contracts import Objective, Stepper
from ..errors import BadInput, nearest
from ..recipe import Recipe
from ..validation import booleans
from .fields import REFUSED, check_fields
from .optimizers import name_of, require_library


def training_arguments(recipe: Recipe, cls: type[TrainingArguments], output: Path, cpu: bool) -> TrainingArguments:
    """`training:` as an instance of `cls`. BadInput for unknown fields and bad values."""
    values = recipe.training_values()
    if time_limit(recipe) is not None and values.get("save_only_model"):
        have = "a checkpoint without the optimizer's state cannot be resumed exactly"
        raise BadInput("training: max_minutes with save_only_model: true", have, "Remove one of the two")
    values.pop("max_minutes", None)
    length = values["max_length"] if isinstance(values["max_length"], int) else 512
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    if "max_length" not in known:  # rows are tokenised by trimtab, up to it
        values.pop("max_length")
        if "num_generations" not in known and values.pop("packing", False):
            raise BadInput("training: packing: true", "a classifier reads one text per row", "Leave it out")
    for key in values:
        if key not in known:
            do = nearest(str(key), known | {"max_minutes"})
            raise BadInput(f'training: "{key}"', f"{cls.__name__} has no such field", do)
    if values.get("fsdp"):  # its type differs between versions
        raise BadInput(f"training: fsdp: {str(values['fsdp'])[:60]}", *REFUSED["fsdp"])
    kinds = get_type_hints(cls)
    values = {key: _typed(key, value, kinds[key]) for key, value in values.items()}
    ours = {"output_dir": str(output), "use_cpu": cpu, "disable_tqdm": True, "dataloader_pin_memory": not cpu}
    check_fields(values, cls, recipe.training)
    if values.get("activation_offloading") and cpu:
        raise BadInput(
            "training: activation_offloading: true", "on a CPU activations are in RAM already",
            "Set activation_checkpointing: true",
        )  # fmt: skip
    options = values.get("activation_checkpointing_kwargs") or {}
    if options.get("offload") and cpu:
        raise BadInput(
            "training: activation_checkpointing_kwargs: {offload: true}", "on a CPU activations are in RAM already",
            "Leave offload out",
        )  # fmt: skip
    every = options.get("every_n_layers", 1)
    if type(every) is not int or every < 1:
        have = "it must be a whole number of 1 or more: every n-th block is checkpointed"
        raise BadInput(f"training: activation_checkpointing_kwargs: every_n_layers: {every!r}", have, "Set it to 2")
    values.setdefault("bf16", False)
    if values.get("packing") and values["max_length"] is None and values.get("completion_only_loss") is None:
        raise BadInput("training: packing: true", "max_length is None", "Give max_length")
    try:
        made = cls(**{**values, **{k: v for k, v in ours.items() if k not in values}})
        if values.get("pad_to_multiple_of", "auto") == "auto":
            # oneDNN caches code for each shape: a few distinct batch lengths cost less than the padding
            made.pad_to_multiple_of = (16 if length >= 128 else 8) if cpu else None
        _try_schedule(made)
        return made
    except (TypeError, ValueError, ImportError) as error:
        raise BadInput("training", str(error).strip().splitlines()[0], "Correct the value") from error


def time_limit(recipe: Recipe) -> float | None:
    """`training.max_minutes` in seconds; None if the recipe has none."""
    minutes = recipe.training.get("max_minutes")
    if minutes is None:
        return None
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes < math.inf:
        raise BadInput(
            f"training: max_minutes: {str(minutes)[:60]}", "it must be a number above 0", "Correct the value"
        )
    return 60.0 * minutes


def _try_schedule(args: TrainingArguments) -> None:
    """Tries `lr_scheduler_kwargs` before anything is loaded; the library reads them only when training begins."""
    if args.lr_scheduler_kwargs:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        options = dict(args.lr_scheduler_kwargs)
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 10, scheduler_specific_kwargs=options)


def weighed(objective: Objective, args: TrainingArguments) -> Objective:
    """The objective with `label_smoothing_factor`, `loss_type`, `temperature` and `beta` of `training:`."""
    changes: dict[str, Any] = {}
    if args.label_smoothing_factor:
        changes["smoothing"] = args.label_smoothing_factor
    if getattr(args, "loss_type", "nll") == "dft":
        changes["dft"] = True
    for key in ("temperature", "beta", "use_bias_correction_kl"):
        if hasattr(objective, key):
            changes[key] = getattr(args, key)
    made = dataclasses.replace(objective, **changes)  # type: ignore[type-var]
    if getattr(made, "smoothing", 0.0) and getattr(made, "dft", False):
        raise BadInput("training: label_smoothing_factor with loss_type: dft", "DFT does not support smoothed labels",
                       "Keep one of the two")  # fmt: skip
    return made


def check_optimizer(recipe: Recipe, args: TrainingArguments) -> None:
    """BadInput for an optimizer that would not be used, or that cannot step the rows of a patch's tables."""
    stepper, objective, patches = recipe.load_stepper(), recipe.load_objective(), recipe.load_patches()
    for part in (stepper, objective):
        for key in recipe.training.keys() & part.ignored.keys():
            if not recipe.training[key]:  # switched off: nothing was asked for
                continue
            have = part.ignored[key]
            raise BadInput(f"training: {key} with {type(part).__name__}", have, f"Remove {key}")
    require_library(args, recipe.place.device)
    if stepper.uses_gradients and not objective.differentiable:
        asked = f"objective: {recipe.objective} with stepper: {recipe.stepper}"
        raise BadInput(asked, "the loss has no gradient", "Set stepper: mezo")
    for part, kind in (*((patch, "patch") for patch in patches), (objective, "objective")):
        if part.gradient_reason and not stepper.uses_gradients:
            asked = f"{type(part).__name__} with {type(stepper).__name__}"
            raise BadInput(asked, part.gradient_reason, f"Set stepper: backprop, or use another {kind}")
    tables = [patch for patch in patches if patch.uses_tables]
    if type(stepper).optimizer is not Stepper.optimizer:
        name = type(stepper).__name__
        if "optim" in recipe.training:
            asked = f"training: optim: {recipe.training['optim']} with {name}"
            raise BadInput(asked, f"{name} has an optimizer of its own", "Remove optim")
        if tables:
            asked = f"{name} with {type(tables[0]).__name__}"
            raise BadInput(asked, "in the slow tier only Adam steps", "Set stepper: backprop")
    if tables and args.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise BadInput(
            f"training: optim: {name_of(args)} with {type(tables[0]).__name__}",
            "in the slow tier only Adam steps", "Set optim: adamw_torch",
        )  # fmt: skip


def _typed(key: str, value: Any, kind: Any) -> Any:
    """`value` converted to a training field's type; false also means the text "no", as in `save_strategy: false`."""
    try:
        adapter_of = TypeAdapter(kind)
    except PydanticSchemaGenerationError:
        return booleans(value)
    for candidate in (value, "no") if value is False else (value,):
        try:
            read = adapter_of.validate_python(candidate)
        except ValidationError as error:
            why = error.errors()[0]["msg"].lower()
        else:
            return booleans(read) if isinstance(read, dict) else read
    raise BadInput(f"training: {key}: {value!r}", why, "Give a value of that type")
