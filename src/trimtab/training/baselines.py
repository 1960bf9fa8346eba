"""What a run of several stages is compared with, each in `OUTPUT/baselines/NAME`: `trimtab train --baselines NAMES`.

sequential   the same stages with `carry: adapter`, no rehearsal and no anchor: how much is forgotten without it
joint        one run over the rows of all tasks, for as many steps as the stages took together: what can be reached
frozen       the base, which costs nothing
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..artifacts.run_folder import checkpoints, finished_run
from ..errors import BadInput, nearest
from ..files import write_json
from ..recipe import Recipe
from ..validation import read_json
from .stages import SCORES, train_stages

NAMES = ("sequential", "joint", "frozen")


def check_baselines(recipe: Recipe, names: Sequence[str]) -> None:
    """BadInput for baselines that cannot be run."""
    for name in names:
        if name not in NAMES:
            raise BadInput(f"--baselines {name}", "there is no such baseline", nearest(name, NAMES))
    if names and len(recipe.stages) < 2:
        have = "the recipe has less than two stages"
        raise BadInput(f"--baselines {','.join(names)}", have, "Add stages, one per task")
    if "joint" in names:
        _joint(recipe, 1)


def train_baselines(
    recipe: Recipe, names: Sequence[str], run: Callable[..., dict[str, Any]], quiet: bool, say: Callable[[str], None],
    hard: bool, result: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Runs them after the stages, whose run.json is `result`; -> that with `baselines`, which is also written.

    Each has "row" (metric -> scores on the tasks), "acc" and "seconds"; sequential also its "figures". A baseline that
    is finished is not run again.
    """
    found: dict[str, Any] = {}
    for name in names:
        began = time.monotonic()
        if name == "frozen":
            rows = {metric: matrix[0] for metric, matrix in result["tasks"]["matrix"].items()}
            found[name] = {"row": rows, "seconds": 0.0}
        elif name == "sequential":
            say("baseline: sequential")
            stages = [dataclasses.replace(spec, carry="adapter", anchor=None) for spec in recipe.stages]
            folder = Path(recipe.output) / "baselines" / name
            again = (folder / "recipe.yaml").is_file()
            alone = dataclasses.replace(
                recipe, stages=stages, rehearsal=None, anchor=None, output=str(folder), resume=again, overwrite=False
            )
            made = train_stages(alone, run, quiet, say, hard, began)
            rows = {metric: matrix[-1] for metric, matrix in made["tasks"]["matrix"].items()}
            found[name] = {"row": rows, "seconds": made["measured"]["seconds"], "figures": made["tasks"]["figures"]}
        else:
            say("baseline: joint")
            found[name] = _train_joint(recipe, result["steps"], run, quiet, say, hard, began)
        found[name]["acc"] = {metric: sum(row) / len(row) for metric, row in found[name]["row"].items()}
    if "joint" in found:
        accs = {metric: held["acc"] for metric, held in result["tasks"]["figures"].items()}
        found["joint"]["gap"] = {metric: found["joint"]["acc"][metric] - acc for metric, acc in accs.items()}
    result = {**result, "baselines": {**(result.get("baselines") or {}), **found}}
    write_json(Path(recipe.output) / "run.json", result)
    return result


def _joint(recipe: Recipe, steps: int) -> Recipe:
    """One run over the rows of all tasks. BadInput if they cannot be read as one set of rows."""
    stages = recipe.stage_recipes()
    first, names = stages[0], [spec.name for spec in recipe.stages]
    files: list[str] = []
    for name, stage in zip(names, stages, strict=True):
        same = dataclasses.replace(stage.data, train=first.data.train, test=first.data.test)
        if same != first.data or stage.data.limit is not None:
            asked = f"--baselines joint: {names[0]} and {name} as one set of rows"
            raise BadInput(asked, "their data blocks differ in more than files, or have a limit",
                           "Give all tasks the same columns and settings, or leave joint out")  # fmt: skip
        given = stage.data.train
        files += [given] if isinstance(given, str) else list(given or ())
    return dataclasses.replace(
        first, data=dataclasses.replace(first.data, train=list(dict.fromkeys(files))),
        training={**first.training, "max_steps": steps}, anchor=None,
        output=str(Path(recipe.output) / "baselines" / "joint"),
    )  # fmt: skip


def _train_joint(
    recipe: Recipe, steps: int, run: Callable[..., dict[str, Any]], quiet: bool, say: Callable[[str], None], hard: bool,
    began: float,
) -> dict[str, Any]:  # fmt: skip
    from ..inference.evaluate import scores

    joint = _joint(recipe, steps)
    folder = Path(joint.output)
    newest = checkpoints(folder)[-1:] if folder.is_dir() else []
    made = finished_run(joint, *newest) if folder.is_dir() else None
    if made is None:
        made = run(joint, folder, *(newest or [None]), quiet, say, hard, began)
    if (kept := read_json(folder / SCORES)) is None:
        kept = {"tasks": [one["metrics"] for one in scores(joint, recipe.stage_recipes(), say=say)]}
        write_json(folder / SCORES, kept)
    shared = [metric for metric in kept["tasks"][0] if all(metric in held for held in kept["tasks"])]
    rows = {metric: [held[metric] for held in kept["tasks"]] for metric in shared}
    return {"row": rows, "seconds": made["measured"]["seconds"]}
