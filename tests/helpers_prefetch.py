"""Small tables and readers for the tests of prefetching."""

from __future__ import annotations

import threading

import torch

from trimtab.contracts import Place
from trimtab.tiered.prefetch import Reader
from trimtab.tiered.store import TieredStore

SHAPE = (4, 256)  # a page of values
DISK = Place(fast="cpu", slow="disk")


class Pages:
    """A kernel that has the pages that were ordered, or, if it `forgets`, none."""

    def __init__(self, forgets: bool = False):
        self.ordered, self.brought, self.held, self.forgets = [], [], set(), forgets

    def resident(self, start, length):
        return start in self.held and not self.forgets

    def request(self, start, length):
        self.ordered.append((start, length))
        self.held.add(start)

    def map_in(self, start, length):
        self.brought.append((start, length))


class AtOnce(Reader):
    """A reader without a thread that has read what it is asked for when the call returns; all is always missing."""

    cold = True

    def __init__(self, **fields):
        super().__init__(alone=True, **fields)
        self._work.pages = Pages(forgets=True)

    def request(self, *args, **fields):
        asked = super().request(*args, **fields)
        self.serve()
        return asked


def store(rows: int = 12, reader: Reader | None = None, kind: type[TieredStore] = TieredStore, **fields) -> TieredStore:
    made = kind("table", rows, SHAPE, reader=reader, **{"slow": "disk", **fields})
    made.whole().normal_(generator=torch.Generator().manual_seed(0))
    return made


def alone() -> Reader:
    reader = Reader(alone=True)
    reader._work.pages = Pages()
    return reader


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "trimtab-reader"]
