"""A run's folder: recipe.yaml, run.json, metrics.jsonl, memory.jsonl, checkpoint-N/, adapter/."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ..files import write_text, writing
from ..memory.budget import nearest_folder
from ..recipe import Recipe
from ..validation import read_json
from .checkpoint_files import STATE, read_state
from .folder_lock import NAME as LOCK
from .folder_lock import locked

if TYPE_CHECKING:
    from ..contracts import Place

PARTS = ("recipe.yaml", "run.json", "metrics.jsonl", "memory.jsonl", "adapter", "merged", "report.html",
         "eval.json", "generate.json", "serve.json", "stages", "baselines")  # fmt: skip
PARTIAL = ".checkpoint.partial"  # a checkpoint being written


def lock_run(folder: str | Path, asked: str, do: str = "Wait until it is done, or name another output") \
        -> contextlib.AbstractContextManager[None]:  # fmt: skip
    """A lock on the run's folder against other trimtab processes; BadInput where one holds it."""
    folder = Path(folder)
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise BadInput(f"output: {folder}", f"{place} is a file", "Name a folder")
    if int(os.environ.get("RANK", 0)):  # of several processes of one run the first holds the lock
        return contextlib.nullcontext()
    return locked(folder / LOCK, asked, do)


def open_run(recipe: Recipe) -> tuple[Path, Path | None]:
    """-> the output folder and the checkpoint to resume from (None for a new run).

    A folder with a run is refused unless `resume` or `overwrite` is set; `overwrite` removes only files that a run
    writes, and only once everything else about the recipe has been checked.
    """
    output = Path(recipe.output)
    found = checkpoints(output)
    held = found or any((output / name).exists() for name in ("recipe.yaml", "run.json"))
    if recipe.resume:
        if held:
            if (output / "recipe.yaml").is_file():
                same_recipe(output, Recipe.load(output / "recipe.yaml"), recipe)
        if held and not found and finished_run(recipe) is None:
            raise BadInput(f"resume {output}", "it has no complete checkpoint", "Run it again with overwrite=true")
        if found:
            return output, found[-1]
    elif held and not recipe.overwrite:
        raise BadInput(
            f"output: {output}", "it already has a run",
            "Use resume=true to continue it, overwrite=true to replace it, or name another folder",
        )  # fmt: skip
    return output, None


def finished_run(recipe: Recipe, checkpoint: Path | None = None) -> dict[str, Any] | None:
    """The content of run.json if the run in the recipe's folder is as long as the recipe requires, else None.

    `checkpoint`: its newest one. A run that was killed after its last step but before run.json is not finished.
    """
    output, values = Path(recipe.output), recipe.training_values()
    state = read_state(checkpoint) if checkpoint else {"global_step": 0}
    run = read_json(output / "run.json") or {}
    steps = run.get("steps")
    if not isinstance(steps, int) or steps < state["global_step"] or not (output / "adapter").is_dir():
        return None
    limit = values.get("max_steps", -1)
    if isinstance(limit, int) and limit > 0:
        return run if steps >= limit else None
    return run if run.get("recipe") == recipe.hash or nothing_left(state, -1, values.get("num_train_epochs")) else None


def nothing_left(state: dict[str, Any], max_steps: int, epochs: Any) -> bool:
    """Whether training that reached `state` (a checkpoint's trainer_state.json) has no step left."""
    if max_steps > 0:
        return state["global_step"] >= max_steps
    reached = state.get("epoch")
    known = isinstance(reached, int | float) and isinstance(epochs, int | float)
    return known and reached >= epochs - 1e-9


def begin_run(output: Path, recipe: Recipe, resumed: bool) -> None:
    """Write the resolved recipe. A new run first removes an old run's files; any run removes what a killed run left."""
    with writing(f"output: {output}", "Name a folder that can be written"):
        output.mkdir(parents=True, exist_ok=True)
        gone = [*output.glob(".*.partial"), *output.glob(".checkpoint-*.old")]
        if not resumed:
            gone += [*(output / part for part in PARTS), *output.glob("checkpoint-*")]
        for part in gone:
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        write_text(output / "recipe.yaml", recipe.to_yaml())


def same_recipe(output: Path, old: Recipe, new: Recipe) -> None:
    """BadInput unless `new` continues the run of `old` in the folder: its steps must be the same.

    Its length may differ, and so may what changes memory but not the steps: the budget, `engine:`, activation
    checkpointing, and the size of micro-batches if a step has as many rows.
    """
    micro, times = "per_device_train_batch_size", "gradient_accumulation_steps"
    free = ("max_steps", "num_train_epochs", "max_minutes", "save_strategy", "save_steps", "save_total_limit",
            "logging_steps", "report_to", "activation_checkpointing", "activation_checkpointing_kwargs",
            micro, times)  # fmt: skip

    def training(r: Recipe) -> dict[str, Any]:
        values = r.training_values()
        sizes = values[micro], values.get(times, 1)
        whole = sizes[0] * sizes[1] if all(isinstance(size, int) for size in sizes) else sizes
        return {"rows of a step": whole} | {k: v for k, v in values.items() if k not in free}

    # the working folder may have changed, so files with the same name count as the same
    files = lambda value: [Path(v).name for v in ([value] if isinstance(value, str) else value or [])]  # noqa: E731
    data = lambda r: vars(r.data) | {k: files(getattr(r.data, k)) for k in ("train", "test", "chat_template")}  # noqa: E731
    for name, before, now in [
        ("stages", [stage.name for stage in old.stages], [stage.name for stage in new.stages]),
        ("rehearsal", old.rehearsal, new.rehearsal),
        ("anchor", old.anchor, new.anchor),
        ("neutral", files(old.neutral), files(new.neutral)),
        ("patches", old.load_patches(), new.load_patches()),
        ("model", old.model, new.model),
        ("data", data(old), data(new)),
        ("training", training(old), training(new)),
        ("objective", old.load_objective(), new.load_objective()),
        ("stepper", old.load_stepper(), new.load_stepper()),
    ]:
        if before != now:
            asked = f"resume {output} with {name}: {now}"
            raise BadInput(asked, f"the run was started with {before}", "Use the recipe in its folder")


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if p.name.split("-")[-1].isdigit() and (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[-1]))


def place_of(recipe: Recipe) -> Place:
    """The recipe's place; if it names no folder, files of the slow tier are on the run's disk."""
    place = recipe.place
    return place if place.folder else dataclasses.replace(place, folder=str(nearest_folder(recipe.output)))
