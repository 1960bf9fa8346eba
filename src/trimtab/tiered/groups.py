"""Pairs of a token and a row that it uses, sorted by row, so that each row is multiplied with all its tokens at once.

T tokens, P rows that a token uses, X pairs of a token and a row, E rows in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

FEW = 16  # rows, or pairs, that are worth a gather


@dataclass(slots=True)
class Groups:
    """The rows in use, and the pairs of each."""

    store: Any  # TieredStore
    shape: tuple[int, int]  # T, P
    order: Tensor  # (X,) the pairs t * P + p, sorted by row
    tokens: Tensor  # (X,) the token of each of the sorted pairs
    rows: list[int]
    sizes: list[int]  # how many pairs each row has

    def to(self, device: str) -> Groups:
        return replace(self, order=self.order.to(device), tokens=self.tokens.to(device))

    def starts(self) -> Tensor:
        """Where in `order` the pairs of each row begin, (E,)."""
        sizes = torch.tensor(self.sizes)
        return (sizes.cumsum(0) - sizes).to(self.tokens)

    @property
    def room(self) -> int:
        """How many rows a chunk may have: as many as together are no larger than the tokens' hidden states, or a
        few."""
        return min(self.store.rows, max(FEW, self.shape[0] // (2 * self.store.shape[0])))

    def chunks(self) -> Iterator[Chunk]:
        """The rows a few at a time: at most `room` rows, and at most T pairs unless one row alone has more."""
        most, pairs, first, start = self.room, max(self.shape[0], FEW), 0, 0
        while first < len(self.rows):
            last, end = first + 1, start + self.sizes[first]
            while last < len(self.rows) and last - first < most and end + self.sizes[last] - start <= pairs:
                end += self.sizes[last]
                last += 1
            at = slice(start, end)
            yield Chunk(self, first, self.rows[first:last], self.sizes[first:last], self.tokens[at], at)
            first, start = last, end

    def accumulate(self, grads: Tensor) -> None:
        """Add the gradient of each row, (E, *shape), to the table's."""
        self.store.accumulate(self.rows, grads)


@dataclass(slots=True)
class Chunk:
    """Consecutive groups that are processed together."""

    groups: Groups
    first: int  # position of the first row among those of `groups`
    rows: list[int]
    sizes: list[int]
    tokens: Tensor  # (X,) of these rows
    at: slice  # of `groups.order`

    def each(self, rows: Iterable[Any], *parts_XY: Tensor, turned_YX: Sequence[Tensor] = ()) -> Iterator[tuple]:
        """For each row of the chunk: its item of `rows`, and its pairs' rows of each of `parts_XY` and columns of each
        of `turned_YX`."""
        parts = *(part.split(self.sizes) for part in parts_XY), *(part.split(self.sizes, 1) for part in turned_YX)
        return zip(islice(rows, len(self.sizes)), *parts, strict=True)

    def accumulate(self, grads: Tensor) -> None:
        """Add the gradients of the chunk's rows, the first of `grads` (room, *shape), to the table's."""
        self.groups.store.accumulate(self.rows, grads[: len(self.rows)])
