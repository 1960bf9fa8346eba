"""Full fine-tuning with weights, gradients and Adam's moments in a file: equal to training in memory, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers_run import films, left, make_world, run, same, tree
from trimtab.contracts import Place
from trimtab.errors import BadInput, DoesNotFit
from trimtab.memory.meter import is_mapped
from trimtab.methods.full import Full
from trimtab.model.load import load_model
from trimtab.planning.plan import plan
from trimtab.recipe import ModelSpec, Recipe
from trimtab.tiered import mapped_file

pytestmark = pytest.mark.filterwarnings("ignore")
SLOW = {"full": {"offload": "slow"}}


def unnamed_files() -> list[tuple[int, int]]:
    """Address ranges of this process that are shared mappings of files without a name."""
    lines = (line.split(None, 5) for line in Path("/proc/self/maps").read_text().splitlines())
    ranges = (line[0].split("-") for line in lines if line[1][3] == "s" and line[-1].endswith("(deleted)"))
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("fields,training", [
    ({}, {}), ({}, {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05}), ({}, {"optim": "adamw_torch"}),
    ({"train": "norm|embed"}, {"weight_decay": 0.1}), ({"dtype": "bf16"}, {"gradient_accumulation_steps": 2}),
    ({}, {"activation_checkpointing": True, "max_grad_norm": 0}),
])  # fmt: skip
def test_equals_training_in_memory(fields, training, world, tmp_path):
    for name, more in (("memory", {}), ("file", {"offload": "slow"})):
        patch = {"full": {**fields, **more}}
        run(tree(world, tmp_path / name, patch, max_steps=4, save_strategy="steps", save_steps=4, **training))
    one, other = left(tmp_path / "memory"), left(tmp_path / "file")
    config = "adapter/adapter_config.json"
    for found in (one, other):
        found.pop(config, None)
        for key in [key for key in found if isinstance(found[key], bytes)]:  # the patch's fields differ
            del found[key]
    same(one, other)


def test_a_classifier_and_its_head(world, tmp_path):
    for name, more in (("memory", {}), ("file", {"offload": "slow"})):
        run(films(world, tmp_path / name, {"full": more}, max_steps=3))
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("memory", "file")]
    losses = [[row["loss"] for line in of if "loss" in (row := json.loads(line))] for of in lines]
    assert losses[0] == losses[1] and losses[0]


def test_all_of_it_is_in_the_file_and_nothing_is_left(world):
    model, _ = load_model(ModelSpec(str(world / "llama")))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    surgery = Full(offload="slow").apply(model, Place())
    optimizer = torch.optim.AdamW([p for p in model.parameters()], lr=0.1, fused=True)
    surgery.offloaded.hold(optimizer)
    for _ in range(2):
        ids = torch.randint(5, 30, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        maps = unnamed_files()
        for parameter in model.parameters():
            held = optimizer.state[parameter]
            for tensor in (parameter, parameter.grad, held["exp_avg"], held["exp_avg_sq"]):
                assert is_mapped(tensor, maps)
        optimizer.zero_grad()
    surgery.revert()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_plan_has_it_in_the_slow_tier(world, tmp_path):
    """The state leaves the fast tier, and the plan's tensors are those that the run counts."""
    made = {name: plan(Recipe.from_dict(tree(world, tmp_path / name, {"full": fields}, max_steps=3)))
            for name, fields in (("memory", {}), ("file", {"offload": "slow"}))}  # fmt: skip
    model, _ = load_model(ModelSpec(str(world / "llama")))
    weights = sum(4 * p.numel() for p in model.parameters())
    state = made["file"].kinds["training state in the slow tier"]
    assert 3 * weights <= state <= 4 * weights + 64 * 1024
    saved = made["memory"].live_peak_bytes - made["file"].live_peak_bytes
    assert saved > 2 * weights, "at least the moments, and the weights"
    done = run(tree(world, tmp_path / "run", SLOW, max_steps=3), budget={"fast": "4GiB"})
    predicted, measured = done["predicted"]["live_peak_bytes"], done["measured"]["live_peak_bytes"]
    assert measured - 256 <= predicted <= 1.05 * measured


@pytest.mark.parametrize("changes,what", [
    ({"place": {"slow": "ram"}}, "nothing would be saved"), ({"stepper": "mezo"}, "of which it has none"),
    ({"training": {"optim": "sgd"}}, "only Adam steps"),
    ({"place": {"fast": "cuda"}}, "no such device"),
])  # fmt: skip
def test_bad_input(changes, what, world, tmp_path):
    keys = tree(world, tmp_path / "run", SLOW, max_steps=1)
    keys["training"] |= changes.get("training", {})
    with pytest.raises(BadInput, match=what):
        run({**keys, **{key: value for key, value in changes.items() if key != "training"}})
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_is_said_before_the_start(world, tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_file, "free_bytes", lambda folder: 1000)
    with pytest.raises(DoesNotFit, match="weights, gradients and Adam's moments"):
        run(tree(world, tmp_path / "run", SLOW, max_steps=1))
    assert not (tmp_path / "run").exists()
