"""Rows of the slow tier are read ahead of the pass that needs them, by a thread beside it.

A mapped file is read when a page of it is touched: one page fault after the other, each as long as the disk takes to
answer. Asked for all at once, the same rows come many times as fast, and asked for early enough they are there before
they are touched. So a store that is asked for rows tells the reader of all of them, and a patch tells it which rows it
expects next. The reader orders the whole of what is not in memory (MADV_WILLNEED) and then brings it into the process's
page table (MADV_POPULATE_READ, where the kernel has it). It only reads: a row that was not asked for, or not in time,
is read more slowly, and never otherwise. Nothing anonymous grows: the pages are the file's, and the kernel's to take.

Before an accelerator the rows are copied to it instead, on a stream of its own (`Carrier`); the store takes those that
are on their way and copies the others itself. Not yet measured on a GPU.

Guesses are made only while rows have to be read (`cold`). The reader knows that from what stores need in any case, so
that where all pages are in memory it costs a look at a few pages.
"""

from __future__ import annotations

import ctypes
import os
import queue
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .record import PAGE, VALUES

WILLNEED, POPULATE_READ = 3, 22  # advice to madvise(2); the second since Linux 5.14
WAITING = 32  # guesses that wait at most; the oldest are let go
PIECE = 2**23  # bytes that are ordered at a time: then what is needed at once goes first
PATIENCE = 64  # asks in a row that found all pages in memory, after which nothing is guessed
CARRIED = 2**28  # bytes of one ask that are held on an accelerator at most


class Ask:
    """Rows of a store, in the order in which they will be read."""

    def __init__(self, store: Any, rows: Sequence[int], kinds: Sequence[str], now: bool):
        self.store, self.rows, self.kinds, self.now = weakref.ref(store), rows, kinds, now
        self.done = 0  # how many of the rows are there
        self.read: list[int] = []  # those that were not, and are read
        self.over = False  # nobody waits for it any more
        self.load: Load | None = None  # on an accelerator


class Load:
    """Rows of an ask on an accelerator: row number `at` of the ask in `buffer[at]`, once `mark` has passed."""

    def __init__(self, carrier: Carrier, buffer: Tensor):
        self.carrier, self.buffer, self.mark = carrier, buffer, carrier.mark()

    def arrive(self) -> None:
        """The device's work from here on finds what has been copied so far."""
        self.carrier.arrive(self.buffer, self.mark)


