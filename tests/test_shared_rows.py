"""What two processes train together, with tables and without: they do what one does on twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trimtab
from helpers_ranks import FIELDS, REFUSED, loop
from helpers_run import films, make_world, metrics, rows, tree, write_rows
from trimtab.artifacts import adapter
from trimtab.errors import BadInput
from trimtab.methods.meft import Meft
from trimtab.tiered.checkpoint import load_rows
from trimtab.tiered.store import VALUES, M
from trimtab.training import session

pytestmark = pytest.mark.filterwarnings("ignore")
MEFT = {"meft": {"r": 64, "k": 16, "scale": 1.0}}
TRAINING = dict(max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2, logging_steps=1,
                max_grad_norm=0.1, lr_scheduler_type="constant", adam_epsilon=1e-4)  # fmt: skip


OTHERS = {"paca": {"paca": {"r": 4}}, "lora": {"lora": {"r": 4}}, "head": {"paca": {"r": 4, "reselect_every": 3}}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A folder where two processes have trained `two`, `again` (resumed after two steps), OTHERS and FIELDS's loops."""
    folder = tmp_path_factory.mktemp("pair")
    world = folder / "world"
    world.mkdir()
    make_world(world)
    even = str(write_rows(folder / "even.jsonl", rows(16)))

    def recipe(name: str, batch: int, **changes) -> dict:
        made = tree(world, folder / name, MEFT, **{**TRAINING, "per_device_train_batch_size": batch, **changes})
        made["data"]["train"] = even
        return made

    half = recipe("again", 2, max_steps=2)
    jobs = [recipe("two", 2), half, {**recipe("again", 2), "resume": True}]
    jobs += [other(folder, name, 2, 2) for name in OTHERS]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    tests = str(Path(__file__).parent)
    paths = os.pathsep.join([str(Path(trimtab.__file__).parents[1]), tests])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               f"{tests}/helpers_ranks.py", str(folder / "jobs.json"), str(folder)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for keys in (recipe("one", 4), *(other(folder, name, 1, 4) for name in OTHERS)):
        trimtab.Recipe.from_dict(keys).train()
    return folder


def other(folder: Path, name: str, processes: int, batch: int) -> dict[str, Any]:
    """A recipe without tables, `batch` rows a process."""
    training = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="sgd", learning_rate=0.1, logging_steps=1,
                    per_device_train_batch_size=batch)  # fmt: skip
    made = (films if name == "head" else tree)(
        folder / "world", folder / f"{name}-{processes}", OTHERS[name], **training
    )
    if name != "head":
        made["data"]["train"] = str(folder / "even.jsonl")
    return made


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """The adapter that a run left and, by layer, what its last checkpoint holds of the table and its Adam."""
    found = load_file(run / "adapter" / "adapter_model.safetensors")
    for folder in sorted((run / "checkpoint-4" / "rows").rglob("*.safetensors")):
        found |= {f"{folder.relative_to(run)}: {key}": tensor for key, tensor in load_file(folder).items()}
    return found


