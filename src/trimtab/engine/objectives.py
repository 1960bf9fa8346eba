"""Imports the trainer and the evaluation function that an objective names."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..contracts import Objective

if TYPE_CHECKING:
    from transformers import TrainingArguments


def trainer_class(objective: Objective) -> Any:
    """A subclass of transformers' Trainer with `arguments`, the dataclass for `training:`, and `build(job, recipe,
    model, args, inputs)`, which tokenises the rows."""
    return _named(objective.trainer)


def arguments_class(objective: Objective) -> type[TrainingArguments]:
    return trainer_class(objective).arguments


def evaluator(objective: Objective) -> Any:
    """A function (Inference, limit, say) -> {"rows", "metrics", "samples"} (inference/evaluate.py)."""
    return _named(objective.evaluator)


def _named(target: str) -> Any:
    module, name = target.split(":")
    return getattr(import_module(module), name)
