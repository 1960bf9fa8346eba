"""Base of patches that train a sparse set of entries of each targeted linear, chosen by a score (model/scores.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Batch, Place, Portable
from ..errors import BadInput
from ..model import anatomy
from ..model.scores import OF_DATA, Score, best_entries, entries_of
from ..model.sparse_delta import Pattern, SparseDelta
from ..model.sparse_linear import SparseLinear
from .linear import LinearPatch, LinearSurgery

UNCHOSEN = "the weights to train were not chosen by data: call calibrate(batches) before training"


@dataclass(frozen=True)
class SparsePatch(LinearPatch):
    """Trains the entries of each targeted weight that score highest."""

    score: Score = "fisher"  # fisher, gradient_weight, weight or random; the first two read data
    scope: Literal["global", "linear"] = "global"  # the best of all linears together, or of each
    rows: int = 32  # rows of data that the score reads
    calibration: str = ""  # a file of text for the score; without one, rows of data.train
    seed: int = 0

    @property
    def share(self) -> float:
        """The share of the targeted weights that get an entry."""
        raise NotImplementedError

    @property
    def calibration_rows(self) -> int:
        return self.rows if self.score in OF_DATA else 0

    @property
    def calibration_file(self) -> str:
        return self.calibration

    def wrap(self, linear: nn.Module, name: str) -> SparseLinear:
        columns, rows = anatomy.widths(linear)
        return SparseLinear(linear, entries_of(self.share, (rows, columns)))

    def surgery(self, model: PreTrainedModel) -> SparseSurgery:
        return SparseSurgery(self, model)

    def apply(self, model: PreTrainedModel, place: Place) -> Any:
        if self.rows < 1 and self.score in OF_DATA:
            raise BadInput(f"{type(self).__name__}: rows: {self.rows}", "the score reads data", "Set rows: 32")
        surgery = super().apply(model, place)
        surgery.notes, surgery.folder = anatomy.unreached(model, self.targets), place.folder
        surgery.choose()
        return surgery


class SparseSurgery(LinearSurgery):
    """Linears with sparse changes. Until `calibrate`, a score that reads data has entries at equal distances."""

    patch: SparsePatch
    layers: dict[str, SparseLinear]
    folder: str | None = None

    @torch.no_grad()
    def choose(self) -> None:
        """Chooses the entries without data."""
        device = next(iter(self.layers.values())).values.device
        if self.patch.score in OF_DATA or device.type == "meta":  # a plan has shapes but no values
            for layer in self.layers.values():
                count, whole = len(layer.values), layer.out_features * layer.in_features
                flat = torch.arange(count, device=device) * whole // count
                layer.set_pattern(Pattern.of(flat, layer.shape))
            if device.type != "meta":
                self.notes += (UNCHOSEN,)
            return
        self.set_patterns(self._best(()))

    def calibrate(self, batches: Iterable[Batch]) -> None:
        self.notes = tuple(note for note in self.notes if note != UNCHOSEN)
        self.set_patterns(self._best(batches))

    def _best(self, batches: Iterable[Batch]) -> dict[str, Pattern]:
        patch = self.patch
        return best_entries(
            self.model, dict(self.layers), patch.share, patch.score, patch.scope, patch.seed, batches, self.folder
        )

    def set_patterns(self, patterns: dict[str, Pattern]) -> None:
        """New entries for every layer, with values of zero."""
        for name, pattern in patterns.items():
            self.layers[name].set_pattern(pattern)

    def delta(self, hash_of_base: str = "") -> SparseDelta:
        """The change as it stands."""
        return SparseDelta(hash_of_base, {name: layer.part() for name, layer in self.layers.items()})

    # --- files ---------------------------------------------------------------------------------------------------

    def own_tensors(self) -> dict[str, Tensor]:
        found = super().own_tensors()
        for name, layer in self.layers.items():
            found[f"{name}.columns"], found[f"{name}.counts"] = layer.pattern.encoded()
        return found

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The number of entries of each linear is that of the saved tensors."""
        parts = {}
        for name, layer in self.layers.items():
            three = [tensors.get(f"{name}.{key}") for key in ("columns", "counts", "values")]
            if all(tensor is not None for tensor in three) and three[0].dim() == 1 and three[0].shape == three[2].shape:  # type: ignore[union-attr]
                parts[name] = Pattern.decoded(three[0], three[1], layer.shape, name)  # type: ignore[arg-type]
        if parts.keys() == self.layers.keys():
            self.set_patterns(parts)
        super().load_tensors(tensors)

    def portable(self) -> Portable:
        """A SHiRA adapter of peft."""
        if any(isinstance(layer.base, anatomy.Conv1D) for layer in self.layers.values()):
            have = "peft's SHiRA covers nn.Linear only, and this model has GPT-2's Conv1D"
            raise BadInput(f"export {type(self.patch).__name__} to peft", have, "Export it merged")
        return Portable(*self.delta().to_shira())
