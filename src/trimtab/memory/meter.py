"""Measures the memory that a process and its tensors use.

On a CPU: anonymous resident memory of the process (`RssAnon`), sampled by a thread, and the bytes of live tensors
during one step. Pages of mapped files (`RssFile`) are reported separately, since the kernel can reclaim them. On CUDA:
the allocator's peak allocated and peak reserved bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..foreign import TorchDispatchMode, tree_iter
from .budget import available_memory, fast_bytes

GIB = 2**30


def process_memory(pid: int | str = "self") -> dict[str, int]:
    """{"anon", "file", "data"} of a process in bytes, from /proc (zeros without it): resident anonymous pages, resident
    pages of files, and the size of all private writable mappings, touched or not.
    """
    found = {"anon": 0, "file": 0, "data": 0}
    names = {"RssAnon": "anon", "RssFile": "file", "VmData": "data"}
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                name, _, rest = line.partition(":")
                if name in names:
                    found[names[name]] = int(rest.split()[0]) * 1024
    except OSError:
        pass
    return found


def worker_memory() -> int:
    """Bytes of the child processes (data-loader workers) that they do not share with this one: their written pages."""
    found = 0
    try:
        for children in Path("/proc/self/task").glob("*/children"):
            for pid in children.read_text().split():
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Private_Dirty:"):
                        found += int(line.split()[1]) * 1024
    except OSError:
        pass  # a worker that ended meanwhile, or no /proc
    return found


class Sample(NamedTuple):
    """Memory at one moment, in bytes."""

    held: int  # of the fast tier: used by the process and its workers (CPU), or reserved by the allocator (CUDA)
    left: int | None  # available on the machine; None: not measured in this sample
    anon: int  # resident anonymous pages of this process
    mapped: int  # its private writable mappings, touched or not


class Meter:
    """Samples memory from `start` to `stop`; `mark(...)` sets the phase in the timeline.

    `baseline`: the process at the start, so growth = peak - baseline. `now`: the newest sample. `watchers` are called
    with each sample. `workers`: whether to add the memory of child processes.
    """

    EVERY = 10  # samples between two measurements of the machine and the workers, which cost more

    def __init__(self, timeline: Path | None = None, seconds: float = 0.02, device: torch.device | None = None):
        self.timeline, self.seconds = timeline, seconds
        self.device = device if device is not None and device.type == "cuda" else None
        self.baseline = self.peak = self.now = {"anon": 0, "file": 0}
        self.watchers: list[Callable[[Sample], None]] = []
        self.workers = False
        self.parts: dict[str, int] = {}  # kind -> bytes that stay from step to step, when known
        self.total = fast_bytes(self.device) or 0  # size of the fast tier
        self.phase = "start"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = 0.0
        self._last_written = -1.0
        self._samples = self._children = 0
        self._lock = threading.Lock()  # samples are taken by the meter's thread and at the end of each step

    def start(self) -> Meter:
        found = process_memory()
        self.baseline = {kind: found[kind] for kind in self.peak}
        self.peak = self.now = dict(self.baseline)
        if self.device:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="trimtab-meter", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        if self._thread:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self._last_written = -1.0
            self.sample()

    def rebase(self) -> int:
        """Sets the baseline to the present memory; -> its anonymous bytes."""
        self.sample()
        self.baseline = dict(self.now)
        return self.baseline["anon"]

    def mark(self, phase: str) -> None:
        self.phase, self._last_written = phase, -1.0

    def _run(self) -> None:
        while not self._stop.wait(self.seconds):
            with contextlib.suppress(MemoryError):  # under a hard limit; the next sample may succeed
                self.sample()

    def sample(self) -> None:
        """Takes a sample now."""
        with self._lock:
            self._sample()

    def stop_watching(self, watcher: Callable[[Sample], None]) -> None:
        """Removes `watcher`; it is not called after this returns."""
        with self._lock:
            self.watchers.remove(watcher)

    def held(self) -> int:
        """Bytes of the fast tier at the newest sample."""
        return torch.cuda.memory_reserved(self.device) if self.device else self.now["anon"]

    def _sample(self) -> None:
        found = process_memory()
        rare = self._samples % self.EVERY == 0
        self._samples += 1
        if rare and self.workers:
            self._children = worker_memory()
        self.now = now = {"anon": found["anon"] + self._children, "file": found["file"]}
        if self.watchers:
            sample = Sample(self.held(), available_memory() if rare else None, found["anon"], found["data"])
            for watcher in self.watchers:
                watcher(sample)
        self.peak = {kind: max(self.peak[kind], now[kind]) for kind in now}
        seconds = time.monotonic() - self._began
        if self.timeline and seconds - self._last_written >= 0.5:  # the peak counts every sample
            self._last_written = seconds
            row: dict[str, Any] = {"seconds": round(seconds, 2), "phase": self.phase, **now}
            row |= {"parts": self.parts} if self.parts else {}
            if self.device:
                row["allocated"] = torch.cuda.memory_allocated(self.device)
            try:
                with self.timeline.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError:
                self.timeline = None  # a full disk: the run reports that itself

    def result(self) -> dict[str, int]:
        """Bytes: `fast_peak_bytes`, `fast_growth_bytes` (over the baseline), `slow_bytes` (peak of mapped pages)."""
        if self.device:
            stats = torch.cuda.memory_stats(self.device)
            reserved = stats["reserved_bytes.all.peak"]
            return {
                "fast_peak_bytes": reserved,
                "fast_growth_bytes": reserved,
                "allocated_peak_bytes": stats["allocated_bytes.all.peak"],
                "slow_bytes": process_memory()["anon"],
            }
        return {
            "fast_peak_bytes": self.peak["anon"],
            "fast_growth_bytes": self.peak["anon"] - self.baseline["anon"],
            "slow_bytes": self.peak["file"],
        }


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensor storages while active: `known` ones, and all that operations create.

    `peak_bytes` is exact for torch's tensors; scratch memory inside kernels is not counted. It costs some Python time
    per operation, so the engine uses it for one step only. Storages mapped from a file count in `mapped`.
    """

    def __init__(self, known: Any = (), mapped: Any = ()):
        super().__init__()
        self.live = self.peak_bytes = self.mapped = 0
        self._seen: dict[int, weakref.ref] = {}
        maps = file_ranges()
        for tensor in known:
            self._add(tensor, maps)
        for tensor in mapped:
            self._add(tensor, [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)])
        self.peak_bytes = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in tree_iter(out):
            if isinstance(item, torch.Tensor):
                self._add(item)
        self.peak_bytes = max(self.peak_bytes, self.live)
        return out

    def _add(self, tensor: torch.Tensor, maps: list[tuple[int, int]] | None = None) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        if maps and is_mapped(tensor, maps):
            self.mapped += size
            size = 0
        self._born(tensor, key, size)

        def gone(_, key=key, size=size):
            self._seen.pop(key, None)
            self._died(key, size)

        self._seen[key] = weakref.ref(storage, gone)

    def _born(self, tensor: torch.Tensor, key: int, size: int) -> None:
        self.live += size

    def _died(self, key: int, size: int) -> None:
        self.live -= size


