"""`training.max_minutes`: a run stops by the clock with a checkpoint, and resumed it ends as if it had not stopped."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from helpers_run import left, make_world, run, same, tree
from trimtab.errors import BadInput, Stopped
from trimtab.planning.plan import Plan
from trimtab.recipe import Recipe
from trimtab.training import time_limit

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def keys(world: Path, output: Path, **training) -> dict:
    return tree(world, output, {"lora": {"r": 4, "dropout": 0.2}}, max_steps=STEPS, **training)


@pytest.fixture
def minutes(monkeypatch):
    """A clock that advances by a minute whenever it is read: at each end of a step, and at the start of the first."""
    reads = []
    monkeypatch.setattr(time_limit, "clock", lambda: reads.append(0) or time.monotonic() + 60 * len(reads))
    return reads


@pytest.mark.parametrize("seed", range(2))
def test_stopped_five_times_equals_uninterrupted(world, tmp_path, minutes, seed):
    last = {"save_strategy": "steps", "save_steps": STEPS}
    run(keys(world, tmp_path / "whole", **last))
    stops = sorted(random.Random(seed).sample(range(1, STEPS), 5))
    made = keys(world, tmp_path / "stopped", **last)
    before = 0
    for stop in stops:
        minutes.clear()
        made["training"]["max_minutes"] = stop - before + 1.5
        with pytest.raises(Stopped, match=f"stopped after step {stop} of {STEPS}.*checkpoint-{stop} is complete"):
            run(made, resume=before > 0)
        before = stop
    minutes.clear()
    made["training"]["max_minutes"] = 1000
    run(made, resume=True)
    same(left(tmp_path / "whole"), left(tmp_path / "stopped"))


def test_it_stops_before_the_limit_and_takes_a_step_at_least(world, tmp_path, minutes):
    made = keys(world, tmp_path / "run", max_minutes=0.5)
    with pytest.raises(Stopped, match="after step 1 of 12.*one step takes 1 minutes") as stopped:
        run(made)
    assert stopped.value.exit_code == 4
    minutes.clear()
    made["training"]["max_minutes"] = 4.5  # three steps end after 4 minutes, four after 5
    with pytest.raises(Stopped, match="after step 4 of 12"):
        run(made, resume=True)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [1, 2, 3, 4]


def test_a_run_that_ends_in_time_is_not_stopped(world, tmp_path, minutes):
    assert run(keys(world, tmp_path / "run", max_minutes=STEPS + 1.5))["steps"] == STEPS
    assert Recipe.load(tmp_path / "run").hash == Recipe.load(tmp_path / "run", ["training.max_minutes=3"]).hash


@pytest.mark.parametrize("value", [0, -1, True, "soon", float("nan"), float("inf"), [3]])
def test_a_limit_is_a_number_above_0(world, tmp_path, value):
    with pytest.raises(BadInput, match="max_minutes.*it must be a number above 0"):
        run(keys(world, tmp_path / "run", max_minutes=value))
    assert not (tmp_path / "run").exists()


def test_refused_without_the_optimizers_state(world, tmp_path):
    with pytest.raises(BadInput, match="save_only_model.*cannot be resumed exactly"):
        run(keys(world, tmp_path / "run", max_minutes=3, save_only_model=True))
    with pytest.raises(BadInput, match='Did you mean "max_minutes"'):
        run(keys(world, tmp_path / "run", max_minute=3))


def test_a_limit_shorter_than_a_step_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Plan, "step_seconds", lambda self, micro_batches: 90.0)
    with pytest.raises(BadInput, match="max_minutes: 1: one step takes about 1.5 minutes on this machine"):
        run(keys(world, tmp_path / "run", max_minutes=1))
    assert not (tmp_path / "run").exists()
