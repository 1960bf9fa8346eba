"""SensZOQ: Zeroth-Order Fine-Tuning of LLMs with Transferable Static Sparsity (Guo et al., ICLR 2025, 2406.02913).

Of the weights of all targeted linears, a fixed share with the largest empirical Fisher information is trained; the rest
stays as it is, in 4 bits for example:

    F_i = E over rows of (dL / dw_i)^2       m = the `density` of all weights with the largest F_i
    y = (Q(W) + S) x                         S is zero outside m

The mask is chosen once, from text of any kind, and serves every later task (sections 3 and 4). With `stepper: mezo`
(the paper) S is trained by forward passes only; with back-propagation it is sparse fine-tuning with a fixed mask.

What differs from the paper, and why. The paper stores the masked weights apart and quantises the others anew. We keep
the base as it is and train S as a delta from zero, in fp32, so any 4-bit, 8-bit or dense base serves, and the adapter
is a sparse change of it. The budget is global by default (`scope`): layers differ widely in how much of the gradient's
energy their best entries have. The Fisher information is streamed block by block, so that choosing the mask needs no
more memory than one block's gradients (model/scores.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from ..bases.sparse import SparsePatch
from ..contracts import Place
from ..errors import BadInput


@dataclass(frozen=True)
class SensZOQ(SparsePatch):
    """Trains the most sensitive weights of the targeted linears; all others are frozen."""

    paper: ClassVar[str] = "2406.02913"
    defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-3}

    density: float = 0.001  # share of the targeted weights that is trained (section 4: 0.1 %)

    @property
    def share(self) -> float:
        return self.density

    def apply(self, model: PreTrainedModel, place: Place) -> Any:
        if not 0 < self.density <= 1:
            asked = f"senszoq: density: {self.density}"
            raise BadInput(asked, "it is a share of the weights, above 0 and up to 1", "Set density: 0.001")
        return super().apply(model, place)
