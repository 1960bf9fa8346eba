"""Which experts have slots of the fast tier: the choice (Residency) and the books (WorkingSet), without any weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FREE = -1


class Residency(ABC):
    """Chooses which experts have slots. Experts of all layers are numbered through: they are rows."""

    def begin(self, layers: Sequence[range], slots: int) -> None:
        """The store has these rows in each layer, and so many slots, all free. Also called when `slots` changes."""
        self.layers, self.slots = layers, slots

    def seen(self, layer: int, counts: Mapping[int, int], tokens: int) -> None:  # noqa: B027
        """Of `tokens` tokens, so many (row -> number) use these rows of a layer."""

    def used(self, row: int) -> None:  # noqa: B027
        """A row that has a slot is used."""

    @abstractmethod
    def place(self, row: int, resident: Mapping[int, int], pinned: set[int]) -> int | None:
        """For a row without a slot: the resident row that makes room for it, FREE if a slot is free, or None if it
        gets no slot. Rows in `pinned` are in use and keep theirs."""


@dataclass
class Use:
    """What a pass of a layer does with the rows that it needs: the rows with a slot, those that get one (with its
    number), and those that are used without one."""

    hits: list[int] = field(default_factory=list)
    moved: list[tuple[int, int]] = field(default_factory=list)
    streamed: list[int] = field(default_factory=list)


class WorkingSet:
    """The slots of a store with these rows in each layer."""

    def __init__(self, layers: Sequence[range], residency: Residency):
        self.layers, self.residency = layers, residency
        self.slot_of: dict[int, int] = {}
        self.resize(0)

    def resize(self, slots: int) -> None:
        """Have this many slots, all free."""
        self.slots = min(slots, self.layers[-1].stop)
        self.slot_of.clear()
        self._free = list(range(self.slots))[::-1]
        self.residency.begin(self.layers, self.slots)

    def use(self, layer: int, needed: Mapping[int, int], tokens: int) -> Use:
        """Of `tokens` tokens, so many (row -> number) need these rows of a layer now. No row that is needed now loses
        its slot. Those with the most tokens are placed first."""
        self.residency.seen(layer, needed, tokens)
        pinned, done = set(needed), Use()
        for row in sorted(needed, key=needed.__getitem__, reverse=True):
            if row in self.slot_of:
                self.residency.used(row)
                done.hits.append(row)
                continue
            evicted = self.residency.place(row, self.slot_of, pinned) if self.slots else None
            if evicted is None:
                done.streamed.append(row)
                continue
            assert evicted not in pinned, "a row that is in use keeps its slot"
            slot = self._free.pop() if evicted == FREE else self.slot_of.pop(evicted)
            self.slot_of[row] = slot
            done.moved.append((row, slot))
        return done
