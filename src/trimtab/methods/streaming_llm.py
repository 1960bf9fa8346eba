"""StreamingLLM. Efficient Streaming Language Models with Attention Sinks (Xiao et al., ICLR 2024, arXiv 2309.17453).

A model attends strongly to its first few tokens, whatever they are ("attention sinks"). So the KV cache keeps these and
the newest tokens, and evicts those between (section 3.2). Memory no longer grows with the text.

    kept = the first `sinks` positions  +  the last `window` positions

What differs from the paper, and why. Positions are those in the text, not those in the cache: within the positions
that the model was trained on this is exact, and the paper's renumbering matters only beyond them. A long prompt is read
in chunks, with eviction after each; a shorter one is read with full attention first, as in the paper's code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..bases.cache import CachePolicy
from ..errors import BadInput
from ..model.kv_rows import Row


@dataclass(frozen=True)
class StreamingLLM(CachePolicy):
    """Keep the first tokens and a window of the newest (section 3.2)."""

    paper: ClassVar[str] = "2309.17453"
    shrinkable: ClassVar[tuple[str, ...]] = ("chunk", "window")

    window: int = 1020  # newest tokens that stay
    sinks: int = 4  # first tokens that stay (table 2: four are enough)

    def tokens(self, row: Row, layers: int) -> int:
        return layers * (self.sinks + self.window)

    def judge(self, row: Row, scale: float) -> tuple[Tensor, float]:
        return row.positions.float().masked_fill(row.positions < self.sinks, torch.inf), 1.0

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("sinks", 0)):
            if (value := getattr(self, name)) < least:
                raise BadInput(f"streaming_llm: {name}: {value}", f"it must be {least} or more",
                               f"Set {name}: {getattr(StreamingLLM, name)}")  # fmt: skip
