"""Rows that a store has given out to be computed with.

To make a view in Python takes about as long as a small expert's product. So views of many rows are made at once, by one
call for the whole table, of which those that are wanted are picked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

MANY = 5  # a view of a row alone costs as much as so many that are made at once


class Rows:
    """The rows `numbers`, each of `shape`: of one `table` (rows, *shape), or all of them tensors `apart`, by number."""

    def __init__(self, numbers: Sequence[int], table: Tensor, apart: Mapping[int, Tensor] | None = None):
        self.numbers, self._table, self._apart = numbers, table, apart

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: int) -> Tensor:
        number = self.numbers[at]
        return self._table[number] if self._apart is None else self._apart[number]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.views(lambda rows: rows))

    def of(self, numbers: Sequence[int]) -> Rows:
        """Some of these rows, by number."""
        return Rows(numbers, self._table, self._apart)

    def views(self, cut: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """`cut` of each row. It makes a view of what it is given: a row (*shape), or many of them (rows, *shape)."""
        if self._apart is not None:
            return [cut(self._apart[number]) for number in self.numbers]
        if MANY * len(self) < len(self._table):
            return [cut(self._table[number]) for number in self.numbers]
        every = cut(self._table).unbind()
        return [every[number] for number in self.numbers]
