"""A thread reads rows of the slow tier before they are used.

A mapped file is read when one of its pages is touched: one page fault after the other, each as long as the disk takes
to answer. If the same rows are requested together, the disk serves them many times as fast, and if they are requested
early enough they are in memory before they are touched. So a store requests all rows of a fetch at once (a demand
read), and a patch requests the rows of the next fetch if it knows them (a prefetch). The thread asks the kernel to read
all pages that are missing (MADV_WILLNEED) and then maps them into the process (MADV_POPULATE_READ, if the kernel has
it). It only reads: a row that was not requested, or not in time, is read more slowly, but correctly. No anonymous
memory grows: the pages belong to the file, and the kernel may take them back.

For an accelerator, rows are copied to the device on a stream of its own (`Carrier`); the store uses the copies that are
complete or in progress and copies the other rows itself. Not yet measured on a GPU.

Rows are prefetched only while some have to be read (`cold`). Demand reads show that, so that where all pages are in
memory the whole costs a check of a few pages.
"""

from __future__ import annotations

import ctypes
import os
import queue
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .record import PAGE, VALUES

WILLNEED, POPULATE_READ = 3, 22  # advice to madvise(2); the second since Linux 5.14
WAITING = 32  # prefetches that wait at most; the oldest are dropped
PIECE = 2**23  # bytes that are requested from the kernel at a time; demand reads go in between
PATIENCE = 64  # requests in a row that found all pages in memory, after which prefetching stops
CARRIED = 2**28  # bytes of one request that are copied to an accelerator at most


class Request:
    """Rows of a store, in the order in which they will be read."""

    def __init__(self, store: Any, rows: Sequence[int], kinds: Sequence[str], now: bool):
        self.store, self.rows, self.kinds, self.now = weakref.ref(store), rows, kinds, now
        self.done = 0  # how many of the rows are ready
        self.read: list[int] = []  # the rows that had to be read
        self.cancelled = False
        self.carrier: Carrier | None = None  # copies the rows to an accelerator
        self.copies: Tensor | None = None  # the rows there, in the order of `rows`
        self.mark: Any = None  # the event after the last copy

    def arrive(self) -> dict[int, Tensor]:
        """-> the rows that were copied, by number; the device's further work waits for the copies."""
        copies, done = self.copies, self.done
        if copies is None or self.carrier is None:
            return {}
        self.carrier.arrive(copies, self.mark)
        return {row: copies[at] for at, row in enumerate(self.rows[:done])}


class Carrier:
    """Copies rows to an accelerator on a stream of its own, by way of pinned memory."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.Stream(device)
        self.staging = torch.empty(0, dtype=torch.uint8)
        self.staged: Any = None  # the event after the last copy out of `staging`

    def buffer(self, count: int, row: Tensor) -> Tensor:
        with self.stream:
            return torch.empty(count, *row.shape, dtype=row.dtype, device=self.device)

    def mark(self) -> Any:
        return torch.Event(self.device)

    def copy(self, row: Tensor, to: Tensor, mark: Any) -> None:
        """Called by the reader's thread only."""
        if not row.is_pinned():
            if self.staged is not None:
                self.staged.synchronize()  # one row is staged at a time
            if self.staging.nbytes < row.nbytes:
                self.staging = torch.empty(row.nbytes, dtype=torch.uint8, pin_memory=True)
            row = self.staging[: row.nbytes].view(row.dtype).view(row.shape).copy_(row)
            self.staged = mark
        with self.stream:
            to.copy_(row, non_blocking=True)
            mark.record(self.stream)

    def arrive(self, buffer: Tensor, mark: Any) -> None:
        here = torch.accelerator.current_stream(self.device)
        here.wait_event(mark)
        buffer.record_stream(here)


