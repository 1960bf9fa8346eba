"""Which experts the next layer will need, said before it is reached, so that their rows are read meanwhile.

On the way forward it is a guess. The residual stream changes little from one layer to the next, so the next layer's
router is asked about what this layer reads. A long batch needs much the same experts as the one before it: there the
guess is what the layer needed last time, which costs no product. On the way back it is known: what fired in the layer
below.

T tokens, D hidden size, N experts, P probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ...foreign import recomputing
from ...tiered.store import GRADS, VALUES
from .router import Router

TOKENS = 64  # of a batch, that the next layer's router is asked about at most


class Gone(NamedTuple):
    """What a pass forward needed of a layer: the experts of its tokens, and of them those with a pair that counted."""

    tokens: int = 0
    probed: Sequence[int] = ()
    fired: Sequence[int] = ()


class Line:
    """The layers of a model, in the order in which a pass goes through them.

    Of each layer only the newest pass is remembered here. A pass back finds its own in the graph, where its layers hold
    what the layer below needed (`passed`), as long as the graph lives.
    """

    def __init__(self, guesses: bool = True) -> None:
        self.guesses = guesses
        self.layers: list[Router] = []
        self.newest: list[Gone] = []

    def join(self, layer: Router) -> int:
        """-> its number."""
        self.layers.append(layer)
        self.newest.append(Gone())
        return len(self.layers) - 1

    def guess(self, at: int, h_TD: Tensor) -> None:
        """Layer `at` has read h: what the next one will probe."""
        if not self.guesses or at + 1 == len(self.layers) or recomputing():
            return
        layer, last, tokens = self.layers[at + 1], self.newest[at + 1], len(h_TD)
        if not layer.store.awaits:
            return
        if tokens > TOKENS and 2 * last.tokens >= tokens:
            layer.store.expect(last.probed)
        else:
            layer.store.expect(layer.probed(h_TD[:: -(-tokens // TOKENS) or 1]))

    def passed(self, at: int, gone: Gone) -> Gone:
        """Layer `at` has needed this; -> what the layer below it did in the same pass."""
        self.newest[at] = gone
        if recomputing():  # its own pass back follows
            self._expect_back(at, gone)
        return self.newest[at - 1] if at else Gone()

    def back(self, at: int, below: Gone, again: bool) -> None:
        """Layer `at` begins its pass back; `again`: layers are computed again on the way, the one below too."""
        if at and again:
            if (store := self.layers[at - 1].store).awaits:
                store.expect(below.probed)
        elif at:
            self._expect_back(at - 1, below)

    def _expect_back(self, at: int, gone: Gone) -> None:
        layer = self.layers[at]
        if layer.store.awaits:
            layer.store.expect(gone.fired, (VALUES, GRADS))
            if layer.table is not None:
                layer.table.hasten(gone.probed, (GRADS,))
