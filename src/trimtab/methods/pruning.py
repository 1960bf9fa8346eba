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

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Batch, Patch, Place, Surgery, When
from ..errors import BadInput
from ..model import anatomy, quant
from ..model.block_inputs import by_blocks
from ..model.surgery import Swaps


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
        self._check()
        linears = anatomy.target_linears(model, self.targets)
        for name, linear in linears.items():
            if not anatomy.is_linear(linear):
                raise BadInput(f"pruning: {name}", "another patch wraps it", "Name pruning before the other patch")
            if quant.is_quantised(linear):
                have = "its base is stored in 4 or 8 bits, which cannot represent zero exactly"
                raise BadInput(f"pruning: {name}", have, "Load the base in bf16")
            if self.pattern == "2:4" and anatomy.widths(linear)[0] % 4:
                have = f"{name} has {anatomy.widths(linear)[0]} inputs, not a multiple of 4"
                raise BadInput('pruning: pattern: "2:4"', have, "Leave it out of targets")
        surgery = PruningSurgery(self, model, linears)
        if self.score == "magnitude":
            for name in linears:
                surgery.prune(name, None)
        return surgery

    def _check(self) -> None:
        if not 0 < self.sparsity < 1:
            raise BadInput(f"pruning: sparsity: {self.sparsity}", "it must be above 0 and below 1", "Set it to 0.5")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            asked = f'pruning: pattern: "2:4" with sparsity: {self.sparsity}'
            raise BadInput(asked, "two of four are one half", "Set sparsity: 0.5")
        if self.rows < 1:
            raise BadInput(f"pruning: rows: {self.rows}", "Wanda needs at least one row", "Set rows: 64")


class PruningSurgery(Surgery):
    starts_at_zero = False

    def __init__(self, patch: Pruning, model: PreTrainedModel, linears: dict[str, nn.Module]):
        self.patch, self.model, self.linears = patch, model, linears
        self.swaps = Swaps(model)
        self.originals: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}  # path -> one bit per weight, set where the weight stays; uint8
        for name, linear in linears.items():
            weight_OI = anatomy.dense_view(linear)
            size = -(-weight_OI.numel() // 8)
            self.masks[name] = torch.full((size,), 255, dtype=torch.uint8, device=weight_OI.device)
            self.originals[name] = linear.weight.data
            linear.weight.data = linear.weight.data.clone()
            self.swaps.on_undo(lambda linear=linear, name=name: _put(linear, self.originals[name]))

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
        names = {id(linear): name for name, linear in self.linears.items()}
        for _, block, run in by_blocks(self.model, batches):
            within = {names[id(m)]: m for m in block.modules() if id(m) in names}
            sums = {name: torch.zeros(anatomy.widths(m)[0], device=m.weight.device) for name, m in within.items()}
            inputs: dict[str, Tensor] = {}

            def seen(_: nn.Module, args: tuple, name: str, inputs: dict[str, Tensor] = inputs) -> None:
                inputs[name] = args[0]

            handles = [m.register_forward_pre_hook(functools.partial(seen, name=n)) for n, m in within.items()]
            for mask_BT in run():
                for name, x in inputs.items():
                    counts = mask_BT is not None and mask_BT.dim() == 2 and mask_BT.shape == x.shape[:2]
                    x_TI = (x[mask_BT.bool()] if counts else x).reshape(-1, x.shape[-1]).float()
                    sums[name] += x_TI.square().sum(0)
                inputs.clear()
            for handle in handles:
                handle.remove()
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

    def revert(self) -> None:
        self.swaps.undo()

    def merge(self) -> None:
        """Keeps the pruned weights in the model."""
        kept = {name: linear.weight.data for name, linear in self.linears.items()}
        self.swaps.undo()
        for name, linear in self.linears.items():
            linear.weight.data = kept[name]


def _view(linear: nn.Module, weight: Tensor) -> Tensor:
    return weight.t() if isinstance(linear, anatomy.Conv1D) else weight


def _put(linear: nn.Module, original: Tensor) -> None:
    linear.weight.data = original


def _packed(kept: Tensor) -> Tensor:
    """Bits of a boolean tensor, in order, eight to a byte."""
    flat = torch.nn.functional.pad(kept.flatten().to(torch.uint8), (0, -kept.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(-1).to(torch.uint8)


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    every = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return every.flatten()[: shape.numel()].view(shape).bool()
