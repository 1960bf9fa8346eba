"""A sparse change to a model's weights: for some entries of some matrices, the value to add.

`Pattern` holds the entries of one matrix by row, as compressed sparse rows. `SparseDelta` holds the changes of a whole
model, against a base with a given hash. It can be added to a model's dense weights in place and removed bit for bit,
combined with others, saved, and converted to and from PEFT's SHiRA format.

Shapes: O out, I in, K entries of a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..quiet import peft
from . import anatomy, quant

NARROW = 2**16  # matrices with fewer columns are saved with 16-bit columns
DO = "Use an intact copy of the adapter"


@dataclass(frozen=True)
class Pattern:
    """K entries of an (O, I) matrix: their columns, int32, in rising order within each row, and the row's count, int32
    (O,)."""

    columns: Tensor
    counts: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, flat: Tensor, shape: tuple[int, int]) -> Pattern:
        """From rising flat indices (row * I + column), int64."""
        rows = torch.div(flat, shape[1], rounding_mode="floor")
        counts = torch.zeros(shape[0], dtype=torch.int32, device=flat.device)
        counts.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
        return cls((flat - rows * shape[1]).to(torch.int32), counts, shape)

    @classmethod
    def decoded(cls, columns: Tensor, counts: Tensor, shape: tuple[int, int], name: str) -> Pattern:
        """From saved tensors; BadInput if they are not a pattern of an (O, I) matrix."""
        made = cls(columns.to(torch.int32), counts.to(torch.int32), shape)
        fits = counts.dim() == columns.dim() == 1 and len(counts) == shape[0]
        fits = fits and bool((made.counts >= 0).all()) and int(made.counts.sum()) == len(columns)
        if fits and len(columns):
            fits = bool((made.columns >= 0).all()) and int(made.columns.max()) < shape[1]
            fits = fits and bool((made.flat.diff() > 0).all())
        if not fits:
            raise BadInput(f"load {name}", f"its entries are not those of a {shape[0]} x {shape[1]} matrix", DO)
        return made

    def encoded(self) -> tuple[Tensor, Tensor]:
        """-> (columns, counts) as they are saved: 16 bits each if the matrix is narrow enough."""
        if self.shape[1] < NARROW:
            return self.columns.to(torch.uint16), self.counts.to(torch.uint16)
        return self.columns, self.counts

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def rows(self) -> Tensor:
        """The row of each entry, int64 (K,)."""
        return torch.repeat_interleave(self.counts.long(), output_size=len(self.columns))

    @property
    def flat(self) -> Tensor:
        """Flat indices, int64 (K,), rising."""
        return self.rows * self.shape[1] + self.columns

    @cached_property
    def starts(self) -> Tensor:
        """Where each row's entries begin, int32 (O,)."""
        return (self.counts.cumsum(0) - self.counts).to(torch.int32)


@dataclass(frozen=True)
class Part:
    """The change of one matrix: entries and what is added to each, fp32 (K,)."""

    pattern: Pattern
    values: Tensor


