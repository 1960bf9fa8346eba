"""SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot (Frantar and Alistarh, arXiv 2301.00774).

Sets a share of each linear's weights to zero, once, and changes the other weights so that the linear's outputs on the
calibration tokens stay as close as they can. Columns are treated from left to right; what a column loses is made up for
by the columns to its right, which have not been treated yet.

    H = 2 X X^T + damping     H^-1 = U^T U,  U upper triangular                                  (section 3.2, 3.3)
    M: the smallest  W_ij^2 / U_jj^2  of a block of B_s columns, or of each m columns of a row   (equation 5; 3.4)
    e_j = (W_:j - q(W_:j)) / U_jj,   W_:k -= e_j U_jk  for k > j                                 (equation 3; alg. 1)

    X: (in, tokens), inputs of the linear   W: (out, in)   q: zero where M prunes, else W, rounded if `bits` is 4
    U_jj^2 is [H_F^-1]_jj for F = {j, ..}: the Cholesky factor holds the inverse of every H that is left (3.3)

The blocks of the model run one by one on the outputs of those pruned before them. Updates to the right of a block of
`BLOCK` columns are made once for the whole block (lazy batch updates, section 3.4); U is computed once for linears that
read the same input. The damping is 1 % of the mean diagonal of H, as in the paper, and ten times more where the
Cholesky decomposition fails. An input that is always zero is dropped, since its weights change nothing.

What differs from the paper, and why. Mask and update use blocks of the same width, 128 columns (section 3.4 has B_s = B
= 128 too). With `bits: 4` a row has one grid of 16 points for each block of 128 columns, and zero is one of them; the
paper rounds jointly too (section 3.5) and leaves the grid open. The result is saved, not the mask: the pruned weights
as they are, which lie in a file of the slow tier. So memory above the mapped base is one block's Hessians and weights.

A trained patch that leaves the weights alone (parallel_adapter, meft, lst), or trains only entries of which none is
zero (senszoq with `score: weight` or `gradient_weight`), keeps the zeros. The others fill them when they are merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bases.pruned import PATTERNS, PrunedSurgery, check_share, prunable
from ..contracts import Batch, Patch, Place, When
from ..errors import BadInput
from ..model import anatomy
from ..model.block_inputs import by_linears
from ..tiered.mapped_file import mapped_like, slow_kind

BLOCK = 128  # columns of a block: B and B_s, section 3.4
DAMPING = 0.01  # of the mean diagonal of H
LEVELS = 15  # steps of a grid of 4 bits


@dataclass(frozen=True)
class SparseGPT(Patch):
    """Prunes each targeted linear by second-order information of its inputs, and makes up for it in what stays."""

    paper: ClassVar[str] = "2301.00774"
    when: ClassVar[When] = When.BOTH

    sparsity: float = 0.5  # share of the weights that become zero
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"  # n:m: n of each m neighbouring weights stay
    bits: Literal[16, 4] = 16  # 4: what stays is rounded to 16 values per row and 128 columns, in the same pass
    targets: str = "all-linear"  # "all-linear", a comma list of name endings, or a regex on the path
    rows: int = 128  # rows of data that it reads (section 4: 128)
    calibration: str = ""  # a file of text to read; without one, rows of data.train

    @property
    def calibration_rows(self) -> int:
        return self.rows

    @property
    def calibration_file(self) -> str:
        return self.calibration

    def apply(self, model: PreTrainedModel, place: Place) -> SparseGPTSurgery:
        check_share("sparsegpt", self.sparsity, self.pattern)
        if self.rows < 1:
            raise BadInput(f"sparsegpt: rows: {self.rows}", "the Hessian is that of data", "Set rows: 128")
        return SparseGPTSurgery(self, model, prunable(model, "sparsegpt", self.targets, self.pattern), place)


class SparseGPTSurgery(PrunedSurgery):
    """`pruned`: path -> the weight as the linear stores it, which replaces the original once it is known."""

    patch: SparseGPT

    def __init__(self, patch: SparseGPT, model: PreTrainedModel, linears: dict[str, nn.Module], place: Place):
        super().__init__(patch, model, linears)
        self.folder, device = place.folder, next(iter(self.originals.values())).device
        self.notes = anatomy.unreached(model, patch.targets)
        in_file = slow_kind(place.slow, place.device if device.type == "meta" else device) == "disk"
        in_file = in_file and device.type in ("cpu", "meta")
        if in_file and device.type != "meta":
            self.pruned = mapped_like(self.originals, place.folder, "the pruned weights")
        else:
            self.pruned = {name: torch.empty_like(weight) for name, weight in self.originals.items()}
        self.in_slow_tier = list(self.pruned.values()) if in_file else []
        if device.type == "meta":  # a plan sees the weights that training will
            self._use(self.pruned)

    def _use(self, names: Iterable[str]) -> None:
        for name in names:
            self.linears[name].weight.data = self.pruned[name]  # type: ignore[union-attr]

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        few: dict[str, int] = {}
        held: dict[tuple[int, int], Tensor] = {}  # (width, number) -> a Hessian; the same memory for every block
        for within, read in by_linears(self.model, batches, self.linears, self.folder):
            groups = anatomy.shared_input_groups(list(within))
            groups.sort(key=lambda group: anatomy.widths(within[group[0]])[0])
            sums = {group[0]: _zeros(held, within[group[0]], at) for at, group in enumerate(groups)}
            counts = dict.fromkeys(sums, 0)

            def seen(name: str, x_TI: Tensor, sums: dict[str, Tensor] = sums, counts: dict[str, int] = counts) -> None:
                if name in sums:
                    x_TI = x_TI.float()
                    sums[name].addmm_(x_TI.T, x_TI)
                    counts[name] += len(x_TI)

            read(seen)
            for first, *others in groups:
                if counts[first] < len(sums[first]):
                    few[first] = counts[first]
                hessian_II = sums[first].mul_(2 / max(1, counts[first]))
                root_II, dead_I = inverse_root(hessian_II, _zeros(held, within[first], -1))
                for name in (first, *others):
                    self._prune(name, within[name], root_II, dead_I)
        if few:
            name, count = min(few.items(), key=lambda item: item[1])
            self.notes += (
                f"sparsegpt: {len(few)} groups of linears read fewer tokens than they have inputs ({name}: {count}): "
                "more rows of calibration prune better",
            )

    def _prune(self, name: str, linear: nn.Module, root_II: Tensor, dead_I: Tensor) -> None:
        weight_OI = anatomy.dense_view(linear).detach()
        weight_IO = weight_OI.T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        weight_IO[dead_I] = 0
        prune(weight_IO, root_II, self.patch.sparsity, PATTERNS[self.patch.pattern], self.patch.bits)
        self.pruned[name].copy_(weight_IO if isinstance(linear, anatomy.Conv1D) else weight_IO.T)
        self._use([name])

    def own_tensors(self) -> dict[str, Tensor]:
        return {f"{name}.pruned": weight for name, weight in self.pruned.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self._use(self.linears)


def _zeros(held: dict[tuple[int, int], Tensor], linear: nn.Module, number: int) -> Tensor:
    """(in, in) in fp32, from `held`: a Hessian, or with -1 the memory for its inverse."""
    width = anatomy.widths(linear)[0]
    if (width, number) not in held:
        held[width, number] = torch.empty(width, width, dtype=torch.float32, device=linear.weight.device)  # type: ignore[union-attr]
    return held[width, number].zero_()


def inverse_root(hessian_II: Tensor, out_II: Tensor) -> tuple[Tensor, Tensor]:
    """-> U, (in, in) upper triangular with H^-1 = U^T U after damping, and which inputs are always zero, (in,).

    U is in the memory of `out_II`; `hessian_II` gets the damping. Without any token H is the identity: the weights are
    then pruned by magnitude.
    """
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    if dead_I.all():
        return hessian_II.fill_diagonal_(1), torch.zeros_like(dead_I)
    mean = diagonal_I.mean().item()
    diagonal_I.masked_fill_(dead_I, 1)
    damping, failed = 0.0, torch.zeros((), dtype=torch.int32, device=hessian_II.device)
    for more in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        diagonal_I.add_((more - damping) * mean)
        damping = more
        torch.linalg.cholesky_ex(hessian_II, out=(out_II, failed))
        if not failed:
            torch.cholesky_inverse(out_II, out=out_II)
            torch.linalg.cholesky_ex(out_II, upper=True, out=(out_II, failed))
            if not failed:
                return out_II, dead_I
    have = "the Hessian of a linear's inputs is not positive definite: they are not finite, or the base's are too large"
    raise BadInput("sparsegpt", have, "Load the base in bf16 or fp32, or give more rows")


@torch.no_grad()
def prune(weight_IO: Tensor, root_II: Tensor, share: float, group: int, bits: int = 16) -> None:
    """Prunes a weight in place (algorithm 1). `weight_IO`: transposed, (in, out), so that a column of W is contiguous.

    `share`: of each block's weights; with `group`, half of each `group` neighbours in a row. `bits`: of what stays.
    """
    columns, outputs = weight_IO.shape
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block_BO, root_BB = weight_IO[start:end], root_II[start:end, start:end]
        errors_BO = torch.empty_like(block_BO)
        scale_B1 = root_BB.diagonal().square()[:, None]
        pruned_BO = torch.zeros(block_BO.shape, dtype=torch.bool, device=block_BO.device)
        if not group:
            score_BO = block_BO.square() / scale_B1
            gone = int(share * score_BO.numel())
            pruned_BO.view(-1)[score_BO.flatten().topk(gone, largest=False).indices] = True
        grid = _grid(block_BO) if bits == 4 else None
        for at in range(end - start):
            if group and at % group == 0:
                score_GO = block_BO[at : at + group].square() / scale_B1[at : at + group]
                gone_GO = score_GO.topk(group // 2, dim=0, largest=False).indices
                pruned_BO[at : at + group].scatter_(0, gone_GO, True)
            was_O = block_BO[at].clone()
            kept_O = was_O if grid is None else _rounded(was_O, *grid)
            kept_O = kept_O.masked_fill(pruned_BO[at], 0)
            errors_BO[at] = (was_O - kept_O).div_(root_BB[at, at])
            block_BO[at] = kept_O
            block_BO[at + 1 :].addr_(root_BB[at, at + 1 :], errors_BO[at], alpha=-1)
        weight_IO[end:].addmm_(root_II[start:end, end:].T, errors_BO, alpha=-1)


def _grid(block_BO: Tensor) -> tuple[Tensor, Tensor]:
    """-> (step, place of zero) of each row's grid, (out,): from its smallest to its largest value, zero among them."""
    low_O, high_O = block_BO.amin(0).clamp_(max=0), block_BO.amax(0).clamp_(min=0)
    step_O = (high_O - low_O).div_(LEVELS)
    step_O.masked_fill_(step_O == 0, 1)
    return step_O, (-low_O / step_O).round_()


def _rounded(values_O: Tensor, step_O: Tensor, zero_O: Tensor) -> Tensor:
    return ((values_O / step_O).round_().add_(zero_O).clamp_(0, LEVELS) - zero_O).mul_(step_O)
