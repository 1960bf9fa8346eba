"""The trainings of benchmarks/knowledge.py: run once each, in processes of their own, and the rates that suit them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import HERE, seek

Job = dict[str, Any]
APART, SEEDS = 100, (0, 2, 3)  # seeds of the facts: of those that settings are chosen on, and of those tested (1: base)
FURTHER = 1.5  # from the best rate to the next one that is tried, where the best was at an end
T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t, two-sided, by degrees of freedom


class Bench:
    """Runs trainings in processes of their own, each once: what `work` has is not run again."""

    def __init__(self, part: str, work: Path, through: str):
        self.part, self.work, self.through = part, work, shlex.split(through)
        (work / "units").mkdir(parents=True, exist_ok=True)

    def run(self, do: str, **job: Any) -> dict[str, Any]:
        job |= {"part": self.part, "do": do}
        text = json.dumps(job, sort_keys=True)
        path = self.work / "units" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if path.is_file():
            return json.loads(path.read_text())["result"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        told = json.dumps({**job, "work": str(self.work)})
        command = [sys.executable, str(HERE / "knowledge.py"), "worker", "--job", told]
        done = subprocess.run([*self.through, *command], capture_output=True, text=True, env=environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith("@result ")]
        if done.returncode or not lines:
            raise SystemExit(f"{job} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        result = json.loads(lines[-1][8:])
        path.with_suffix(".new").write_text(json.dumps({"job": job, "result": result}))
        path.with_suffix(".new").replace(path)
        shown = {key: round(value, 4) for key, value in result.items() if isinstance(value, int | float)}
        print(text, json.dumps(shown), flush=True)
        return result

    def best(self, side: Side, rates: tuple[float, ...], further: bool = True, **job: Any) -> Side:
        """`side` at the rate with the highest recall on facts set apart (`further`: and beyond `rates`)."""
        found = []

        def recall(rate: float) -> float:
            found.append(self.run("learn", **side.job, rate=rate, seed=APART, **job))
            return found[-1]["recall"]

        rate, most = seek(recall, rates, FURTHER if further else 0)
        return Side(side.name, side.patch, side.fields, rate, most, max(run["fast"] for run in found))

    def calmer(self, side: Side, **job: Any) -> Side:
        """`side` at the rate that it has, halved for as long as recall on facts set apart gains by it: the longer a
        training, the smaller its best rate."""
        found = self.best(side, (side.rate,), **job)
        while (half := self.best(side, (float(f"{found.rate / 2:.2g}"),), **job)).recall > found.recall:
            found = half
        return found


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
    found = []
    for name, patch, fields, rates, job in tried:
        r = bench.run("fit", patch=patch, fields=fields, budget=budget)["r"]
        found.append(bench.best(Side(name, patch, {**fields, "r": r}), rates, **job))
    return found


def interval(values: list[float]) -> tuple[float, float, float]:
    """-> mean, and the ends of its 95 % confidence interval (Student's t)."""
    mean = statistics.mean(values)
    half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, mean - half, mean + half
