"""Which weights of a model matter most: scores per entry, and the exact k best over all linears.

    fisher            E over rows of (dL / dW_ij)^2: the diagonal of the empirical Fisher information
    gradient_weight   |E over rows of dL / dW_ij| * |W_ij|: the first-order change of the loss without the weight
    weight            |W_ij|
    random            a seeded random number

The first two read data. They are computed block by block (block_gradients.py); only the scores of one block and the k
best so far are in memory. Ties go to the linear that comes first, then to the smaller index.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BadInput
from . import anatomy, quant
from .block_gradients import backward_by_blocks
from .sparse_delta import Pattern

Score = Literal["fisher", "gradient_weight", "weight", "random"]
OF_DATA = ("fisher", "gradient_weight")


def best_entries(
    model: PreTrainedModel, linears: dict[str, nn.Module], share: float, score: Score,
    scope: Literal["global", "linear"] = "global", seed: int = 0,
    batches: Iterable[dict[str, Tensor]] = (), folder: str | None = None,
) -> dict[str, Pattern]:  # fmt: skip
    """The entries with the highest scores: `share` of all of them together ("global"), or of each linear ("linear").

    `linears`: path -> linear, or a wrapper with its linear as `base`. `batches`: with labels, if the score reads data.
    """
    shapes = {name: (anatomy.widths(_base(m))[1], anatomy.widths(_base(m))[0]) for name, m in linears.items()}
    order = {name: number for number, name in enumerate(linears)}
    counts = {name: entries_of(share, shape) for name, shape in shapes.items()}
    every = Best(sum(counts.values())) if scope == "global" else None
    found: dict[str, Tensor] = {}
    reads = score in OF_DATA
    for name, score_OI in _of_data(model, linears, score, batches, folder) if reads else _plain(linears, score, seed):
        best = every or Best(counts[name])
        best.add(order[name], score_OI.flatten())
        if every is None:
            found[name] = best.flat(order[name])
    if every is not None:
        found = {name: every.flat(number) for name, number in order.items()}
    return {name: Pattern.of(found[name], shapes[name]) for name in linears}


def entries_of(share: float, shape: tuple[int, int]) -> int:
    """How many entries `share` of an (O, I) matrix is: at least one."""
    return min(shape[0] * shape[1], max(1, round(share * shape[0] * shape[1])))


def largest_share(share: float, sizes: Sequence[tuple[int, int]], whole: int) -> float:
    """What `share` of each (O, I) matrix of these `sizes` is of `whole` parameters, rounded down to two digits."""
    found = sum(entries_of(share, size) for size in sizes) / whole
    digits = 1 - math.floor(math.log10(found))
    return math.floor(found * 10**digits) / 10**digits


def enough_candidates(kept: int, sizes: Sequence[tuple[int, int]]) -> float:
    """The share of each matrix that has four times `kept` entries, or all there are."""
    return float(f"{min(1.0, 4 * kept / sum(math.prod(size) for size in sizes)):.2g}")


class Best:
    """The k entries with the highest scores of what was added so far."""

    def __init__(self, k: int):
        self.k = k
        self.scores, self.linears, self.indices = (
            torch.empty(0),
            torch.empty(0, dtype=torch.int32),
            torch.empty(0).long(),
        )

    def add(self, number: int, scores: Tensor) -> None:
        """`scores`, flat: those of the linear with this number."""
        scores = scores.float().cpu()
        if len(self.scores) == self.k and self.k:
            may = (scores >= self.scores.min()).nonzero().squeeze(1)
        else:
            may = torch.arange(len(scores))
        every = torch.cat([self.scores, scores[may]])
        linears = torch.cat([self.linears, torch.full_like(may, number, dtype=torch.int32)])
        indices = torch.cat([self.indices, may])
        if len(every) > self.k:
            least = every.kthvalue(len(every) - self.k + 1).values
            keep = every > least
            ties = (every == least).nonzero().squeeze(1)
            first = (linears[ties].long() * 2**40 + indices[ties]).argsort()
            keep[ties[first[: self.k - int(keep.sum())]]] = True
            every, linears, indices = every[keep], linears[keep], indices[keep]
        self.scores, self.linears, self.indices = every, linears, indices

    def flat(self, number: int) -> Tensor:
        """The flat indices of one linear's entries, rising."""
        return self.indices[self.linears == number].sort().values


def _base(linear: nn.Module) -> nn.Module:
    return getattr(linear, "base", linear)  # type: ignore[return-value]


def _weight(linear: nn.Module) -> Tensor:
    return quant.dense_weight(_base(linear), torch.float32).detach().abs()


def _plain(linears: dict[str, nn.Module], score: Score, seed: int) -> Iterable[tuple[str, Tensor]]:
    for name, linear in linears.items():
        if score == "weight":
            yield name, _weight(linear)
        else:
            rng = torch.Generator().manual_seed((seed << 20) + zlib.crc32(name.encode()))
            columns, rows = anatomy.widths(_base(linear))
            yield name, torch.rand(rows, columns, generator=rng)


def _of_data(
    model: PreTrainedModel, linears: dict[str, nn.Module], score: Score, batches: Iterable[dict[str, Tensor]],
    folder: str | None,
) -> Iterable[tuple[str, Tensor]]:  # fmt: skip
    sums: dict[str, Tensor] = {}
    rows = [row for batch in batches for row in _rows(batch) if _counts(row)]
    if not rows:
        have = "no row of the calibration data has a token that counts in the loss"
        raise BadInput(f"score: {score}", have, "Give it some lines of text, or training rows")

    def seen(name: str, x_TI: Tensor, dy_TO: Tensor) -> None:
        gradient_OI = (dy_TO.t() @ x_TI).float()
        if score == "fisher":
            gradient_OI = gradient_OI.square_()
        sums[name] = gradient_OI if name not in sums else sums[name].add_(gradient_OI)

    for within in backward_by_blocks(model, rows, linears, seen, folder):
        for name, linear in within.items():
            if name not in sums:
                raise BadInput(f"score {name}", "the loss does not depend on it", "Leave it out of targets")
            found = sums.pop(name) / len(rows)
            if score == "gradient_weight":
                found = found.abs_().mul_(_weight(linear))
            if not math.isfinite(float(found.sum())):
                raise BadInput(f"score {name}", "its gradients are not finite", "Calibrate in bf16 or fp32")
            yield name, found


def _rows(batch: dict[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    """The rows of a batch one by one, without the columns that only pad."""
    mask = batch.get("attention_mask")
    for number in range(len(next(iter(batch.values())))):
        row = {key: value[number : number + 1] for key, value in batch.items()}
        if mask is not None and mask.dim() == 2:
            counts, shape = mask[number].bool(), (1, mask.shape[1])
            row = {key: value[:, counts] if value.shape == shape else value for key, value in row.items()}
        yield row


def _counts(row: dict[str, Tensor]) -> bool:
    """Whether the row has a label; the first token of a text predicts nothing."""
    labels = row["labels"]
    return labels.dim() < 2 or bool((labels[:, 1:] != -100).any())
