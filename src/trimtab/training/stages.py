"""Several stages of training in one run: `stages:` of a recipe.

A stage is an ordinary run in `OUTPUT/stages/1-NAME`, whose adapter, and with `carry: full` whose optimizer state, the
next one takes over from its files. After each stage the model is evaluated on the test sets of all stages, which gives
the task matrix (data/continual.py). `OUTPUT` itself then has what a run of one stage has: the last stage's adapter, one
run.json, and logs that go on from stage to stage.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..artifacts.checkpoint_files import check_files
from ..artifacts.run_folder import begin_run, checkpoints, finished_run, same_recipe
from ..data.continual import LOSSES, figures, interval
from ..data.files import read_table
from ..data.spec import DataSpec
from ..engine.arguments import time_limit
from ..engine.rehearsal import Rehearsal, summary
from ..errors import BadInput, Interrupted, Stopped
from ..files import link, whole_folder, write_json, write_text
from ..memory.budget import parse
from ..recipe import Recipe
from ..validation import read_json
from .session import Start

BASE, SCORES, KEPT, ANCHOR = "base.json", "scores.json", "kept.safetensors", "anchor.safetensors"


def train_stages(
    recipe: Recipe, run: Callable[..., dict[str, Any]], quiet: bool, say: Callable[[str], None], hard: bool,
    began: float,
) -> dict[str, Any]:  # fmt: skip
    """Runs the stages that are left, each by `run` (training/train.py); -> the content of run.json."""
    root, stages = Path(recipe.output), recipe.stage_recipes()
    check(recipe, stages)
    resumed = _open(recipe, stages)
    if resumed and (root / "run.json").is_file() and all(_finished(stage) for stage in stages):
        say(f"{root}: all {len(stages)} stages are finished: there is nothing left to train")
        return read_json(root / "run.json") or {}
    whole, worked = time_limit(recipe), False
    for index, stage in enumerate(stages):
        name = recipe.stages[index].name
        if resumed and _finished(stage):
            say(f"stage {name}: finished")
        else:
            if later := [other.output for other in stages[index + 1 :] if Path(other.output).exists()]:
                have = f"{later[0]} has started from it"
                raise BadInput(f"train stage {name} further", have, "Start again with overwrite=true")
            now = time.monotonic()
            if whole is not None and worked and now > began + whole:
                have = f"training.max_minutes ({whole / 60:g} minutes) have passed"
                raise Stopped(f"stopped before stage {name}", have, "Continue with resume=true")
            say(f"stage {name}, {index + 1} of {len(stages)}")
            start = dataclasses.replace(
                _start(recipe, stages, index), rehearsal=rehearsal_of(recipe, stages, index),
                anchor=anchors_of(recipe, stages, index),
            )  # fmt: skip
            limited, start = _limited(stage, whole, began, now, start)
            newest = checkpoints(Path(stage.output))[-1:] if resumed else []
            for checkpoint in newest:
                check_files(checkpoint)
            again = resumed or worked

            def begin(again: bool = again) -> None:
                begin_run(root, recipe, resumed=again)

            try:
                run(limited, Path(stage.output), *(newest or [None]), quiet, say, hard, now, start, begin)
            except (Stopped, Interrupted) as error:
                raise type(error)(f"stage {name}: {error.asked}", error.have, error.do) from error
            worked = True
        _evaluate(recipe, stages, index, say)
    result = _result(recipe, stages)
    _publish(root, Path(stages[-1].output), recipe, stages)
    write_json(root / "run.json", result)
    for line in lines(result["tasks"]):
        say(line)
    return result


# --- before ----------------------------------------------------------------------------------------------------------


def check(recipe: Recipe, stages: list[Recipe]) -> None:
    """BadInput for stages that cannot run, before the first one starts."""
    if recipe.neutral is not None:
        if recipe.load_objective().head != "causal-lm":
            raise BadInput(f"neutral: {recipe.neutral}", "a classifier has no perplexity", "Remove it")
        read_table([recipe.neutral], 1, "test")
    if recipe.rehearsal is not None:
        rehearsal_of(recipe, stages, 0)
        if len(stages) < 2:
            raise BadInput("rehearsal", "no stage comes before another", "Remove it, or add a stage")
    kinds = {one.kind: spec.name for spec in recipe.stages if (one := spec.anchor or recipe.anchor)}
    if len(kinds) > 1:
        have = f"stage {kinds['ewc']} has ewc, and stage {kinds['l2']} l2"
        raise BadInput("stages: anchor", have, "Give all stages the same kind")
    if kinds and not any(stage.anchor for stage in stages):
        raise BadInput("anchor", "no stage starts from the one before", "Remove it, or add a stage")
    for index, (spec, stage) in enumerate(zip(recipe.stages, stages, strict=True)):
        asked = f"stages: {spec.name}"
        for part, names in (("train", stage.data.train), ("test", stage.data.test)):
            if not names:
                do = f"Add data: {{{part}: FILE}} to the stage, or to the recipe for all stages"
                raise BadInput(asked, f"it has no data.{part}", do)
            read_table([names] if isinstance(names, str) else list(names), 1, part)
        if spec.adapter is not None:
            if not (Path(spec.adapter) / "trimtab.json").is_file():
                have = f"there is no adapter in {spec.adapter}"
                raise BadInput(f"{asked}: adapter: {spec.adapter}", have, "Name the adapter/ folder of a run")
            if spec.carry != "adapter":
                have = "it starts from the adapter that it names"
                raise BadInput(f"{asked}: carry: {spec.carry} with adapter", have, "Remove one of the two")
        if index == 0 and spec.carry == "full":
            raise BadInput(f"{asked}: carry: full", "no stage comes before it", "Remove carry, or name an adapter")
        time_limit(stage)
        counting = [patch for patch in stage.load_patches() if patch.counts_tokens and not patch.calibration_file]
        if counting and len(stages) > 1:
            have = f"{type(counting[0]).__name__} counts the tokens of data.train, which differs from stage to stage"
            raise BadInput(f"train {len(stages)} stages", have, "Give the patch calibration: FILE, with text of all")


def _open(recipe: Recipe, stages: list[Recipe]) -> bool:
    """Whether a run in the folder is resumed. BadInput for a run that is in the way, and for changed stages."""
    root = Path(recipe.output)
    if not any((root / name).exists() for name in ("recipe.yaml", "run.json")):
        return False
    if not recipe.resume:
        if recipe.overwrite:
            return False
        do = "Use resume=true to continue it, overwrite=true to replace it, or name another folder"
        raise BadInput(f"output: {root}", "it already has a run", do)
    old = Recipe.load(root / "recipe.yaml")
    same_recipe(root, dataclasses.replace(old, training={}), dataclasses.replace(recipe, training={}))
    for before, now, was, stage in zip(old.stages, recipe.stages, old.stage_recipes(), stages, strict=True):
        if not Path(stage.output).exists():
            continue  # it has not begun, so it may be changed
        for key in ("carry", "adapter"):
            a, b = getattr(before, key), getattr(now, key)
            if a != b:
                asked = f"resume {root} with stages: {now.name}: {key}: {b}"
                raise BadInput(asked, f"the run was started with {a}", "Use the recipe in its folder")
        same_recipe(Path(stage.output), was, stage)
    return True


def _finished(stage: Recipe) -> dict[str, Any] | None:
    """The run.json of a stage that is as long as the recipe requires."""
    folder = Path(stage.output)
    return finished_run(stage, next(iter(reversed(checkpoints(folder))), None)) if folder.is_dir() else None


def _start(recipe: Recipe, stages: list[Recipe], index: int) -> Start:
    """What stage `index` takes over, and whether it leaves a checkpoint to the next."""
    spec, after = recipe.stages[index], recipe.stages[index + 1 :]
    save_last = bool(after) and after[0].carry == "full"
    if spec.adapter is not None:
        return Start(_suits(Path(spec.adapter), spec.name, stages[index]), save_last=save_last)
    if index == 0 or spec.carry == "fresh":
        return Start(save_last=save_last)
    before = Path(stages[index - 1].output)
    if spec.carry == "adapter":
        return Start(_suits(before / "adapter", spec.name, stages[index]), save_last=save_last)
    newest = checkpoints(before)[-1]
    return Start(newest, newest / "optimizer.pt", save_last)


def rehearsal_of(recipe: Recipe, stages: list[Recipe], index: int) -> Rehearsal | None:
    """What stage `index` rehearses and keeps; None for a recipe without rehearsal."""
    spec = recipe.rehearsal
    if spec is None:
        return None
    files = [Path(stage.output) / KEPT for stage in stages]
    before, after = files[index - 1] if index else None, files[index] if index + 1 < len(files) else None
    budget = parse(spec.budget, None, "rehearsal: budget")
    return Rehearsal(budget, spec.policy, spec.mix, index + 1, before, after, spec.kept_tops)


def anchors_of(recipe: Recipe, stages: list[Recipe], index: int) -> tuple[Path | None, Path | None]:
    """The file that anchors stage `index`, and the one that it writes for the next."""
    files = [Path(stage.output) / ANCHOR for stage in stages]
    before = files[index - 1] if recipe.anchor_between(index) else None
    after = files[index] if recipe.anchor_between(index + 1) else None
    return before if before and before.is_file() else None, after


def _suits(folder: Path, name: str, stage: Recipe) -> Path:
    """`folder`, if its adapter is one of the recipe's patches; BadInput otherwise."""
    from ..artifacts.adapter import patches_of

    held, wanted = [type(patch).__name__ for patch in patches_of(folder)], stage.load_patches()
    ours = [type(patch).__name__ for patch in wanted if patch.when.value not in ("infer", "load")]
    if held[: len(ours)] != ours:  # a classifier's head comes after them
        asked = f"stages: {name}: start from {folder}"
        raise BadInput(asked, f"it has {', '.join(held)}, and the recipe {', '.join(ours)}", "Use the same patches")
    return folder


