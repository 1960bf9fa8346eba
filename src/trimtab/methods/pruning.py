"""Magnitude pruning, and Wanda: A Simple and Effective Pruning Approach for LLMs (Sun et al., arXiv 2306.11695).

Sets a share of each linear's weights to zero, once, without training:

    magnitude   the smallest |W_ij| of the whole matrix
    wanda       in each output row i, the smallest |W_ij| * ||x_j||_2                        (equation 1)

    W: (out, in)   x_j: input feature j over all calibration tokens that count   `sparsity`: the share set to zero

Wanda prunes block by block: ||x_j|| of each block is measured after the blocks before it were pruned (algorithm 1).
With `pattern: "2:4"`, two of each four neighbouring weights of a row are set to zero, for both scores.

The pruned weights are copies. The originals are kept for `revert`; if the base is mapped from its file, they use no
fast memory. The adapter stores one bit per weight. A patch that is trained on top adds its change to the pruned
weights, so they stay zero after merging only if that change is zero there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bases.pruned import PrunedSurgery, check_share, prunable
from ..contracts import Batch, Patch, Place, When
from ..errors import BadInput
from ..model import anatomy
from ..model.block_inputs import by_linears


@dataclass(frozen=True)
class Pruning(Patch):
    """Sets the least important weights of each targeted linear to zero."""

    paper: ClassVar[str] = "2306.11695"
    when: ClassVar[When] = When.BOTH

    sparsity: float = 0.5  # share of the weights that become zero
    score: Literal["magnitude", "wanda"] = "magnitude"
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    targets: str = "all-linear"  # "all-linear", a comma list of name endings, or a regex on the path
    rows: int = 64  # rows of data.train that Wanda reads

    @property
    def calibration_rows(self) -> int:
        return self.rows if self.score == "wanda" else 0

    def apply(self, model: PreTrainedModel, place: Place) -> PruningSurgery:
        check_share("pruning", self.sparsity, self.pattern)
        if self.rows < 1:
            raise BadInput(f"pruning: rows: {self.rows}", "Wanda needs at least one row", "Set rows: 64")
        linears = prunable(model, "pruning", self.targets, self.pattern)
        surgery = PruningSurgery(self, model, linears, place.folder)
        if self.score == "magnitude":
            for name in linears:
                surgery.prune(name, None)
        return surgery


class PruningSurgery(PrunedSurgery):
    patch: Pruning

    def __init__(self, patch: Pruning, model: PreTrainedModel, linears: dict[str, nn.Module], folder: str | None):
        super().__init__(patch, model, linears)
        self.folder = folder
        self.masks: dict[str, Tensor] = {}  # path -> one bit per weight, set where the weight stays; uint8
        for name, linear in linears.items():
            size = -(-linear.weight.numel() // 8)
            self.masks[name] = torch.full((size,), 255, dtype=torch.uint8, device=linear.weight.device)
            linear.weight.data = linear.weight.data.clone()

    @torch.no_grad()
    def prune(self, name: str, norms_I: Tensor | None) -> None:
        """Chooses and prunes the weights of one linear. `norms_I`: ||x_j|| of each input; None: magnitude."""
        score_OI = anatomy.dense_view(self.linears[name]).detach().abs().float()
        if norms_I is not None:
            score_OI = score_OI * norms_I
        if score_OI.is_meta:
            return
        self.masks[name].copy_(_packed(self._kept(score_OI, by_row=norms_I is not None)))
        self._write(name)

    def _kept(self, score_OI: Tensor, by_row: bool) -> Tensor:
        """(out, in), True where the weight is kept."""
        groups = score_OI.reshape(-1, 4) if self.patch.pattern == "2:4" else score_OI
        groups = groups if by_row or self.patch.pattern == "2:4" else groups.reshape(1, -1)
        gone = int(self.patch.sparsity * groups.shape[-1])
        kept = torch.ones_like(groups, dtype=torch.bool)
        kept.scatter_(-1, groups.topk(gone, largest=False).indices, False)
        return kept.view_as(score_OI)

    def calibrate(self, batches: Iterable[Batch]) -> None:
        for within, read in by_linears(self.model, batches, self.linears, self.folder):
            sums = {name: torch.zeros(anatomy.widths(m)[0], device=m.weight.device) for name, m in within.items()}

            def seen(name: str, x_TI: Tensor, sums: dict[str, Tensor] = sums) -> None:
                sums[name] += x_TI.float().square().sum(0)

            read(seen)
            for name, sum_I in sums.items():
                self.prune(name, sum_I.sqrt())

    def _write(self, name: str) -> None:
        weight_OI = anatomy.dense_view(self.linears[name]).data
        weight_OI.copy_(_view(self.linears[name], self.originals[name]))
        weight_OI.masked_fill_(~_unpacked(self.masks[name], weight_OI.shape), 0)

    def own_tensors(self) -> dict[str, Tensor]:
        return {f"{name}.mask": mask for name, mask in self.masks.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_tensors(tensors)
        with torch.no_grad():
            for name in self.linears:
                self._write(name)


def _view(linear: nn.Module, weight: Tensor) -> Tensor:
    return weight.t() if isinstance(linear, anatomy.Conv1D) else weight


def _packed(kept: Tensor) -> Tensor:
    """Bits of a boolean tensor, in order, eight to a byte."""
    flat = torch.nn.functional.pad(kept.flatten().to(torch.uint8), (0, -kept.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(-1).to(torch.uint8)


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    every = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return every.flatten()[: shape.numel()].view(shape).bool()
