"""Several tables are processed in parallel, each by one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

MOST = 4  # workers: each needs its own copies of rows, and Python code between torch calls runs one thread at a time


def max_workers() -> int:
    """How many tables are processed at a time."""
    return min(torch.get_num_threads(), MOST)


def extra_threads() -> int:
    """How many threads `parallel_map` starts at most."""
    return max_workers() if max_workers() > 1 else 0


def parallel_map(do: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`do(item)` of each item, in order; calls run in several threads if PyTorch has several.

    Each worker computes single-threaded: one table's tensors are too small to split among threads, and writing a file
    is one thread's work in any case. An exception from `do` is raised after all calls that were started have ended.
    """
    workers, threads = min(max_workers(), len(items)), torch.get_num_threads()
    if workers < 2:
        return [do(item) for item in items]
    torch.set_num_threads(1)  # of this thread, and of all threads that are started from here on
    try:
        with ThreadPoolExecutor(workers, "trimtab-tables") as pool:
            return list(pool.map(do, items))
    finally:
        torch.set_num_threads(threads)