def _limited(stage: Recipe, whole: float | None, began: float, now: float, start: Start) -> tuple[Recipe, Start]:
    """The stage with the limit that ends first: its own, counted from `now`, or that of all, counted from `began`."""
    own = time_limit(stage)
    if whole is None or own is not None and now + own <= began + whole:
        return stage, start
    limited = dataclasses.replace(stage, training={**stage.training, "max_minutes": whole / 60})
    return limited, dataclasses.replace(start, timed_from=began)


# --- after each stage ------------------------------------------------------------------------------------------------


def _evaluate(recipe: Recipe, stages: list[Recipe], index: int, say: Callable[[str], None]) -> None:
    """Writes the scores of the stage's model, and once those of the base, on the test sets of all stages."""
    from ..inference.evaluate import scores

    folder = Path(stages[index].output)
    for base, path in ((True, folder.parent / BASE), (False, folder / SCORES)):
        if read_json(path) is not None:
            continue
        say(f"evaluating {'the base' if base else f'stage {recipe.stages[index].name}'} on all test sets")
        began = time.monotonic()
        found = scores(stages[index], [*stages, *_neutral(recipe, stages)], base_only=base, say=say)
        names = [spec.name for spec in recipe.stages]
        tasks = {name: {**one, "samples": one["samples"][:5]} for name, one in zip(names, found, strict=False)}
        more = {"neutral": found[-1]} if recipe.neutral else {}
        write_json(path, {"tasks": tasks, "seconds": round(time.monotonic() - began, 2), **more})


