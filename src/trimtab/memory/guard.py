"""Ends a run before the kernel or the CUDA allocator does.

The meter passes the guard a sample of the fast tier fifty times a second. When the use exceeds the budget, or the
machine has little memory left, the guard trips: training ends after the current step, with a checkpoint.

A budget can also be a limit of the process (`hard_limit`): on Linux RLIMIT_DATA. The kernel counts every private
writable mapping under it in full size, touched or not: stacks of threads, a malloc's reserve, buffers of generated code
(they grow with each new shape), a safetensors file mapped copy-on-write. So the limit follows the meter: it is the
budget plus the bytes that are mapped but not resident.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import BadInput
from .budget import available_memory, fast_bytes, gib
from .meter import Meter, Sample, process_memory

LEAST, MOST = 2**28, 2**30  # bounds of the bytes that stay free, 1/32 of the machine's memory


def reserve_bytes(total: int) -> int:
    """Bytes of a machine's memory that a run must leave free."""
    return max(LEAST, min(MOST, total // 32))


@dataclass
class Guard:
    """Checks samples of memory in `see`; sets `why` when a limit is exceeded. All sizes in bytes."""

    budget: int | None = None  # of the fast tier
    reserve: int = 0  # the machine must have so much left
    most: int = 0  # the peak
    least_left: int | None = None
    why: str = ""  # "budget", "machine", or "" (not tripped)

    def see(self, sample: Sample) -> None:
        self.most = max(self.most, sample.held)
        if sample.left is not None:
            self.least_left = sample.left if self.least_left is None else min(self.least_left, sample.left)
            if sample.left < self.reserve and not self.why:
                self.why = "machine"
        if self.budget is not None and sample.held > self.budget:
            self.why = "budget"

    def describe(self) -> tuple[str, str]:
        """-> the first two parts of the error: the limit, and the memory that was used."""
        if self.why == "machine":
            left = gib(self.least_left or 0)
            return (
                f"leave {gib(self.reserve)} of this machine's memory free",
                f"{left} was left, and the run used {gib(self.most)}",
            )
        return f"stay within {gib(self.budget or 0)} of the fast tier", f"the run used {gib(self.most)}"

    @classmethod
    def of(cls, budget: int | None, device: torch.device) -> Guard:
        """The guard of a run on `device`. If the machine has little memory left already, only the budget is checked."""
        reserve = reserve_bytes(fast_bytes() or 0)
        left = available_memory()
        return cls(budget, reserve if left is not None and left > 2 * reserve else 0)


@contextlib.contextmanager
def hard_limit(budget: int, device: torch.device, meter: Meter) -> Iterator[None]:
    """Within it, an allocation that would exceed `budget` bytes fails. BadInput if the system does not support that."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / (fast_bytes(device) or budget)), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    if not sys.platform.startswith("linux") or not process_memory()["data"]:
        raise BadInput("train --hard", f"{sys.platform} cannot limit a process's memory", "Leave --hard out")
    import resource

    soft, most = resource.getrlimit(resource.RLIMIT_DATA)
    caps = [size for size in (soft, most) if size != resource.RLIM_INFINITY]

    def follow(sample: Sample) -> None:
        limit = min([budget + max(0, sample.mapped - sample.anon), *caps])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))

    meter.watchers.append(follow)
    try:
        meter.sample()
        yield
    finally:
        meter.stop_watching(follow)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, most))


REFUSED = ("can't allocate memory", "not enough memory", "bad_alloc", "cannot allocate memory", "memory object")
PERHAPS = ("could not create a primitive", "could not execute a primitive", "can't start new thread")


def ran_out(error: BaseException | None, hard: bool = False) -> bool:
    """Whether `error`, or one of its causes, means that an allocation failed.

    `hard`: also counts messages of oneDNN and Python that can have other reasons.
    """
    words = REFUSED + PERHAPS if hard else REFUSED
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(part in str(error).lower() for part in words):
            return True
        error = error.__cause__ or error.__context__
    return False
