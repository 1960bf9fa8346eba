"""Rows that a store returns for computing.

Making a view in Python takes about as long as a small expert's product. Views of many rows are therefore made by one
call for the whole table, and those that are wanted are picked from the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

MANY = 5  # making a view of one row alone costs as much as this many views made together


class Rows:
    """The rows `numbers`, each of `shape`: views of one `table` (rows, *shape), or `separate` tensors by row number."""

    def __init__(self, numbers: Sequence[int], table: Tensor, separate: Mapping[int, Tensor] | None = None):
        self.numbers, self._table, self._separate = numbers, table, separate

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: int) -> Tensor:
        number = self.numbers[at]
        return self._table[number] if self._separate is None else self._separate[number]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.views(lambda rows: rows))

    def of(self, numbers: Sequence[int]) -> Rows:
        """Some of these rows, by number."""
        return Rows(numbers, self._table, self._separate)

    def views(self, cut: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """`cut` of each row; `cut` makes a view of one row (*shape), or of many rows at once (rows, *shape)."""
        if self._separate is not None:
            return [cut(self._separate[number]) for number in self.numbers]
        if MANY * len(self) < len(self._table):
            return [cut(self._table[number]) for number in self.numbers]
        every = cut(self._table).unbind()
        return [every[number] for number in self.numbers]