def _neutral(recipe: Recipe, stages: list[Recipe]) -> list[Recipe]:
    """What evaluates the neutral text, if there is any: rows of text, cut at max_length."""
    text = DataSpec(recipe.neutral, recipe.neutral, too_long="cut")
    return [dataclasses.replace(stages[0], data=text)] if recipe.neutral else []


def _result(recipe: Recipe, stages: list[Recipe]) -> dict[str, Any]:
    """run.json of the whole: the last stage's, with sums and peaks over all, each stage's figures, and the tasks."""
    runs = [read_json(Path(stage.output) / "run.json") or {} for stage in stages]
    most = max(runs, key=lambda run: run["measured"]["fast_peak_bytes"])
    kept = ("steps", "tokens", "final_loss", "mean_loss", "predicted", "measured", "finished", "recipe")
    parts = [
        {"name": spec.name, "carry": spec.carry if index or spec.adapter else "fresh", "output": run["output"],
         **{key: run.get(key) for key in kept}}
        for index, (spec, run) in enumerate(zip(recipe.stages, runs, strict=True))
    ]  # fmt: skip
    seconds = round(sum(run["measured"]["seconds"] for run in runs), 2)
    tokens = sum(run["tokens"] for run in runs)
    timed = sum(run["tokens"] / run["measured"]["tokens_per_second"] for run in runs
                if run["measured"]["tokens_per_second"])  # fmt: skip
    speed = round(tokens / timed, 2) if timed else 0.0
    return {
        **runs[-1], "recipe": recipe.hash, "output": str(recipe.output), "stages": parts,
        "steps": sum(run["steps"] for run in runs), "tokens": tokens, "predicted": most["predicted"],
        "shown": most.get("shown") or {},
        "measured": {**most["measured"], "seconds": seconds, "tokens_per_second": speed},
        "tasks": tasks(recipe, stages), **({"rehearsal": _kept(recipe, stages)} if recipe.rehearsal else {}),
    }  # fmt: skip


def _kept(recipe: Recipe, stages: list[Recipe]) -> dict[str, Any]:
    """Bytes and rows that the last rehearsal had, and their share of all rows that were trained on before."""
    made = rehearsal_of(recipe, stages, len(stages) - 1)
    assert made is not None and made.before is not None
    found = summary(made.before)
    return {"budget_bytes": made.budget, **found, "share_of_rows": found["rows"] / max(1, found["seen"])}