def is_mapped(tensor: torch.Tensor, maps: list[tuple[int, int]]) -> bool:
    """Whether the tensor is mapped from a file; `maps`: the result of `file_ranges`."""
    start = tensor.untyped_storage().data_ptr()
    return any(low <= start < high for low, high in maps)


def file_ranges() -> list[tuple[int, int]]:
    """Address ranges of this process that are mapped from safetensors files."""
    return [(low, high) for low, high, _ in _mappings("maps")]


def drop_clean_mappings() -> None:
    """Tells the kernel to drop pages of safetensors files (they are read again when touched).

    After a conversion the file's pages stay resident although nothing reads them. Ranges with a written page (columns
    trained in place) are not dropped: their content is in no file.
    """
    madvise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
    if madvise is None:
        return
    for low, high, dirty in _mappings("smaps"):
        if not dirty:
            madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), ctypes.c_int(4))  # MADV_DONTNEED


def _mappings(name: str) -> list[tuple[int, int, bool]]:
    """(from, to, whether a page was written) of each mapping of a safetensors file; always False for "maps"."""
    found: list[tuple[int, int, bool]] = []
    inside = False
    try:
        with open(f"/proc/self/{name}") as lines:
            for line in lines:
                word = line.split(" ", 1)[0]
                if "-" in word and not word.endswith(":"):
                    if inside := ".safetensors" in line:
                        low, _, high = word.partition("-")
                        found.append((int(low, 16), int(high, 16), False))
                elif inside and word in ("Private_Dirty:", "Shared_Dirty:", "Anonymous:") and int(line.split()[1]):
                    found[-1] = (*found[-1][:2], True)
    except OSError:
        pass
    return found
