"""What a trainer of ours is given: what was read for it, and what it is to do."""

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
    """The tokenizer, and the rows of `data.train` and, where the run evaluates on the way, of `data.test`."""

    tokenizer: Any
    rows: Rows
    test: Rows | None

    @property
    def labels(self) -> int | None:
        """How many classes a classifier's head has: 1 for regression."""
        return 1 if self.rows.regression else len(self.rows.labels) if self.rows.labels else None


@dataclass
class Job:
    """All that a trainer of ours is given beside the model and the data."""

    objective: Objective
    stepper: Stepper
    surgeries: Sequence[Surgery]
    base: adapter.Base
    dtype: torch.dtype | None = None  # the base's, before any patch
    too_long: str = "error"
    say: Any = print
    part: str | None = None  # which data its rows are of, "train" or "test", where the library's name for them misleads

    @classmethod
    def without_patches(cls, recipe: Recipe, model: Any, part: str | None = None) -> Job:
        """For a trainer that only reads rows or evaluates; it says nothing."""
        base = adapter.Base(recipe.model.name, "")
        return cls(
            recipe.load_objective(), recipe.load_stepper(), [], base, model.dtype, recipe.data.too_long,
            lambda line: None, part,
        )  # fmt: skip
