"""Two ways to the same result, of which a machine is quicker at one: found out while the work is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

FIRST, AGAIN = 6, 16  # rounds in which both are tried in turn; from then on the slower one is, once in so many
NEW = 0.5  # weight of what a way took last, beside what it took before


class Trial:
    """Chooses between way 0 and way 1, by the seconds that they took for a piece of work.

    What they leave behind must be equal to the last bit: the choice hangs on a clock.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self.took: dict[int, float] = {}  # way -> seconds for a unit of work

    @property
    def quicker(self) -> int:
        return min(self.took, key=lambda way: self.took[way], default=0)

    @contextmanager
    def round(self, work: int) -> Iterator[int]:
        """-> the way to go now, for so many units of work; its seconds are those until the end."""
        way = self.rounds % 2 if self.rounds < FIRST else self.quicker
        if self.rounds >= FIRST and self.rounds % AGAIN == 0:
            way = 1 - way
        self.rounds += 1
        begun = time.perf_counter()
        yield way
        if work:
            now = (time.perf_counter() - begun) / work
            self.took[way] = now * NEW + self.took.get(way, now) * (1 - NEW)
