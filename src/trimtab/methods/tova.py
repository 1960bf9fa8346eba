"""TOVA, token omission via attention: Transformers are Multi-State RNNs (Oren et al., EMNLP 2024, arXiv 2401.06104).

Whenever the cache is full, the token to which the newest query attends least is evicted (section 3.2):

    A     = softmax(q K^T / sqrt(d))    of the newest query
    score = mean over the heads of A    one score per token and layer; all heads keep the same tokens

What differs from the paper, and why: a prompt is judged by its last query, after each chunk that is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..bases.cache import BudgetedPolicy
from ..model.kv_rows import Row
from ..model.kv_scores import window_attention


@dataclass(frozen=True)
class TOVA(BudgetedPolicy):
    """Evict the token to which the newest one attends least (section 3.2)."""

    paper: ClassVar[str] = "2401.06104"
    queries: ClassVar[int] = 1
    window: ClassVar[int] = 1  # type: ignore[override]
    floor: ClassVar[int] = 1

    def judge(self, row: Row, scale: float) -> tuple[Tensor, float]:
        mean_N = window_attention(row, scale, 1).mean_AN.mean(0)
        return mean_N.expand(len(row.positions), -1), 1.0
