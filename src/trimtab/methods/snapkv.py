"""SnapKV: LLM Knows What You are Looking for Before Generation (Li et al., NeurIPS 2024, arXiv 2404.14469).

The last tokens of a prompt already attend to what the reply will need. So the newest W tokens stay (the "observation
window"), and before them the tokens that these attend to most:

    A     = softmax(Q K^T / sqrt(d))    of the newest W queries                     (section 4)
    score = pool(mean over the W queries of A)                                      (section 4.2: neighbours count too)

Each layer keeps as many tokens, each key-value head its own.

What differs from the paper, and why. Query heads that share a key-value head share its tokens: the mean of their
scores counts. The paper compresses the prompt only; here the same rule goes on while text is generated, so that the
budget holds for long replies too. A prompt is read in chunks and judged after each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..bases.cache import WindowPolicy
from ..model.kv_rows import Row
from ..model.kv_scores import per_group, pooled, window_attention


@dataclass(frozen=True)
class SnapKV(WindowPolicy):
    """Keep what the newest tokens attend to (section 4)."""

    paper: ClassVar[str] = "2404.14469"

    def judge(self, row: Row, scale: float) -> tuple[Tensor, float]:
        mean_AN = window_attention(row, scale, self.window).mean_AN
        return per_group(pooled(mean_AN, self.kernel), len(row.positions)), 1.0
