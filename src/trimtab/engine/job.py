"""What a trainer is built from: its inputs and its job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..artifacts import adapter
from ..contracts import Objective, Stepper, Surgery
from ..data.rows import Rows
from ..recipe import Recipe


@dataclass
class Inputs:
    """The tokenizer, and the rows of `data.train` and, if the run evaluates during training, of `data.test`."""

    tokenizer: Any
    rows: Rows
    test: Rows | None

    @property
    def labels(self) -> int | None:
        """Number of outputs of a classifier's head: 1 for regression; None for a language model."""
        return 1 if self.rows.regression else len(self.rows.labels) if self.rows.labels else None


@dataclass
class Job:
    """What a trainer needs beside the model and the data."""

    objective: Objective
    stepper: Stepper
    surgeries: Sequence[Surgery]
    base: adapter.Base
    dtype: torch.dtype | None = None  # the base's, before any patch
    too_long: str = "error"
    say: Any = print
    part: str | None = None  # "train" or "test": the data of its rows, if the library's name for them is another

    @classmethod
    def without_patches(cls, recipe: Recipe, model: Any, part: str | None = None) -> Job:
        """A silent job for a trainer that only reads rows or evaluates."""
        base = adapter.Base(recipe.model.name, "")
        return cls(
            recipe.load_objective(), recipe.load_stepper(), [], base, model.dtype, recipe.data.too_long,
            lambda line: None, part,
        )  # fmt: skip
