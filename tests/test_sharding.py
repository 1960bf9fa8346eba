"""`place: {shard: true}`: two processes that each keep half of every weight train as one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import trimtab
from helpers_run import metrics, tree
from helpers_torchrun import ADAM, even_world, runs_of_two, torchrun
from trimtab.artifacts.adapter import read_tensors
from trimtab.errors import BadInput

pytestmark = pytest.mark.filterwarnings("ignore")

PATCHES: dict[str, dict[str, Any]] = {"full": {}, "lora": {"r": 4}, "paca": {"r": 4}, "edora": {"r": 4}}
STEPS = 4
REFUSED: dict[str, dict[str, Any]] = {
    "MEFT": {"patches": [{"meft": {"r": 64, "k": 16}}]},
    "Full": {"patches": [{"full": {"offload": "slow"}}]},
    "PaCA": {"patches": [{"paca": {"form": "live"}}]},
    "SensZOQ": {"patches": ["senszoq"]},
    "ParallelAdapter": {"patches": ["parallel_adapter"]},
    "LST": {"patches": ["lst"]},
    "Fiddler": {"patches": ["fiddler", "lora"]},
    "quantised": {"precision": "nf4"},
    "MeZO": {"patches": ["lora"], "stepper": "mezo"},
    "compile": {"patches": ["lora"], "engine": {"compile": True}},
}


def recipe(folder: Path, name: str, run: str, batch: int, shard: Any = True, **training: Any) -> dict[str, Any]:
    made = tree(
        folder / "world", folder / f"{name}-{run}", {name: PATCHES[name]},
        **{"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "optim": "sgd",
           "learning_rate": 0.1, "lr_scheduler_type": "constant", "per_device_train_batch_size": batch, **training},
    )  # fmt: skip
    made["data"] |= {"train": str(folder / "even.jsonl"), "test": str(folder / "even.jsonl")}
    return {**made, "place": {"shard": shard}}


def refused(folder: Path, name: str) -> dict[str, Any]:
    made, change = recipe(folder, "lora", f"refused-{name}", 2), dict(REFUSED[name])
    if precision := change.pop("precision", None):
        made["model"] = {"name": made["model"], "precision": precision}
    made |= change
    return {**made, "model": made["model"] if precision else "/no/such/model"} if name != "quantised" else made


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = even_world(tmp_path_factory.mktemp("sharded"))
    jobs = [job for name in PATCHES for job in runs_of_two(recipe, folder, name)]
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
                 "gradient_accumulation_steps": 2}  # fmt: skip
    jobs += [recipe(folder, "lora", "offload", 2, "offload"), recipe(folder, "lora", "best", 1, **evaluated)]
    jobs += [refused(folder, name) for name in REFUSED]
    done = torchrun(folder, jobs)
    assert done.returncode == 0, done.stderr[-6000:]
    for name in PATCHES:
        trimtab.Recipe.from_dict(recipe(folder, name, "one", 4, False)).train()
    trimtab.Recipe.from_dict(recipe(folder, "lora", "best-one", 2, False, **evaluated)).train()
    return folder


def near(one: Path, two: Path) -> None:
    for (*_, a, rate, tokens), (*_, b, rate_2, tokens_2) in zip(metrics(one), metrics(two), strict=True):
        assert a == pytest.approx(b, abs=1e-6) and (rate, tokens) == (rate_2, tokens_2)
    mine, theirs = read_tensors(one / "adapter"), read_tensors(two / "adapter")
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[key].float(), theirs[key].float(), atol=1e-6) for key in mine)


@pytest.mark.parametrize("name", PATCHES)
def test_shards_train_as_one_process_does_on_twice_the_batch(name: str, pair: Path) -> None:
    near(pair / f"{name}-one", pair / f"{name}-two")
    assert json.loads((pair / f"{name}-two" / "run.json").read_text())["processes"] == 2
    losses = [loss for _, loss, *_ in metrics(pair / f"{name}-two")]
    assert losses[0] != losses[-1], "it trains"


def test_shards_in_host_memory_and_the_best_checkpoint(pair: Path) -> None:
    near(pair / "lora-one", pair / "lora-offload")
    near(pair / "lora-best-one", pair / "lora-best")


@pytest.mark.parametrize("name", PATCHES)
def test_shards_resume_as_they_were(name: str, pair: Path) -> None:
    one, two = read_tensors(pair / f"{name}-adam" / "adapter"), read_tensors(pair / f"{name}-again" / "adapter")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    state = torch.load(pair / f"{name}-adam" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    with safe_open(next((pair / f"{name}-adam" / "adapter").glob("*.safetensors")), "pt") as saved:
        every = [saved.get_tensor(key) for key in saved.keys()]
    trained = sum(tensor.numel() for tensor in every if tensor.is_floating_point())
    moments = sum(slots["exp_avg"].numel() for slots in state.values())
    assert moments <= trained and all(type(slots["exp_avg"]) is torch.Tensor for slots in state.values()), "whole"


def test_one_process_resumes_from_a_checkpoint_of_shards(pair: Path) -> None:
    keys = recipe(pair, "lora", "again", 2, False, **ADAM)
    keys["training"]["max_steps"] = 6
    result = trimtab.Recipe.from_dict({**keys, "resume": True}).train()
    assert result["steps"] == 6


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_before_the_model_is_loaded(name: str, pair: Path) -> None:
    for rank in range(2):
        said = json.loads((pair / f"said-{rank}.json").read_text())[-len(REFUSED) :]
        line = said[list(REFUSED).index(name)]
        assert line.startswith("BadInput") and "shard" in line and name.lower() in line.lower(), line


def test_one_process_and_the_library_own_switch_are_refused(pair: Path) -> None:
    with pytest.raises(BadInput, match="torchrun"):
        trimtab.Recipe.from_dict(recipe(pair, "lora", "alone", 2)).train()
    keys = recipe(pair, "lora", "alone", 2, False, fsdp=True)
    with pytest.raises(BadInput, match="shard: true"):
        trimtab.Recipe.from_dict(keys).train()
