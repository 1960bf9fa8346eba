"""CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences (Qin et al., ICLR 2025, arXiv 2503.12491).

Layers differ in how widely they attend, and in how much their attention moves. A layer's share of the budget follows
from both; within a layer, tokens stay whose attention is high or changes. A: the attention of the newest W queries to
the tokens before them, in each head.

    H_l = - sum A log A              spread of attention in space                    (equation 2)
    V_l = sum over tokens of Var_W(A)    its change in time                          (equation 3)
    P_l = H_l^(1 / tau1) V_l^(1 / tau2)     the layer's preference                   (equation 4)
    B_l = B P_l / sum P              its share of the budget B                       (equation 5)
    I   = pool(mean_W(A) + gamma Var_W(A))      a token's indicator                  (equation 6)

While a prompt is read, layers 0..l share the whole budget once layer l has attended, and those before it evict down to
their new, smaller shares (section 4.3). So the peak is the budget and one layer, and the result is the same as if all
shares had been known from the start.

What differs from the paper, and why.
- Shares are clip(x P_l, floor, tokens that layer l has), with x such that they add up to B. Cutting P-shares to what a
  layer has and spreading the rest equally, as in the authors' code, breaks proposition 1 (shares only shrink as layers
  are added). With a common x it holds, and the budget is used exactly.
- Statistics are in fp32 and computed in blocks of keys.
- Each text of a batch has its own shares, and padding counts for nothing.
- Long prompts are read in chunks, each judged with what was kept, so the peak is the budget and one layer's chunk.
- While text is generated, the same indicator, from the newest W queries, decides; the authors' code uses the newest
  query alone. Shares are computed anew each time that the cache is full.
- tau1 = tau2 = 1 by default: the authors' values are fitted per model and per budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..bases.cache import WindowPolicy
from ..errors import BadInput
from ..model.kv_rows import Row
from ..model.kv_scores import per_group, pooled, window_attention


@dataclass(frozen=True)
class CAKE(WindowPolicy):
    """Divide the budget by how layers attend, and keep what matters or changes (section 4)."""

    paper: ClassVar[str] = "2503.12491"

    gamma: float = 200.0  # weight of the variance in a token's indicator
    tau1: float = 1.0  # temperature of the entropy
    tau2: float = 1.0  # temperature of the variance

    def __post_init__(self) -> None:
        for name, least in (("gamma", 0.0), ("tau1", 0.05), ("tau2", 0.05)):
            if not least <= (value := getattr(self, name)) < float("inf"):
                default = getattr(CAKE, name)
                raise BadInput(f"cake: {name}: {value}", f"it must be {least:g} or more", f"Set {name}: {default:g}")
        super().__post_init__()

    def shares(self, layers: int) -> None:
        """They are not known before the layers attend."""

    def judge(self, row: Row, scale: float) -> tuple[Tensor, Tensor]:
        seen = window_attention(row, scale, self.window)
        indicator_AN = pooled(seen.mean_AN + self.gamma * seen.variance_AN, self.kernel)
        preference = seen.entropy.clamp(min=0) ** (1 / self.tau1) * seen.variance ** (1 / self.tau2)
        return per_group(indicator_AN, len(row.positions)), preference