class Carrier:
    """Copies rows to an accelerator on a stream of its own, by way of pinned memory."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.Stream(device)
        self.staging = torch.empty(0, dtype=torch.uint8)
        self.staged: Any = None  # the mark behind the last copy out of `staging`

    def buffer(self, count: int, row: Tensor) -> Tensor:
        with self.stream:
            return torch.empty(count, *row.shape, dtype=row.dtype, device=self.device)

    def mark(self) -> Any:
        return torch.Event(self.device)

    def copy(self, row: Tensor, to: Tensor, mark: Any) -> None:
        """Called by the reader only."""
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
    """What the thread and its owner share; the thread holds nothing else, so that the owner can go."""

    def __init__(self, carrier: type[Carrier]) -> None:
        self.urgent: deque[Ask] = deque(maxlen=WAITING)
        self.guesses: deque[Ask] = deque(maxlen=WAITING)
        self.calls: queue.SimpleQueue[bool] = queue.SimpleQueue()  # one for each ask; False ends the thread
        self.ended = False
        self.cold = 0
        self.pages = _Pages()
        self.carrier, self.carriers = carrier, dict[torch.device, Carrier]()

    def run(self) -> None:
        try:
            while self.calls.get() and not self.ended:
                self.serve()
        finally:
            self.ended = True

    def serve(self) -> None:
        """Everything that waits."""
        while not self.ended and (waiting := self.urgent or self.guesses):
            self._fill(waiting.popleft())

    def _fill(self, ask: Ask) -> None:
        store = ask.store()
        if store is None or ask.over:
            return
        if not store.in_place:
            if (table := store.home) is not None:
                self._carry(ask, table, store.device)
            return
        held, parts = store.pages(ask.rows, ask.kinds)
        self._read(ask, parts)
        del held  # until here the mapping stays, whatever becomes of the store

    def _read(self, ask: Ask, parts: list[tuple[int, int, int]]) -> None:
        """Order a piece at a time and see it in. `parts`: address, bytes, how many of the rows are whole by then."""
        found = at = 0
        while at < len(parts) and not ask.over and not self.ended:
            end, size = at, 0
            while end < len(parts) and size < PIECE:
                size += parts[end][1]
                end += 1
            absent = [part for part in parts[at:end] if not self.pages.there(*part[:2])]
            done = parts[end - 1][2]
            if absent:
                self.cold = PATIENCE
                ask.read += ask.rows[ask.done : done]
            for start, length, _ in absent:
                self.pages.order(start, length)
            for start, length, _ in () if ask.now else absent:  # else it is being touched
                self.pages.bring(start, length)
            found += len(absent)
            ask.done, at = done, end
            while self.urgent and not ask.now:
                self._fill(self.urgent.popleft())
        if not found:
            self.cold = max(0, self.cold - 1)

    def _carry(self, ask: Ask, table: Tensor, device: torch.device) -> None:
        carrier = self.carriers.get(device)
        if carrier is None:
            carrier = self.carriers[device] = self.carrier(device)
        rows = ask.rows[: CARRIED // table[0].nbytes]
        for at, row in enumerate(rows):
            if ask.over or self.ended:
                return
            held = table[row]
            if ask.load is None:
                ask.load = Load(carrier, carrier.buffer(len(rows), held))
            carrier.copy(held, ask.load.buffer[at], ask.load.mark)
            ask.read.append(row)
            ask.done = at + 1


class Reader:
    """One thread that reads ahead for the stores of a model. It ends with `close`, or with the last who knows it."""

    def __init__(self, alone: bool = False, carrier: type[Carrier] = Carrier):
        """`alone`: without a thread; what is asked for waits until `serve`."""
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

    def sees(self, pages: Iterable[int]) -> bool:
        """Whether these pages (addresses) are in memory; if one is not, it is time to read ahead. Wakes no thread."""
        work = self._here()
        if all(work.pages.there(start, PAGE) for start in pages):
            return True
        work.cold = PATIENCE
        return False

    def ask(self, store: Any, rows: Sequence[int], kinds: Sequence[str] = (VALUES,), now: bool = False) -> Ask | None:
        """Have the rows' parts read; returns at once. `now`: before all guesses."""
        work = self._here()
        if work.ended or not rows:
            return None
        ask = Ask(store, rows, kinds, now)
        (work.urgent if now else work.guesses).append(ask)
        if not self.alone:
            if self._thread is None:
                self._thread = threading.Thread(target=work.run, name="trimtab-reader", daemon=True)
                self._thread.start()
            work.calls.put(True)
        return ask

    def _here(self) -> _Work:
        """A forked process has no thread, and what its parent asked for is not its own."""
        if self._pid != os.getpid():
            self._end.detach()
            self._begin()
        return self._work

    def close(self) -> None:
        """End the thread, and wait for the row that it is at."""
        self._end()
        if self._thread is not None and self._thread is not threading.current_thread() and self._pid == os.getpid():
            self._thread.join()


def _stop(work: _Work, pid: int) -> None:
    if pid == os.getpid():
        work.ended = True
        work.calls.put(False)


def read_ahead(stores: Iterable[Any], at_end: Callable[[Callable[[], None]], None]) -> bool:
    """Give those of the stores that need it one reader, which ends when what `at_end` is given is called.

    -> whether there are any. What may be on its way to a device is said to planned stores too.
    """
    stores = list(stores)
    for store in stores:
        store.carried = 0 if store.in_place else min(CARRIED, store.rows * store.parts[VALUES].nbytes)
    far = [store for store in stores if store.far]
    if far:
        reader = Reader()
        for store in far:
            store.reader = reader
        at_end(reader.close)
    return bool(far)


class _Pages:
    """What the kernel is asked about pages of a mapping, by address and bytes."""

    def __init__(self) -> None:
        self.libc = library()
        # without giving way to other threads: that would take longer than the call
        self.mincore = ctypes.PyDLL(None).mincore if self.libc is not None else None
        if self.mincore is not None:
            self.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        self.populate = sys.platform == "linux"

    def there(self, start: int, length: int) -> bool:
        """Whether all pages are in memory, of this process or in the page cache."""
        pages = -(-length // PAGE)
        seen = (ctypes.c_char * pages)()
        if self.mincore is None or self.mincore(start, length, seen):
            return False
        return seen.raw.count(b"\x01") == pages  # elsewhere than on Linux: never

    def order(self, start: int, length: int) -> None:
        if self.libc is not None:
            self.libc.madvise(start, length, WILLNEED)

    def bring(self, start: int, length: int) -> None:
        if self.populate and self.libc is not None and self.libc.madvise(start, length, POPULATE_READ):
            self.populate = ctypes.get_errno() != 22  # EINVAL: an older kernel


def library() -> Any:
    """The C library, by calls that let other threads run; None where it has no such calls."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        return libc if hasattr(libc, "mincore") else None
    except (OSError, AttributeError, TypeError):
        return None
