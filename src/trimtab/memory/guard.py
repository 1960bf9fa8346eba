"""Ends a run before the kernel or the CUDA allocator does.

The meter shows the guard what the fast tier holds, fifty times a second. Once that is more than the budget, or once the
machine has little left for anyone, the guard has tripped: training ends after the step it is in, with a checkpoint.

A budget can also be made a limit of the process (`hard_limit`). On Linux that is RLIMIT_DATA. The kernel counts under
it every private writable mapping in its whole size, touched or not: stacks of threads, a malloc's reserve, buffers of
generated code (they grow with each new shape), a safetensors file that is mapped copy-on-write. So the limit follows
the meter: it is the budget and what is mapped but not held, and leaves room for as many new pages as the budget does.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import BadInput
from .budget import fast_bytes, gib, room
from .meter import Meter, Sample, process_memory

LEAST, MOST = 2**28, 2**30  # bytes of the machine that stay free: a thirty-second part of it within these bounds


def reserve_bytes(total: int) -> int:
    """How little of a machine's memory may be left before a run ends itself."""
    return max(LEAST, min(MOST, total // 32))


@dataclass
class Guard:
    """`see` is told what is held; `why` says what is wrong once something is. All sizes in bytes."""

    budget: int | None = None  # of the fast tier
    reserve: int = 0  # what the machine must have left
    most: int = 0  # held at the worst moment
    least_left: int | None = None
    why: str = ""  # "budget", "machine", or nothing

    def see(self, sample: Sample) -> None:
        self.most = max(self.most, sample.held)
        if sample.left is not None:
            self.least_left = sample.left if self.least_left is None else min(self.least_left, sample.left)
            if sample.left < self.reserve and not self.why:
                self.why = "machine"
        if self.budget is not None and sample.held > self.budget:
            self.why = "budget"

    def describe(self) -> tuple[str, str]:
        """(what was asked of the run, what there was) in words."""
        if self.why == "machine":
            left = gib(self.least_left or 0)
            return (
                f"leave {gib(self.reserve)} of this machine's memory free",
                f"{left} was left, and the run held {gib(self.most)}",
            )
        return f"stay within {gib(self.budget or 0)} of the fast tier", f"the run held {gib(self.most)}"

    @classmethod
    def of(cls, budget: int | None, device: torch.device) -> Guard:
        """The guard of a run on `device`. A machine that is short already when the run starts is not watched."""
        reserve = reserve_bytes(fast_bytes() or 0)
        left = room()
        return cls(budget, reserve if left is not None and left > 2 * reserve else 0)


@contextlib.contextmanager
def hard_limit(budget: int, device: torch.device, meter: Meter) -> Iterator[None]:
    """Within it, an allocation that would lead over `budget` bytes fails. BadInput where the system cannot do that."""
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
    """Whether `error`, or one that it came from, says that an allocation was refused.

    Under a `hard` limit also what oneDNN and Python say when they are refused one, and may say for other reasons.
    """
    words = REFUSED + PERHAPS if hard else REFUSED
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(said in str(error).lower() for said in words):
            return True
        error = error.__cause__ or error.__context__
    return False