class _Work:
    """What the thread and the Reader share; the thread refers to nothing else, so that the Reader can be freed."""

    def __init__(self, carrier: type[Carrier]) -> None:
        self.urgent: deque[Request] = deque(maxlen=WAITING)
        self.prefetches: deque[Request] = deque(maxlen=WAITING)
        self.calls: queue.SimpleQueue[bool] = queue.SimpleQueue()  # one for each request; False ends the thread
        self.ended = False
        self.cold = 0  # above 0: rows had to be read lately
        self.pages = _Pages()
        self.carrier, self.carriers = carrier, dict[torch.device, Carrier]()

    def run(self) -> None:
        try:
            while self.calls.get() and not self.ended:
                self.serve()
        finally:
            self.ended = True

    def serve(self) -> None:
        """Handle all requests that wait."""
        while not self.ended and (waiting := self.urgent or self.prefetches):
            self._handle(waiting.popleft())

    def _handle(self, request: Request) -> None:
        store = request.store()
        if store is None or request.cancelled:
            return
        if not store.in_place:
            if (table := store.slow_values) is not None:
                self._carry(request, table, store.device)
            return
        held, parts = store.pages(request.rows, request.kinds)
        self._read(request, parts)
        del held  # until here it keeps the mapping, even if the store is freed

    def _read(self, request: Request, parts: list[tuple[int, int, int]]) -> None:
        """Read a piece at a time. `parts`: (address, bytes, how many of the rows are complete by then)."""
        found = at = 0
        while at < len(parts) and not request.cancelled and not self.ended:
            end, size = at, 0
            while end < len(parts) and size < PIECE:
                size += parts[end][1]
                end += 1
            absent = [part for part in parts[at:end] if not self.pages.resident(*part[:2])]
            done = parts[end - 1][2]
            if absent:
                self.cold = PATIENCE
                request.read += request.rows[request.done : done]
            for start, length, _ in absent:
                self.pages.request(start, length)
            for start, length, _ in () if request.now else absent:  # a demand read is touched anyway
                self.pages.map_in(start, length)
            found += len(absent)
            request.done, at = done, end
            while self.urgent and not request.now:
                self._handle(self.urgent.popleft())
        if not found:
            self.cold = max(0, self.cold - 1)

    def _carry(self, request: Request, table: Tensor, device: torch.device) -> None:
        carrier = self.carriers.get(device)
        if carrier is None:
            carrier = self.carriers[device] = self.carrier(device)
        rows = request.rows[: CARRIED // table[0].nbytes]
        for at, row in enumerate(rows):
            if request.cancelled or self.ended:
                return
            if request.copies is None:
                request.carrier, request.mark = carrier, carrier.mark()
                request.copies = carrier.buffer(len(rows), table[row])
            carrier.copy(table[row], request.copies[at], request.mark)
            request.read.append(row)
            request.done = at + 1


class Reader:
    """One thread that reads rows for the stores of a model. It ends with `close`, or when the Reader is freed."""

    def __init__(self, alone: bool = False, carrier: type[Carrier] = Carrier):
        """`alone`: without a thread; requests wait until `serve` is called."""
        self.alone, self.carrier = alone, carrier
        self._begin()

    def _begin(self) -> None:
        self._work, self._pid = _Work(self.carrier), os.getpid()
        self._thread: threading.Thread | None = None
        self._end = weakref.finalize(self, _stop, self._work, os.getpid())

    @property
    def cold(self) -> bool:
        """Whether rows had to be read lately."""
        return self._work.cold > 0

    def serve(self) -> None:
        self._work.serve()

    def resident(self, pages: Iterable[int]) -> bool:
        """Whether these pages (addresses) are in memory; if one is not, prefetching starts. Wakes no thread."""
        work = self._here()
        if all(work.pages.resident(start, PAGE) for start in pages):
            return True
        work.cold = PATIENCE
        return False

    def request(
        self, store: Any, rows: Sequence[int], kinds: Sequence[str] = (VALUES,), now: bool = False
    ) -> Request | None:
        """Have the rows' parts read; returns at once. `now`: before all prefetches."""
        work = self._here()
        if work.ended or not rows:
            return None
        request = Request(store, rows, kinds, now)
        (work.urgent if now else work.prefetches).append(request)
        if not self.alone:
            if self._thread is None:
                self._thread = threading.Thread(target=work.run, name="trimtab-reader", daemon=True)
                self._thread.start()
            work.calls.put(True)
        return request

    def _here(self) -> _Work:
        """A forked process has no thread, and its parent's requests are not its own: it starts anew."""
        if self._pid != os.getpid():
            self._end.detach()
            self._begin()
        return self._work

    def close(self) -> None:
        """End the thread, and wait until it has."""
        self._end()
        if self._thread is not None and self._thread is not threading.current_thread() and self._pid == os.getpid():
            self._thread.join()


def _stop(work: _Work, pid: int) -> None:
    if pid == os.getpid():
        work.ended = True
        work.calls.put(False)


class _Pages:
    """System calls about pages of a mapping, by address and bytes."""

    def __init__(self) -> None:
        self.libc = self.mincore = None
        try:
            libc = ctypes.CDLL(None, use_errno=True)  # its calls let other threads run
            libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            mincore = ctypes.PyDLL(None).mincore  # this one does not: switching threads would take longer than the call
            mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
            self.libc, self.mincore = libc, mincore
        except (OSError, AttributeError, TypeError):
            pass  # a system without these calls
        self.populate = sys.platform == "linux"

    def resident(self, start: int, length: int) -> bool:
        """Whether all pages are in memory, of this process or in the page cache."""
        pages = -(-length // PAGE)
        seen = (ctypes.c_char * pages)()
        if self.mincore is None or self.mincore(start, length, seen):
            return False
        return seen.raw.count(b"\x01") == pages  # on other systems than Linux: never

    def request(self, start: int, length: int) -> None:
        if self.libc is not None:
            self.libc.madvise(start, length, WILLNEED)

    def map_in(self, start: int, length: int) -> None:
        if self.populate and self.libc is not None and self.libc.madvise(start, length, POPULATE_READ):
            self.populate = ctypes.get_errno() != 22  # EINVAL: an older kernel
