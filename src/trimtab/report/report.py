"""`trimtab report RUN [RUN2 ...]`: one page about runs: recipe, predicted and measured memory, loss, answers.

The page is a single file that needs no network: it contains plotly's script once, and the figures as data. What is
missing in a run's folder (it was killed, it is older, a line was cut off) is left out, and the page says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..artifacts.folder_lock import NAME as LOCK
from ..artifacts.folder_lock import locked
from ..errors import BadInput
from ..files import beside, write_text, writing
from .figures import number
from .page import page

READ = ("run.json", "metrics.jsonl", "memory.jsonl", "recipe.yaml")
SAMPLES = 12  # sampled replies that are shown
POINTS = 2000  # the most points drawn of a curve


@dataclass
class Run:
    """The content of one run's folder, as far as it can be read. Missing parts are empty."""

    name: str
    run: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)  # completions.jsonl
    before: dict[str, Any] = field(default_factory=dict)  # eval_base.json
    after: dict[str, Any] = field(default_factory=dict)  # eval.json
    notes: list[str] = field(default_factory=list)


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page about `runs` (folders); -> its path: `out`, or report.html in the first folder.

    BadInput for a folder without a run, and for a page that cannot be written.
    """
    folders = [Path(name) for name in runs]
    if not folders:
        raise BadInput("report", "no run was named", "Name the folders of one or more runs")
    found = [read(folder) for folder in folders]
    for run, name in zip(found, _names(folders), strict=True):
        run.name = name
    target = Path(out) if out else folders[0] / "report.html"
    text = page(found).encode(errors="replace").decode()  # JSON can hold halves of surrogate pairs
    if not target.parent.is_dir():
        raise BadInput(f"write {target}", f"there is no folder {target.parent}", "Name another file with --out")
    asked, do = f"write {target}", "Name another file with --out"
    inside = any(target.parent.resolve() == folder.resolve() for folder in folders)
    file = target.parent / LOCK if inside else beside(target, "lock")
    with writing(asked, do), locked(file, asked, f"Wait until it is done. {do}"):
        write_text(target, text)
    return target


def read(folder: Path) -> Run:
    """The run in `folder`; its `notes` say what cannot be read."""
    if not folder.is_dir():
        raise BadInput(f"report {folder}", "there is no such folder", "Name the folder of a run")
    if not any((folder / name).is_file() for name in READ):
        raise BadInput(f"report {folder}", f"none of {', '.join(READ)} is in it", "Name the folder of a run")
    run = Run(folder.name)
    run.run = _object(run, folder / "run.json")
    if not (folder / "run.json").is_file():
        run.notes.append("There is no run.json: the run did not finish.")
    run.recipe = _object(run, folder / "recipe.yaml")
    run.metrics = _thin([row for row in _lines(run, folder / "metrics.jsonl") if number(row.get("step")) is not None])
    run.memory = _thin([row for row in _lines(run, folder / "memory.jsonl") if number(row.get("anon")) is not None])
    if (folder / "completions.jsonl").is_file():
        lines = _lines(run, folder / "completions.jsonl")
        run.samples = lines[:: max(1, len(lines) // SAMPLES)][-SAMPLES:]
    run.before, run.after = _object(run, folder / "eval_base.json"), _object(run, folder / "eval.json")
    return run


def _object(run: Run, path: Path) -> dict[str, Any]:
    """The content of a JSON or YAML file of keys; {} if it is missing or cannot be read."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        found = _finite(yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        found = None
    if not isinstance(found, dict):
        run.notes.append(f"{path.name} could not be read.")
        return {}
    return found


def _lines(run: Run, path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; lines that are not objects (cut off, for example) are counted and skipped."""
    if not path.is_file():
        run.notes.append(f"There is no {path.name}.")
        return []
    rows, bad = [], 0
    for line in path.read_bytes().splitlines():
        try:
            row = _finite(json.loads(line))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        run.notes.append(f"{bad} line{'s' if bad > 1 else ''} of {path.name} could not be read.")
    return rows


def _finite(value: Any) -> Any:
    """`value` as the page's script can read it: NaN and infinity become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _thin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every n-th row and the last one, so that a long run's page stays small."""
    step = -(-len(rows) // POINTS) or 1
    return [row for index, row in enumerate(rows) if index % step == 0 or index == len(rows) - 1]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len({*parts}):
            break
    return names
