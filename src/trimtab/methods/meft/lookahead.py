"""Prefetching for the backward pass: which experts the layer below will need is known from the forward pass.

A layer's backward pass needs the experts of which a pair fired in its forward pass. Their rows are read while the layer
above computes. With activation checkpointing, the layer below first repeats its forward pass, which needs all experts
that its tokens probed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...foreign import recomputing
from ...tiered.store import GRADS, VALUES
from .router import Router


class LayerTrace(NamedTuple):
    """The experts that one forward pass of a layer used: those that its tokens probed, and those with a pair that
    fired."""

    probed: Sequence[int] = ()
    fired: Sequence[int] = ()


class ExpertPrefetcher:
    """Prefetches the experts of a model's layers, in the order in which the backward pass needs them.

    It remembers only the newest forward pass of each layer. An earlier pass that still waits for its backward pass
    keeps the traces in its graph: each layer keeps what `record` returned, the trace of the layer below it.
    """

    def __init__(self) -> None:
        self.layers: list[Router] = []
        self.newest: list[LayerTrace] = []

    def join(self, layer: Router) -> int:
        """-> the layer's number."""
        self.layers.append(layer)
        self.newest.append(LayerTrace())
        return len(self.layers) - 1

    def record(self, number: int, trace: LayerTrace) -> LayerTrace:
        """Layer `number` has made a forward pass; -> the trace of the layer below in the same pass."""
        self.newest[number] = trace
        if recomputing():  # its own backward pass follows
            self._prefetch_backward(number, trace)
        return self.newest[number - 1] if number else LayerTrace()

    def backward_begins(self, number: int, below: LayerTrace, recomputed: bool) -> None:
        """Layer `number` begins its backward pass. `recomputed`: it repeated its forward pass, so the layer below will
        too."""
        if number and recomputed:
            if (store := self.layers[number - 1].store).wants_prefetch:
                store.prefetch(below.probed)
        elif number:
            self._prefetch_backward(number - 1, below)

    def _prefetch_backward(self, number: int, trace: LayerTrace) -> None:
        layer = self.layers[number]
        if layer.store.wants_prefetch:
            layer.store.prefetch(trace.fired, (VALUES, GRADS))
            if layer.table is not None:
                layer.table.demand_read(trace.probed, (GRADS,))
