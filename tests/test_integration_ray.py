"""A recipe in two workers of Ray Train, one of which is killed: Ray starts both again, and they resume."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trimtab
from helpers_run import make_world, metrics, rows, tree, write_rows
from helpers_torchrun import environment
from trimtab.artifacts.adapter import read_tensors
from trimtab.errors import BadInput
from trimtab.integrations import ray

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINING: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "sgd"}
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def recipe(folder: Path, run: str, batch: int, **training: Any) -> dict[str, Any]:
    made = tree(folder, folder / run, {"lora": {"r": 4}},
                **{**TRAINING, "per_device_train_batch_size": batch, **training})  # fmt: skip
    made["data"]["train"] = str(folder / "even.jsonl")
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("ray"))
    write_rows(folder / "even.jsonl", rows(16))
    return folder


@needs_ray
def test_workers_train_as_one_process_and_resume_after_a_death(world: Path) -> None:
    file, killed = world / "recipe.yaml", world / "killed"
    file.write_text(yaml.safe_dump(recipe(world, "two", 2)))
    command = [sys.executable, str(Path(__file__).parent / "helpers_ray.py"), str(file), str(killed)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert json.loads(line.removeprefix("RESULT")) == {"steps": 6, "sent": "0"} and killed.exists()
    trimtab.Recipe.from_dict(recipe(world, "one", 4)).train()
    for (*_, a, rate, tokens), (*_, b, rate_2, tokens_2) in zip(
        metrics(world / "one"), metrics(world / "two"), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-6) and (rate, tokens) == (rate_2, tokens_2)
    one, two = (read_tensors(world / name / "adapter") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
    assert json.loads((world / "two" / "run.json").read_text())["processes"] == 2


@needs_ray
@pytest.mark.parametrize(("options", "training", "have"), [
    ({"workers": 0}, {}, "at least one"), ({}, {"save_strategy": "no"}, "no checkpoint"),
])  # fmt: skip
def test_mistakes_are_refused_before_a_worker_starts(options, training, have, world: Path) -> None:
    made = trimtab.Recipe.from_dict(recipe(world, "bad", 2, **training))
    with pytest.raises(BadInput, match=have):
        ray.train(made, **options)
    assert not (world / "bad").exists()


def test_without_ray_the_extra_is_named(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv(ray.STATISTICS, "1")
    with pytest.raises(BadInput, match=r"trimtab\[ray\]"):
        ray.train(trimtab.Recipe.from_dict(recipe(world, "none", 2)))
