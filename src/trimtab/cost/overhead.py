"""The memory that a training process uses beside its tensors, as `trimtab doctor` measured it on this machine.

    process             bytes of the interpreter, the libraries and the data, when training begins
    fixed               bytes of threads, generated code and the like, allocated in the first steps
    share               of the tensors' growth: gaps between them, and freed memory that malloc has not returned
    autocast_overhead   added to `share` under autocast: its copies of weights live between the activations, which
                        makes gaps, beside optimizer state that is never freed, which has none
    efficiency          speed of whole steps over the speed that their operations, measured one by one, predict

Each thread that steps tables adds THREAD. TRANSIENT_SHARE of the bytes that the backward pass of a block allocates and
frees is added too: malloc has not returned them yet, and later allocations do not fit into them. `fixed` and `share`
are a line fitted through small trainings of different sizes and kinds (planning/calibrate.py). Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import cache_file
from .rates import path_of

FORM = 5  # of the file
MOST_SHARE = 0.5
THREAD = 4 * 2**20  # bytes; two under mimalloc kept 5 to 10 MiB of freed memory (docs/LOG.md)
PRODUCT = 512 * 2**10  # bytes of code that oneDNN caches for each new shape of a 16-bit product (docs/LOG.md)
TRANSIENT_SHARE = 0.15  # of a checkpointed encoder 0.1 of it stayed, or 0.35, depending on its heap (docs/LOG.md)


@dataclass(frozen=True)
class Overhead:
    """Bytes, and a share of the growth. `measured` is False for the figures of the machine this was written on."""

    process: int = 0  # 0: not known
    fixed: int = 30 * 2**20
    share: float = 0.08
    autocast_overhead: float = 0.07
    efficiency: float = 0.85
    measured: bool = False
    quick: bool = False  # by one training: `share` and `autocast_overhead` are the defaults

    def of(
        self, growth: int, backward_transient: int = 0, autocast: bool = False, threads: int = 0, shapes: int = 0
    ) -> int:
        """Bytes on top of tensors that grow by `growth` bytes. `backward_transient`: bytes that the backward pass of a
        block allocates and frees; `threads`: that step tables beside the one that trains; `shapes`: of 16-bit products,
        beyond those of batches of one length."""
        gaps = round((self.share + autocast * self.autocast_overhead) * max(0, growth))
        return self.fixed + gaps + round(TRANSIENT_SHARE * backward_transient) + threads * THREAD + shapes * PRODUCT

    @classmethod
    def by_one(cls, process: int, tensors: int, total: int, efficiency: float) -> Overhead:
        """From a single training whose tensors grew by `tensors` bytes, and its process (without the backward
        transient) by `total`. One point does not determine a line, so the share stays the default."""
        fixed = max(0, round(total - (1 + cls.share) * tensors))
        return cls(process, fixed, efficiency=efficiency, measured=True, quick=True)

    @classmethod
    def through(
        cls, process: int, points: list[tuple[int, int]], under_autocast: list[tuple[int, int]], efficiency: float
    ) -> Overhead:
        """Fits a line. `points`: (growth of the tensors, of the process without the backward transient) of trainings;
        `under_autocast`: the same of trainings under autocast.

        The fit minimises squared errors divided by the process's growth, a compromise: with absolute errors the largest
        training would decide alone; with relative ones the smallest, which vary most.
        """
        import numpy

        tensors, total = numpy.array(points, dtype=float).T
        share = _share(float(numpy.polyfit(tensors, total, 1, w=total**-0.5)[0]) - 1)
        fixed = max(0, round(float(numpy.average(total - (1 + share) * tensors, weights=1 / total))))
        more = [(whole - fixed) / growth - 1 - share for growth, whole in under_autocast]
        return cls(process, fixed, share, _share(sum(more) / len(more), -share), efficiency, measured=True)


def _share(found: float, least: float = 0.0) -> float:
    return min(max(found, least), MOST_SHARE)


def load(machine: dict[str, Any], folder: Path) -> Overhead:
    """The overhead measured before on `machine` (rates.key), else the default."""
    found = cache_file.read(_path(machine, folder), FORM, machine) or {}
    found.pop("machine", None)
    try:
        read = Overhead(**found)
        numbers = (read.process, read.fixed, read.share, read.share + read.autocast_overhead, read.efficiency)
        sound = all(math.isfinite(n) and n >= 0 for n in numbers) and read.efficiency
        sound = sound and max(read.share, read.autocast_overhead) <= MOST_SHARE
    except TypeError:
        return Overhead()
    return read if sound else Overhead()


def save(overhead: Overhead, machine: dict[str, Any], folder: Path) -> bool:
    """-> False if the cache cannot be written."""
    return cache_file.write(_path(machine, folder), FORM, {"machine": machine, **asdict(overhead)})


def _path(machine: dict[str, Any], folder: Path) -> Path:
    rates = path_of(machine, folder)
    return rates.with_name(f"overhead-{rates.name}")
