"""Pairs of a token and a row that it uses, sorted by row, so that each row is multiplied with all its tokens at once.

T tokens, P rows that a token uses, X pairs of a token and a row, E rows in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

FEW = 16  # rows, or pairs, that are worth a gather


@dataclass(slots=True)
class Groups:
    """Rows in use, and the pairs of each: of a whole batch, or of a chunk of it (`chunks`)."""

    store: Any  # TieredStore
    shape: tuple[int, int]  # T, P of the batch
    order: Tensor  # (X,) of the batch: its pairs t * P + p, sorted by row
    tokens: Tensor  # (X,) the token of each of the sorted pairs
    rows: list[int]
    sizes: list[int]  # how many pairs each row has
    first: int = 0  # of a chunk: the position of its first row in the batch's `rows`
    at: slice | None = None  # of a chunk: its part of `order`

    def to(self, device: str) -> Groups:
        return Groups(self.store, self.shape, self.order.to(device), self.tokens.to(device), self.rows, self.sizes)

    def starts(self) -> Tensor:
        """Where in `order` the pairs of each row begin, (E,)."""
        sizes = torch.tensor(self.sizes)
        return (sizes.cumsum(0) - sizes).to(self.tokens)

    @property
    def chunk_rows(self) -> int:
        """How many rows a chunk has at most: as many as are no larger than the tokens' hidden states, or a few."""
        return min(self.store.rows, max(FEW, self.shape[0] // (2 * self.store.shape[0])))

    def chunks(self) -> Iterator[Groups]:
        """The rows a few at a time: at most `chunk_rows` rows, and at most T pairs unless one row alone has more."""
        most, pairs, first, start = self.chunk_rows, max(self.shape[0], FEW), 0, 0
        while first < len(self.rows):
            last, end = first + 1, start + self.sizes[first]
            while last < len(self.rows) and last - first < most and end + self.sizes[last] - start <= pairs:
                end += self.sizes[last]
                last += 1
            rows, sizes, at = self.rows[first:last], self.sizes[first:last], slice(start, end)
            yield Groups(self.store, self.shape, self.order, self.tokens[at], rows, sizes, first, at)
            first, start = last, end

    def each(self, rows: Iterable[Any], *parts_XY: Tensor, turned_YX: Sequence[Tensor] = ()) -> Iterator[tuple]:
        """For each row: its item of `rows`, and its pairs' rows of each of `parts_XY` and columns of `turned_YX`."""
        parts = *(part.split(self.sizes) for part in parts_XY), *(part.split(self.sizes, 1) for part in turned_YX)
        return zip(islice(rows, len(self.sizes)), *parts, strict=True)

    def accumulate(self, grads: Tensor) -> None:
        """Add the rows' gradients, the first E of `grads` (E or more, *shape), to the table's."""
        self.store.accumulate(self.rows, grads[: len(self.rows)])
