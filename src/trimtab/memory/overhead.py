"""What a training process holds and takes beside its tensors' work, as `trimtab doctor` measured it on this machine.

    process   the interpreter, the libraries and the data, when training begins
    fixed     threads, generated code and the like, which come with the first steps
    share     of the tensors' growth: gaps between them, and freed memory that the malloc has not given back
    pace      what whole steps reach of the speed that their operations, measured one by one, would give

`fixed` and `share` are the line through two small trainings of unlike size (calibrate.py). Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import kept
from .rates import path_of

FORM = 2  # of the file
MOST_SHARE = 0.5


@dataclass(frozen=True)
class Overhead:
    """Bytes, and a share of the growth. `measured` is False for the figures of the machine this was written on."""

    process: int = 0  # 0: not known
    fixed: int = 36 * 2**20
    share: float = 0.08
    pace: float = 0.85
    measured: bool = False

    def of(self, growth: int) -> int:
        """What comes on top of tensors that grow by `growth` bytes."""
        return self.fixed + round(self.share * max(0, growth))

    @classmethod
    def through(cls, process: int, points: list[tuple[int, int]], pace: float) -> Overhead:
        """`points`: (tensors' growth, the process's growth) of a small training and a large one."""
        (low, at_low), (high, at_high) = sorted(points)
        share = (at_high - at_low) / (high - low) - 1
        share = min(max(share, 0.0), MOST_SHARE)
        return cls(process, max(0, round(at_low - (1 + share) * low)), share, pace, measured=True)


def load(machine: dict[str, Any], folder: Path) -> Overhead:
    """What was measured on `machine` (rates.key) before, else the default."""
    found = kept.read(_path(machine, folder), FORM, machine) or {}
    found.pop("machine", None)
    try:
        held = Overhead(**found)
        numbers = (held.process, held.fixed, held.share, held.pace)
        sound = all(math.isfinite(n) and n >= 0 for n in numbers) and held.share <= MOST_SHARE and held.pace
    except TypeError:
        return Overhead()
    return held if sound else Overhead()


def save(overhead: Overhead, machine: dict[str, Any], folder: Path) -> bool:
    """False where the cache cannot be written."""
    return kept.write(_path(machine, folder), FORM, {"machine": machine, **asdict(overhead)})


def _path(machine: dict[str, Any], folder: Path) -> Path:
    rates = path_of(machine, folder)
    return rates.with_name(f"overhead-{rates.name}")
