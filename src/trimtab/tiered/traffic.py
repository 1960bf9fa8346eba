"""Counters of what a table transfers (store.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """Rows found in a slot or not, bytes transferred in each direction, and how useful prefetching was."""

    hits: int = 0
    misses: int = 0
    up: int = 0  # bytes, slow to fast
    down: int = 0  # bytes, fast to slow
    needed: int = 0  # misses of fetches that a prefetch could have served
    foreseen: int = 0  # of these, rows whose prefetch was complete
    unused: int = 0  # bytes prefetched in vain; no other counter includes them