def tasks(recipe: Recipe, stages: list[Recipe]) -> dict[str, Any]:
    """The task matrix of each metric that all test sets have, its figures, and the change from base to last stage."""
    folders = [Path(stage.output) for stage in stages]
    files = [folders[0].parent / BASE, *(folder / SCORES for folder in folders)]
    rows = [(read_json(path) or {})["tasks"] for path in files]
    names = [spec.name for spec in recipe.stages]
    every = [row[name]["metrics"] for row in rows for name in names]
    shared = [key for key in every[0] if all(key in found for found in every)]
    matrix = {metric: [[row[name]["metrics"][metric] for name in names] for row in rows] for metric in shared}
    change = {
        name: {metric: interval(before, rows[-1][name]["each"][metric])
               for metric, before in rows[0][name]["each"].items() if metric in rows[-1][name]["each"]}
        for name in names
    }  # fmt: skip
    seconds = [(read_json(path) or {})["seconds"] for path in files]
    return {
        "names": names, "rows": [rows[0][name]["rows"] for name in names],
        "metric": next((metric for metric in shared if metric not in (*LOSSES, "token_accuracy")), "loss"),
        "matrix": matrix, "figures": {metric: figures(found, metric) for metric, found in matrix.items()},
        "change": change, "seconds": seconds, **_switched(recipe, matrix), **_general(recipe, files),
    }  # fmt: skip


def _switched(recipe: Recipe, matrix: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Where a stage after the first starts fresh: the scores with the adapter that is the last of each task's own."""
    starts = [index for index, spec in enumerate(recipe.stages) if index == 0 or not spec.follows]
    if len(starts) < 2:
        return {}
    ends = [min((s for s in starts if s > index), default=len(recipe.stages)) for index in range(len(recipe.stages))]
    rows = {metric: [found[end][task] for task, end in enumerate(ends)] for metric, found in matrix.items()}
    return {"switched": {"row": rows, "acc": {metric: sum(row) / len(row) for metric, row in rows.items()}}}


def _general(recipe: Recipe, files: list[Path]) -> dict[str, Any]:
    """The perplexity on the neutral text of the base and after each stage, and the change of the loss in the end."""
    if not recipe.neutral:
        return {}
    found = [(read_json(path) or {})["neutral"] for path in files]
    change = interval(found[0]["each"]["loss"], found[-1]["each"]["loss"])
    general = {
        "file": Path(recipe.neutral).name, "rows": found[0]["rows"], "change_of_loss": change,
        "perplexity": [one["metrics"]["perplexity"] for one in found],
    }  # fmt: skip
    return {"general": general}


def lines(found: dict[str, Any]) -> list[str]:
    """The task matrix for people: a row for the base and one after each stage."""
    metric, names = found["metric"], found["names"]
    width = max(12, *(len(name) for name in names))
    made = [f"{metric} on the test set of", " " * (width + 8) + "  ".join(f"{name:>{width}}" for name in names)]
    for label, row in zip(["base", *(f"after {name}" for name in names)], found["matrix"][metric], strict=True):
        made.append(f"{label:<{width + 8}}" + "  ".join(f"{value:>{width}.4f}" for value in row))
    if "switched" in found:
        row = found["switched"]["row"][metric]
        made.append(f"{'own adapters':<{width + 8}}" + "  ".join(f"{value:>{width}.4f}" for value in row))
    figure = found["figures"][metric]
    labels = {"acc": "ACC", "bwt": "BWT", "fwt": "FWT"}
    made.append(", ".join(f"{labels.get(key, key)} {value:.4f}" for key, value in figure.items()))
    if "general" in found:
        first, *later = (f"{value:.2f}" for value in found["general"]["perplexity"])
        made.append(f"perplexity on {found['general']['file']}: base {first}, after each stage {', '.join(later)}")
    return made


def _publish(root: Path, last: Path, recipe: Recipe, stages: list[Recipe]) -> None:
    """The last stage's adapter, and the logs of all stages as one, in the run's folder."""
    with whole_folder(root / "adapter") as partial:
        shutil.copytree(last / "adapter", partial, dirs_exist_ok=True, copy_function=link)
    kept: dict[str, list[str]] = {"metrics.jsonl": [], "memory.jsonl": []}
    offset = dict.fromkeys(("step", "seconds", "num_tokens"), 0.0)
    for spec, stage in zip(recipe.stages, stages, strict=True):
        folder, newest = Path(stage.output), dict(offset)
        for row in _rows(folder / "metrics.jsonl"):
            moved = {key: row[key] + offset[key] for key in offset if isinstance(row.get(key), int | float)}
            newest |= {key: max(newest[key], value) for key, value in moved.items()}
            whole = {key: int(value) if key != "seconds" else round(value, 2) for key, value in moved.items()}
            kept["metrics.jsonl"].append(json.dumps({**row, **whole, "stage": spec.name}))
        kept["memory.jsonl"] += [json.dumps({**row, "stage": spec.name}) for row in _rows(folder / "memory.jsonl")]
        offset = newest
    for name, content in kept.items():
        write_text(root / name, "".join(line + "\n" for line in content))


def _rows(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if isinstance(row, dict) and not (isinstance(row.get("loss"), float) and math.isnan(row["loss"])):
            found.append(row)
    return found
