"""Runs the trainings of benchmarks/knowledge.py, each once and in its own process, and searches for learning rates."""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import HERE, Kept, child, seek

Job = dict[str, Any]
APART, SEEDS = 100, (0, 2, 3)  # seeds of the facts: of those that settings are chosen on, and of those tested (1: base)
LONGEST = 6 * 3600  # seconds of a training
FURTHER = 1.5  # from the best rate to the next one that is tried, where the best was at an end
T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t, two-sided, by degrees of freedom


class Bench:
    """Runs each training once, in its own process, `at_once` at a time. A training that is in the file `kept` (a line
    of JSON each: its settings and its result) is not run again."""

    def __init__(self, part: str, work: Path, kept: Path, through: str = "", at_once: int = 1):
        self.part, self.work, self.through, self.at_once = part, work, shlex.split(through), at_once
        self.kept = Kept(kept)
        work.mkdir(parents=True, exist_ok=True)

    def run(self, do: str, **job: Any) -> dict[str, Any]:
        job |= {"part": self.part, "do": do}
        if (found := self.kept.get(job)) is not None:
            return found
        told = json.dumps({**job, "work": str(self.work)})
        threads = max(1, (os.cpu_count() or 1) // self.at_once) if self.at_once > 1 else 0
        command = [str(HERE / "knowledge.py"), "worker", "--job", told]
        try:
            found = child(command, timeout=LONGEST, through=self.through, threads=threads)
        except RuntimeError as error:
            raise SystemExit(str(error)) from None
        return self.kept.add(job, found)

    def each(self, do: Callable[[Any], Any], cases: Iterable[Any]) -> list[Any]:
        """`do` of each case, `at_once` of them at a time; the first that fails keeps those that wait from starting."""
        pool = ThreadPoolExecutor(self.at_once)
        try:
            return list(pool.map(do, cases))
        finally:
            pool.shutdown(cancel_futures=True)

    def best(self, side: Side, rates: tuple[float, ...], further: float = FURTHER, **job: Any) -> Side:
        """`side` at the rate with the highest recall on facts set apart, of `rates` and of those beyond them (seek)."""
        found = []

        def recall(rate: float) -> float:
            found.append(self.run("learn", **side.job, rate=rate, seed=APART, **job))
            return found[-1]["recall"]

        rate, most = seek(recall, rates, further)
        return Side(side.name, side.patch, side.fields, rate, most, max(run["fast"] for run in found))

    def around(self, side: Side, **job: Any) -> Side:
        """`side` at the best of the rate that it has, its half, and what lies beyond them by factors of two."""
        return self.best(side, (side.rate, half(side.rate)), 2, **job)

    def calmer(self, side: Side, **job: Any) -> Side:
        """`side` at the rate that it has, halved for as long as recall on facts set apart gains by it: the longer a
        training, the smaller its best rate."""
        found = self.best(side, (side.rate,), **job)
        while (next_ := self.best(side, (half(found.rate),), **job)).recall > found.recall:
            found = next_
        return found

    def wider(self, side: Side, fields: Job, **job: Any) -> Side:
        """`side` with `fields` at the rate that it has, where recall on facts set apart gains by them."""
        found = self.best(Side(side.name, side.patch, {**side.fields, **fields}), (side.rate,), **job)
        return found if found.recall > side.recall else side

    def fitted(self, side: Side, budget: int) -> Side:
        """`side` at the least r of which the fast memory is `budget` bytes or more."""
        fields = {key: value for key, value in side.fields.items() if key != "r"}
        r = self.run("fit", patch=side.patch, fields=fields, budget=budget)["r"]
        return Side(side.name, side.patch, {**fields, "r": r}, side.rate)


def half(rate: float) -> float:
    return float(f"{rate / 2:.2g}")


class Side:
    """A method with its settings: what it had on the facts set apart, and the fast memory that it took there."""

    def __init__(
        self, name: str, patch: str, fields: dict[str, Any], rate: float = 0, recall: float = 0, fast: int = 0
    ):
        self.name, self.patch, self.fields, self.rate, self.recall, self.fast = name, patch, fields, rate, recall, fast

    @property
    def job(self) -> Job:
        return {"patch": self.patch, "fields": self.fields}

    @property
    def shown(self) -> str:
        return f"{self.name} ({', '.join(f'{key} {value}' for key, value in self.fields.items())})"


def peers(bench: Bench, budget: int, tried: list[tuple[str, str, Job, tuple[float, ...], Job]]) -> list[Side]:
    """Each at the least r that takes the budget, and at its best rate; r is the field that they have in common."""

    def best(case: tuple[str, str, Job, tuple[float, ...], Job]) -> Side:
        name, patch, fields, rates, job = case
        return bench.best(bench.fitted(Side(name, patch, fields), budget), rates, **job)

    return bench.each(best, tried)


def interval(values: list[float]) -> tuple[float, float, float]:
    """-> mean, and the ends of its 95 % confidence interval (Student's t)."""
    mean = statistics.mean(values)
    half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, mean - half, mean + half
