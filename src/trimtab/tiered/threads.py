"""Work on several tables at once: each by a thread of its own, which computes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

MOST = 4  # threads: each holds copies of rows, and Python lets one at a time do what is between its calls


def at_once() -> int:
    """How many tables are worked on at a time."""
    return min(torch.get_num_threads(), MOST)


def beside() -> int:
    """How many threads are started for it."""
    return at_once() if at_once() > 1 else 0


def side_by_side(do: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """What `do` gives for each item, in their order; `do` is called in several threads, where PyTorch has several.

    A piece of a table is small: shared among threads, its copies and sums mostly wait for one another, and writing a
    file is one thread's work in any case. What `do` raises is raised, once all that was begun has ended.
    """
    many, threads = min(at_once(), len(items)), torch.get_num_threads()
    if many < 2:
        return [do(item) for item in items]
    torch.set_num_threads(1)  # of this thread's operations, and of those of threads that are started from here on
    try:
        with ThreadPoolExecutor(many, "trimtab-tables") as pool:
            return list(pool.map(do, items))
    finally:
        torch.set_num_threads(threads)
