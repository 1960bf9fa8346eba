"""What a table moves, counted (store.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """What went between the tiers: rows found in a slot or not, bytes in each direction, and what was read ahead."""

    hits: int = 0
    misses: int = 0
    up: int = 0  # bytes, slow to fast
    down: int = 0  # bytes, fast to slow
    needed: int = 0  # of the misses, those of passes for which rows could be read ahead
    foreseen: int = 0  # of these, rows that had been asked for and were there
    unused: int = 0  # bytes read ahead that were not needed; in no other figure