@dataclass(frozen=True)
class SparseDelta:
    """Path of a linear -> its change, against the base model with the hash `base`. Instances are not modified."""

    base: str
    parts: dict[str, Part]

    @property
    def entries(self) -> int:
        return sum(len(part.values) for part in self.parts.values())

    # --- arithmetic ----------------------------------------------------------------------------------------------

    def scaled(self, factor: float) -> SparseDelta:
        """All values times `factor`; -1 negates."""
        return self._each(lambda part: dataclasses.replace(part, values=part.values * factor))

    def union(self, *others: SparseDelta) -> SparseDelta:
        """The sum of several changes of one base: entries of any of them, values added where they meet."""
        for other in others:
            if other.base != self.base:
                raise BadInput("add two sparse changes", "they were made for different bases", "Use those of one base")
        every = (self, *others)
        names = dict.fromkeys(name for delta in every for name in delta.parts)
        return SparseDelta(self.base, {n: _summed([d.parts[n] for d in every if n in d.parts]) for n in names})

    def _each(self, make: Callable[[Part], Part]) -> SparseDelta:
        return SparseDelta(self.base, {name: make(part) for name, part in self.parts.items()})

    # --- on a model ----------------------------------------------------------------------------------------------

    def add_to(self, model: nn.Module, hash_of_base: str) -> Added:
        """Adds the values to the model's dense weights in place; -> how to undo it, bit for bit.

        BadInput for a base with another hash, linears that the model lacks, and bases in 4 or 8 bits.
        """
        if hash_of_base != self.base:
            have = f"it is for a base with hash {self.base}, and this one has {hash_of_base}"
            raise BadInput("add a sparse change", have, "Load the base that it was trained on")
        weights = {}
        for name, part in self.parts.items():
            weights[name] = _dense(model, name)
            if tuple(weights[name].shape) != part.pattern.shape:
                have = f"{name} is {tuple(weights[name].shape)}, not {part.pattern.shape}"
                raise BadInput("add a sparse change", have, "Load the base that it was trained on")
        return Added([_add(weights[name], part) for name, part in self.parts.items()])

    # --- files ---------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """As saved: "PATH.columns", "PATH.counts" and "PATH.values"."""
        found = {}
        for name, part in self.parts.items():
            found[f"{name}.columns"], found[f"{name}.counts"] = part.pattern.encoded()
            found[f"{name}.values"] = part.values.detach()
        return found

    @classmethod
    def from_tensors(cls, base: str, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]]) -> SparseDelta:
        """`shapes`: (O, I) of each path. BadInput for tensors that are no such change."""
        parts = {}
        for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
            three = [tensors.get(f"{name}.{key}") for key in ("columns", "counts", "values")]
            if name not in shapes or any(t is None for t in three) or three[0].shape != three[2].shape:  # type: ignore[union-attr]
                raise BadInput(f"load {name}", "it is not the change of a linear of this model", DO)
            columns, counts, values = three
            parts[name] = Part(Pattern.decoded(columns, counts, shapes[name], name), values)  # type: ignore[arg-type]
        return cls(base, parts)

    def to_shira(self) -> tuple[Any, dict[str, Tensor]]:
        """-> (ShiraConfig, tensors) that stock peft loads.

        PEFT has one rank r for all layers and r (O + I) entries in each: layers with fewer get entries of value zero.
        """
        rank = max(1, max(-(-len(p.values) // sum(p.pattern.shape)) for p in self.parts.values()))
        tensors = {}
        for name, part in self.parts.items():
            rows, columns = part.pattern.shape
            flat, values = _padded(part, min(rank * (rows + columns), rows * columns))
            row = torch.div(flat, columns, rounding_mode="floor")
            indices = torch.stack([row, flat - row * columns]).to(torch.int32)
            tensors[f"base_model.model.{name}.shira_weight"] = values
            tensors[f"base_model.model.{name}.shira_indices"] = indices
        return peft().ShiraConfig(r=rank, target_modules=sorted(self.parts)), tensors

    @classmethod
    def from_shira(cls, base: str, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]]) -> SparseDelta:
        """From the tensors of an adapter that peft's SHiRA saved; entries of value zero are left out."""
        parts, prefix = {}, "base_model.model."
        for key, values in tensors.items():
            name, _, leaf = key.removeprefix(prefix).rpartition(".")
            indices = tensors.get(key.replace("shira_weight", "shira_indices"))
            if leaf == "shira_indices":
                continue
            if leaf != "shira_weight" or indices is None or name not in shapes or indices.shape != (2, len(values)):
                raise BadInput(
                    f"read {key}", "it is not a SHiRA tensor of this model", "Use an adapter of peft's SHiRA"
                )
            flat = indices[0].long() * shapes[name][1] + indices[1].long()
            order = flat.argsort()
            order = order[values[order] != 0]
            made = Pattern.of(flat[order], shapes[name])
            parts[name] = Part(Pattern.decoded(*made.encoded(), shapes[name], name), values[order].float())
        return cls(base, parts)


class Added:
    """A change that was added to a model's weights. `undo` writes the original values back."""

    def __init__(self, written: list[tuple[Tensor, Tensor, Tensor]]):
        self._written = written

    def undo(self) -> None:
        while self._written:
            weight_OI, flat, originals = self._written.pop()
            weight_OI.put_(flat, originals)


class Tasks:
    """Several changes of one model, of which one is in its weights at a time: `switch` costs a write of its entries."""

    def __init__(self, model: nn.Module, hash_of_base: str, deltas: dict[str, SparseDelta] | None = None):
        self.model, self.hash, self.deltas = model, hash_of_base, dict(deltas or {})
        self.current: str | None = None
        self._added: Added | None = None

    def switch(self, task: str | None) -> None:
        """Puts the change of `task` into the weights in place of the present one; None: the base's own weights."""
        if task is not None and task not in self.deltas:
            have = f"there are {', '.join(self.deltas) or 'none'}"
            raise BadInput(f'task "{task}"', have, "Name one of these, or add it to deltas")
        if self._added is not None:
            self._added.undo()
            self._added = self.current = None
        if task is not None:
            self._added, self.current = self.deltas[task].add_to(self.model, self.hash), task


def _dense(model: nn.Module, name: str) -> Tensor:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if linear is None or not anatomy.is_linear(linear):
        raise BadInput(f"add a sparse change to {name}", "the model has no such linear", "Load the base of the change")
    if quant.is_quantised(linear):
        have = f"its weights are stored as {quant.stored_as(linear)}, which cannot be changed entry by entry"
        raise BadInput(f"add a sparse change to {name}", have, "Load the base in bf16 or fp32, or apply it as a patch")
    return anatomy.dense_view(linear).data


@torch.no_grad()
def _add(weight_OI: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    flat = part.pattern.flat
    originals = weight_OI.take(flat)
    weight_OI.put_(flat, originals + part.values.to(weight_OI))
    return weight_OI, flat, originals


def _summed(parts: Iterable[Part]) -> Part:
    parts = list(parts)
    shape = parts[0].pattern.shape
    flat, place = torch.cat([part.pattern.flat for part in parts]).unique(return_inverse=True)
    values = torch.zeros(len(flat)).index_add_(0, place, torch.cat([part.values.float() for part in parts]))
    return Part(Pattern.of(flat, shape), values)


def _padded(part: Part, entries: int) -> tuple[Tensor, Tensor]:
    """Flat indices and values, with unused indices of value zero up to `entries` of them."""
    flat = part.pattern.flat
    unused = torch.ones(part.pattern.shape[0] * part.pattern.shape[1], dtype=torch.bool)
    unused[flat] = False
    more = unused.nonzero().squeeze(1)[: entries - len(flat)]
    return torch.cat([flat, more]), torch.cat([part.values.detach().float(), torch.zeros(len(more))])
