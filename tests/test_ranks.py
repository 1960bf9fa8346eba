"""Two processes of torchrun with DDP train each patch as one process does on twice the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from helpers_run import metrics, tree
from helpers_torchrun import even_world, runs_of_two, torchrun
from trimtab.artifacts.adapter import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore")

# Gradients of two processes are added in another order than those of one batch. SGD passes such a difference (1e-8) on
# as it is; Adam would amplify it where a gradient is near 0. So the comparison uses SGD, and Adam where it resumes.
PATCHES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4}, "paca": {"r": 4}, "edora": {"r": 4}, "senszoq": {"density": 0.02},
    "parallel_adapter": {"r": 16}, "lst": {}, "full": {},
}  # fmt: skip
STEPS = 4


def recipe(folder: Path, name: str, run: str, batch: int, **training: Any) -> dict[str, Any]:
    made = tree(
        folder / "world", folder / f"{name}-{run}", {name: PATCHES[name]},
        **{"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "optim": "sgd",
           "learning_rate": 0.1, "lr_scheduler_type": "constant", "per_device_train_batch_size": batch, **training},
    )  # fmt: skip
    made["data"]["train"] = str(folder / "even.jsonl")
    return made


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one process ("one"), of two ("two"), and of two that resume ("adam", "again")."""
    folder = even_world(tmp_path_factory.mktemp("ranks"))
    jobs = [job for name in PATCHES for job in runs_of_two(recipe, folder, name)]
    gates = {"diff_pruning": {"density": 0.02, "candidates": 0.2}}
    done = torchrun(folder, [*jobs, {**recipe(folder, "lora", "refused", 2), "patches": [gates]}])
    assert done.returncode == 0, done.stderr[-3000:]
    for name in PATCHES:
        trimtab.Recipe.from_dict(recipe(folder, name, "one", 4)).train()
    return folder


@pytest.mark.parametrize("name", PATCHES)
def test_two_processes_train_a_patch_as_one_does_on_twice_the_batch(name: str, pair: Path) -> None:
    one, two = pair / f"{name}-one", pair / f"{name}-two"
    assert len(metrics(two)) == STEPS, "one process writes"
    for (*_, a, rate, tokens), (*_, b, rate_2, tokens_2) in zip(metrics(one), metrics(two), strict=True):
        assert a == pytest.approx(b, abs=1e-6) and (rate, tokens) == (rate_2, tokens_2)
    mine, theirs = read_tensors(one / "adapter"), read_tensors(two / "adapter")
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[key].float(), theirs[key].float(), atol=1e-6) for key in mine)
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    losses = [loss for _, loss, *_ in metrics(two)]
    assert losses[0] != losses[-1], "it trains"


@pytest.mark.parametrize("name", PATCHES)
def test_two_processes_resume_as_they_were(name: str, pair: Path) -> None:
    whole, resumed = pair / f"{name}-adam", pair / f"{name}-again"
    one, two = read_tensors(whole / "adapter"), read_tensors(resumed / "adapter")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert len(metrics(resumed)) == STEPS


def test_gates_are_refused_in_both_processes(pair: Path) -> None:
    for rank in range(2):
        *others, said = json.loads((pair / f"said-{rank}.json").read_text())
        assert others == [""] * len(others)
        assert "diff_pruning on 2 processes" in said and "Train on one" in said
