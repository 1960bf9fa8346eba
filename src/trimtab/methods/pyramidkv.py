"""PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (Cai et al., arXiv 2406.02069).

Lower layers attend broadly, upper ones to a few tokens. So the number of tokens that layer l keeps falls linearly with
l. C is the mean number of tokens that a layer keeps, W the window, L the number of layers:

    first = 2 (C - W) - last      last = (C - W) / beta                             (section 4.2)
    C_l   = W + first - l (first - last) / (L - 1)

Which tokens stay within a layer is decided as in SnapKV: by the pooled mean attention of the newest W queries.

What differs from the paper, and why: as in `snapkv.py`. A layer that has fewer tokens than its share leaves the rest to
the others, in proportion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..bases.cache import WindowPolicy
from ..errors import BadInput
from ..model.kv_rows import Row
from ..model.kv_scores import per_group, pooled, window_attention


@dataclass(frozen=True)
class PyramidKV(WindowPolicy):
    """Keep more in the lower layers than in the upper ones (section 4)."""

    paper: ClassVar[str] = "2406.02069"

    beta: float = 20.0  # the last layer keeps 1 / beta of the mean, beside the window

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise BadInput(f"pyramidkv: beta: {self.beta}", "it must be 1 or more", "Set beta: 20")
        super().__post_init__()

    def shares(self, layers: int) -> Sequence[float]:
        last = 1 / self.beta
        step = (2 - 2 * last) / max(1, layers - 1)
        return [2 - last - step * layer for layer in range(layers)]

    def judge(self, row: Row, scale: float) -> tuple[Tensor, float]:
        mean_AN = window_attention(row, scale, self.window).mean_AN
        return per_group(pooled(mean_AN, self.kernel), len(row.positions)), 1.0
