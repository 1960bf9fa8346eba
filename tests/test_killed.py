"""A run with tables that is killed at any instant goes on bit for bit, as if nothing had happened.

Each kill draws a checkpoint (or the start) and a delay from there, up to the time between two checkpoints. The run is
then started again as a user would: resumed, or made anew where no checkpoint was complete. The kill ends the process,
not the machine: that a checkpoint also survives a loss of power rests on fsync before each rename, which is not tested.
"""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from helpers_run import die, forked, left, make_world, same, tree
from trimtab.engine.trainers import checkpoints
from trimtab.recipe import Recipe

STEPS, SAVE = 10, 2
TRAINING = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE, "save_total_limit": 2,
            "gradient_accumulation_steps": 2, "logging_steps": 1}  # fmt: skip
FIELDS = {"r": 256, "experts": 32, "probes": 4, "k": 8, "adam": "exact", "balance": 0.01, "revive": 4}
TABLES = {"fp32 moments": {"moments": "fp32"}, "8-bit moments": {"moments": "int8"}, "hot rows": {"cache": 0.0002}}
pytestmark = pytest.mark.filterwarnings("ignore")


def keys(world: Path, output: Path, tables: str) -> dict[str, Any]:
    place = {"fast": "cpu", "slow": "disk", "folder": str(world)}
    return tree(world, output, {"meft": FIELDS | TABLES[tables]}, **TRAINING) | {"place": place}


def train(made: dict[str, Any], **more: Any) -> None:
    Recipe.from_dict({**made, **more}).train()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def unkilled(world, tmp_path_factory):
    """Name of the tables -> what an undisturbed run left, and its seconds between two checkpoints."""
    made: dict[str, tuple[dict[str, Any], float]] = {}

    def get(tables: str) -> tuple[dict[str, Any], float]:
        if tables not in made:
            output = tmp_path_factory.mktemp("unkilled") / "run"
            train(keys(world, output, tables))
            times = sorted(path.stat().st_mtime for path in checkpoints(output))
            made[tables] = left(output), max(times[-1] - times[0], 0.05)
        return made[tables]

    return get


def killed(made: dict[str, Any], after: int, delay: float) -> bool:
    """Train in a child that is killed `delay` seconds after the checkpoint of step `after`; -> False if it finished."""
    output = Path(made["output"])
    sign = output / (f"checkpoint-{after}" if after else "recipe.yaml")

    def kill() -> None:
        while not sign.exists():
            time.sleep(0.002)
        time.sleep(delay)
        die()

    def child() -> None:
        threading.Thread(target=kill, daemon=True).start()
        train(made)

    code = forked(child)
    assert code in (0, -signal.SIGKILL), "the run failed before it was killed"
    return code != 0


def goes_on(world: Path, folder: Path, unkilled: Any, tables: str, kills: range) -> None:
    whole, between = unkilled(tables)
    for number in kills:
        draw, output = random.Random(number), folder / f"run-{number}"
        made = keys(world, output, tables)
        while not killed(made, draw.randrange(0, STEPS, SAVE), draw.uniform(0, between)):
            shutil.rmtree(output)
        assert not (output / "run.json").exists()
        train(made, **({"resume": True} if checkpoints(output) else {"overwrite": True}))
        same(left(output), whole)
        assert not list(output.glob(".*")), "leftovers"


@pytest.mark.parametrize("tables", TABLES)
def test_tables_killed_at_any_time(tables, world, tmp_path, unkilled):
    goes_on(world, tmp_path, unkilled, tables, range(2))


@pytest.mark.long
@pytest.mark.parametrize("tables", TABLES)
def test_tables_killed_often(tables, world, tmp_path, unkilled):
    goes_on(world, tmp_path, unkilled, tables, range(2, 19))


def test_two_undisturbed_runs_leave_the_same(world, tmp_path, unkilled):
    """Also in another folder and process: what `left` compares depends on nothing else."""
    again = keys(world, tmp_path / "again", "fp32 moments")
    assert forked(lambda: train(again)) == 0
    same(left(tmp_path / "again"), unkilled("fp32 moments")[0])