def near(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        if "crc32" not in key:  # of numbers that are near, checksums are not
            assert torch.allclose(tensor.double(), two[key].double(), atol=1e-5), key


def test_two_processes_train_rows_as_one_does_on_twice_the_batch(pair):
    near(tensors(pair / "one"), tensors(pair / "two"))
    for (_, a, *_, m), (_, b, *_, n) in zip(metrics(pair / "one"), metrics(pair / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-5) and m == n
    logs = [json.loads(line) for line in (pair / "two" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0.1 for row in logs if "grad_norm" in row), "each step is clipped"
    one, two = (json.loads((pair / name / "run.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2 and two["measured"]["store_down_bytes_per_step"] > 0
    assert two["measured"]["store_slow_bytes"] == one["measured"]["store_slow_bytes"] * 5 / 4, "a second region"


@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_do_what_one_does_on_twice_the_batch(name, pair):
    one, two = pair / f"{name}-1", pair / f"{name}-2"
    files = [{str(p.relative_to(f)) for p in f.rglob("*") if "rng_state" not in p.name} for f in (one, two)]
    assert files[0] == files[1]
    assert len(metrics(two)) == 4, "one process writes"
    for (_, a, _, m), (_, b, _, n) in zip(metrics(one), metrics(two), strict=True):
        assert a == pytest.approx(b, abs=1e-5) and m == n
    for path in (one / "adapter").rglob("*.safetensors"):
        mine, theirs = adapter.read_tensors(path.parent), adapter.read_tensors(two / path.parent.relative_to(one))
        assert all(torch.allclose(mine[k].float(), theirs[k].float(), atol=1e-5) for k in mine)
    assert json.loads((two / "run.json").read_text())["processes"] == 2


def test_a_checkpoint_of_two_processes_is_gone_on_with(pair):
    first, second = tensors(pair / "two"), tensors(pair / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_checkpoint_of_two_processes_is_one_of_one(pair):
    """One process reads it: every row that either of the two has moved is there."""
    from conftest import MODELS

    surgery = Meft(**MEFT["meft"]).apply(MODELS["llama"](), trimtab.Place(fast="cpu"))
    left = load_file(pair / "two" / "adapter" / "adapter_model.safetensors")
    for store in surgery.stores:
        load_rows(store, pair / "two" / "checkpoint-4" / "rows" / store.name)
        key = f"base_model.model.{store.name}"
        parts = [key] if store.name.endswith("router") else [f"{key}.keys", f"{key}.values"]
        table = torch.cat([left[part] for part in parts], -1)
        assert torch.equal(store.whole(VALUES), table) and store.optimizer.steps == 4
        with_momentum = store.whole(M).flatten(1).any(1)
        assert with_momentum.any() and not (with_momentum & ~store.optimizer.moved).any()
    surgery.revert()


@pytest.mark.parametrize("name", FIELDS)
def test_plain_loops(name, pair, tmp_path):
    alone = loop(name, tmp_path)
    first, second = (torch.load(pair / f"{name}-{rank}.pt") for rank in range(2))
    near(alone["left"], first["left"])
    assert all(torch.equal(tensor, second["left"][key]) for key, tensor in first["left"].items()), "one table for both"
    assert [sum(both) / 2 for both in zip(first["losses"], second["losses"], strict=True)] == pytest.approx(
        alone["losses"], abs=1e-5
    )
    assert alone["losses"][-1] < 0.95 * alone["losses"][0]
    assert all(len(alone["left"][f"{layer}.dirty"]) for layer in range(2))
    for one in (first, second):
        assert one["mapped"] and one["freed"] and one["files"] == [], "no name, and gone with the way back"
        apart = 0 if "hosts" in FIELDS[name] else sum(alone["left"][f"model.layers.0.mlp.{kind}"].numel() * 4
                                                      for kind in ("keys", "values"))  # fmt: skip
        assert sum(one["bytes"].values()) == sum(alone["bytes"].values()) + apart


def test_what_several_processes_cannot_do_is_refused_in_all(pair):
    for rank in range(2):
        said = json.loads((pair / f"refused-{rank}.json").read_text())
        assert said.keys() == REFUSED.keys() and all("several processes" in text for text in said.values())


@pytest.mark.parametrize("sharder", ["FSDP", "DeepSpeed"])
def test_sharded_parameters_are_refused(sharder, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "sharded_by", lambda args: sharder)
    with pytest.raises(BadInput, match=sharder):
        trimtab.Recipe.from_dict(tree(pair / "world", tmp_path / "run", MEFT, max_steps=1)).train()


def test_who_shards_is_found(monkeypatch):
    from types import SimpleNamespace

    assert session.sharded_by(SimpleNamespace(fsdp=None, deepspeed=None)) == ""
    assert session.sharded_by(SimpleNamespace(fsdp=True, deepspeed=None)) == "FSDP"
    assert session.sharded_by(SimpleNamespace(fsdp=None, deepspeed={"zero_optimization": {}})) == "DeepSpeed"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert session.sharded_by(SimpleNamespace(fsdp=None, deepspeed=None)) == "DeepSpeed"
