"""What a training process holds and takes beside its tensors' work, as `trimtab doctor` measured it on this machine.

    process   the interpreter, the libraries and the data, when training begins
    fixed     threads, generated code and the like, which come with the first steps
    share     of the tensors' growth: gaps between them, and freed memory that the malloc has not given back
    cast      the same, which comes on top under autocast: its copies of weights live between the activations, which
              makes gaps, beside state that is never freed, which has none
    pace      what whole steps reach of the speed that their operations, measured one by one, would give

Where tables are stepped, THREAD comes on top for each thread that does it; and CHURN of what a block makes and drops
on its way back, which the malloc has not given back yet, and which does not fit what is made next. `fixed` and `share`
are the line through small trainings of unlike size and kind (planning/calibrate.py). Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import cache_file
from .rates import path_of

FORM = 4  # of the file
MOST_SHARE = 0.5
THREAD = 4 * 2**20  # bytes; two under mimalloc kept 5 to 10 MiB of what was freed (docs/LOG.md)
PRODUCT = 512 * 2**10  # bytes of code that oneDNN keeps for each new shape of a 16-bit product (docs/LOG.md)
CHURN = 0.15  # of a checkpointed encoder 0.1 of it stayed, or 0.35, by how its heap came to lie (docs/LOG.md)


@dataclass(frozen=True)
class Overhead:
    """Bytes, and a share of the growth. `measured` is False for the figures of the machine this was written on."""

    process: int = 0  # 0: not known
    fixed: int = 30 * 2**20
    share: float = 0.08
    cast: float = 0.07
    pace: float = 0.85
    measured: bool = False
    quick: bool = False  # by one training: `share` and `cast` are another machine's

    def of(self, growth: int, churn: int = 0, cast: bool = False, threads: int = 0, shapes: int = 0) -> int:
        """What comes on top of tensors that grow by `growth` bytes; `churn`: what a block makes and drops on its way
        back; `cast`: under autocast; `threads`: that step tables beside the one that trains; `shapes`: of 16-bit
        products, beyond those of batches of one length."""
        gaps = round((self.share + cast * self.cast) * max(0, growth))
        return self.fixed + gaps + round(CHURN * churn) + threads * THREAD + shapes * PRODUCT

    @classmethod
    def by_one(cls, process: int, grown: int, held: int, pace: float) -> Overhead:
        """From a single training whose tensors grew by `grown` bytes, and its process (without CHURN) by `held`: one
        point gives no line, so that the share stays the default."""
        fixed = max(0, round(held - (1 + cls.share) * grown))
        return cls(process, fixed, pace=pace, measured=True, quick=True)

    @classmethod
    def through(
        cls, process: int, points: list[tuple[int, int]], under_cast: list[tuple[int, int]], pace: float
    ) -> Overhead:
        """`points`: (tensors' growth, the process's without CHURN) of trainings; `under_cast`: of some under autocast.

        The line has the least sum of squared errors, each over what was held: between absolute errors, by which the
        largest training would decide alone, and relative ones, by which the smallest would, and they scatter most.
        """
        import numpy

        grown, held = numpy.array(points, dtype=float).T
        share = _share(float(numpy.polyfit(grown, held, 1, w=held**-0.5)[0]) - 1)
        fixed = max(0, round(float(numpy.average(held - (1 + share) * grown, weights=1 / held))))
        more = [(whole - fixed) / growth - 1 - share for growth, whole in under_cast]
        return cls(process, fixed, share, _share(sum(more) / len(more), -share), pace, measured=True)


def _share(found: float, least: float = 0.0) -> float:
    return min(max(found, least), MOST_SHARE)


def load(machine: dict[str, Any], folder: Path) -> Overhead:
    """What was measured on `machine` (rates.key) before, else the default."""
    found = cache_file.read(_path(machine, folder), FORM, machine) or {}
    found.pop("machine", None)
    try:
        held = Overhead(**found)
        numbers = (held.process, held.fixed, held.share, held.share + held.cast, held.pace)
        sound = all(math.isfinite(n) and n >= 0 for n in numbers) and held.pace
        sound = sound and max(held.share, held.cast) <= MOST_SHARE
    except TypeError:
        return Overhead()
    return held if sound else Overhead()


def save(overhead: Overhead, machine: dict[str, Any], folder: Path) -> bool:
    """False where the cache cannot be written."""
    return cache_file.write(_path(machine, folder), FORM, {"machine": machine, **asdict(overhead)})


def _path(machine: dict[str, Any], folder: Path) -> Path:
    rates = path_of(machine, folder)
    return rates.with_name(f"overhead-{rates.name}")
