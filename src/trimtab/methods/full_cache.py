"""The full KV cache, in memory that is reserved once, in 16, 8 or 4 bits.

transformers' own cache copies all keys and values to a longer tensor at each token. Here memory is reserved for the
prompt and the longest reply, and each token is written in place. Nothing is evicted: in 16 bits, replies are the
model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..bases.cache import CachePolicy
from ..model.kv_rows import Row


@dataclass(frozen=True)
class FullCache(CachePolicy):
    """Keeps every token."""

    bounded: ClassVar[bool] = False

    @property
    def window(self) -> int:
        """All tokens are new enough to stay."""
        return 2**31

    def tokens(self, row: Row, layers: int) -> int:
        return 2**31 * layers

    def judge(self, row: Row, scale: float) -> tuple[Tensor, float]:
        return row.positions.float(), 1.0
