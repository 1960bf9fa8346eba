"""One layer of a store of experts, as the layer's experts module uses it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from .experts import ExpertStore


class ExpertLayer:
    """One layer of a store, as its experts module uses it (model/experts.py). `above`: the layer after it, which tells
    by `guess` (hidden states, experts of each token) which of its experts they will use; `below`: the layer before."""

    above: ExpertLayer | None = None
    below: ExpertLayer | None = None
    guess: Callable[[Tensor, int], list[int]] | None = None

    def __init__(self, store: ExpertStore, number: int):
        self.store, self.number, self.planned, self.device = store, number, store.planned, store.device
        self.rows = store.layers[number].rows
        self.experts = len(self.rows)
        self.used: list[int] = []  # in the newest pass

    @property
    def numel(self) -> int:
        """How many weights the layer's experts have."""
        return self.experts * sum(math.prod(shape) for shape, _ in self.store.layers[self.number].shapes.values())

    def each(
        self, pairs: Any, hidden_NH: Tensor, back: bool = False, exact: bool = True
    ) -> Iterable[tuple[int, Tensor, Tensor]]:
        """(expert, tokens, ranks) of the experts that are used, after those with a slot were brought into it.
        Those that the host computes are last, so that it works while a GPU does. `back`: for the backward pass.
        `exact`: without stand-ins."""
        if self.planned:
            return self._planned(pairs, hidden_NH.shape[0])
        self.store.bring(self.number, dict(zip(pairs.used, pairs.sizes, strict=True)), hidden_NH.shape[0], exact)
        if self.store.wants_prefetch:
            if back and self.below is not None:
                self.store.prefetch(self.below.rows[expert] for expert in self.below.used)
            elif not back and self.above is not None and self.above.guess is not None:
                guess = self.above.guess(hidden_NH, len(pairs.tokens) // hidden_NH.shape[0])
                self.store.prefetch(self.above.rows[expert] for expert in guess)
        self.used = pairs.used
        hosted = [expert for expert in pairs.used if self.rows.start + expert in self.store.hosted]
        if not hosted:
            return pairs.parts()
        return sorted(pairs.parts(), key=lambda part: part[0] in hosted)

    def _planned(self, pairs: Any, tokens: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The one expert of a plan, with all tokens. For its time, as many as a token uses have all of them, and the
        weights of those that such a batch is expected to use are read."""
        clock = self.store.clock
        if clock is None:
            yield from pairs.parts()
            return
        each = len(pairs.tokens) // tokens
        clock.transfer(self.experts * (1 - (1 - each / self.experts) ** tokens) * self.store.slot_bytes)
        with clock.repeated(each):
            yield from pairs.parts()

    def weights(self, expert: int, hidden_NH: Tensor, exact: bool = True) -> dict[str, Tensor]:
        """One expert's tensors, by name. In a plan they have no bytes, unless they are unpacked: those of the store are
        counted by themselves."""
        if not self.planned:
            return self.store.weights(self.rows.start + expert, exact)
        shapes = self.store.layers[self.number].shapes.items()
        if self.store.form is not None or (self.store.stand_ins is not None and not exact):
            return {name: hidden_NH.new_empty(shape, dtype=dtype) for name, (shape, dtype) in shapes}
        return {name: hidden_NH.new_empty((), dtype=dtype).expand(shape) for name, (shape, dtype) in shapes}
