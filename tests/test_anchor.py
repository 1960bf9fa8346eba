"""Weight anchoring over stages: the penalty, the Fisher information, and that a run with it plans and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers_run import left, make_stages_world, run, run_in_parts, same, tree
from trimtab import Recipe
from trimtab.engine.anchor import Anchored
from trimtab.errors import BadInput

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_stages_world(tmp_path_factory.mktemp("world"))


def keys(
    world: Path, output: Path, anchor: dict | None, patch: dict | None = None, stages: int = 2, **training
) -> dict:
    made = tree(world, output, patch or {"lora": {"r": 4, "dropout": 0.2}}, max_steps=STEPS, **training)
    made["data"] = {"reply_tokens": 2}
    made["stages"] = [
        {"name": name, "data": {"train": str(world / f"{name}.jsonl"), "test": str(world / f"{name}_test.jsonl")}}
        for name in ("one", "two", "three")[:stages]
    ]  # fmt: skip
    return made | ({"anchor": anchor} if anchor else {})


@pytest.mark.parametrize("fisher", [True, False])
def test_the_penalty_and_its_gradient(fisher):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    anchor = Anchored(2.5, fisher).apply(model, None)  # type: ignore[arg-type]
    assert anchor.penalty() is None, "until it has read an anchor"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert anchor.at.keys() == trained.keys() and anchor.own_tensors() == {}
    for tensors in (anchor.at, anchor.fisher):
        for tensor in tensors.values():
            tensor.copy_(torch.rand_like(tensor))
    anchor.pulls = True
    value = anchor.penalty()
    wanted = sum(
        ((anchor.fisher[name].double() if fisher else 1.0) * (p.double() - anchor.at[name].double()) ** 2).sum()
        for name, p in trained.items()
    ) * 1.25  # fmt: skip
    ours = torch.autograd.grad(3 * value, list(trained.values()))
    theirs = torch.autograd.grad(3 * wanted, list(trained.values()))
    assert torch.allclose(value.double(), wanted, rtol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    assert sum(t.numel() for ts in anchor.outside().values() for t in ts) == (1 + fisher) * sum(
        p.numel() for p in trained.values())  # fmt: skip


def test_the_file_has_the_weights_and_the_fisher_information_of_a_stage(world, tmp_path, monkeypatch):
    """Against a loop over rows with the library's own loss, on a model that is trained whole."""
    from transformers import AutoModelForCausalLM

    from trimtab import load_adapter
    from trimtab.training.session import Session

    rows, own = [], Session.keep

    def keep(self):
        rows.append([self.trainer.train_dataset[i] for i in range(len(self.trainer.train_dataset))])
        own(self)

    monkeypatch.setattr(Session, "keep", keep)
    run(keys(world, tmp_path / "run", {"ewc": {"strength": 1.0, "rows": 6}}, patch={"full": {}}, stages=3))
    folders = sorted((tmp_path / "run/stages").glob("*-*"))
    assert not (folders[2] / "anchor.safetensors").exists(), "nothing comes after it"
    before: dict[str, torch.Tensor] = {}
    for folder, data in zip(folders[:2], rows, strict=False):
        held = load_file(folder / "anchor.safetensors")
        model = AutoModelForCausalLM.from_pretrained(world / "llama")
        load_adapter(model, folder / "adapter")
        trained = dict(model.named_parameters())
        assert {f"{part}.{name}" for part in ("at", "fisher") for name in trained} == held.keys()
        assert all(torch.equal(held[f"at.{name}"], p) for name, p in trained.items())
        wanted = {name: before.get(name, torch.zeros_like(p)).clone() for name, p in trained.items()}
        for place in numpy.random.default_rng(0).permutation(len(data))[:6]:
            ids, labels = (torch.tensor(data[place][key])[None] for key in ("input_ids", "labels"))
            grads = torch.autograd.grad(model(input_ids=ids, labels=labels).loss, list(trained.values()))
            for name, grad in zip(trained, grads, strict=True):
                wanted[name] += grad**2 / 6
        for name in trained:
            assert torch.allclose(held[f"fisher.{name}"], wanted[name], rtol=1e-3, atol=1e-9), name
        before = {name: held[f"fisher.{name}"] for name in trained}


@pytest.mark.parametrize("kind", ["ewc", "l2"])
def test_it_holds_what_matters(world, tmp_path, kind):
    """A strong anchor against one that is next to none: how far stage two moves, weighted as the penalty weighs it."""

    def moved(strength: float) -> float:
        output = tmp_path / f"{strength}"
        run(keys(world, output, {kind: {"strength": strength}}, stages=3))
        one, two = (load_file(output / "stages" / name / "anchor.safetensors") for name in ("1-one", "2-two"))
        names = [key.removeprefix("at.") for key in one if key.startswith("at.")]
        weight = {name: one[f"fisher.{name}"] if kind == "ewc" else 1.0 for name in names}
        return float(sum((weight[n] * (one[f"at.{n}"] - two[f"at.{n}"]) ** 2).sum() for n in names))

    assert moved(1e4) < 0.5 * moved(1e-12)


def test_resume_is_exact_with_an_anchor_and_the_plan_counts_it(world, tmp_path, minutes):
    last = {"save_strategy": "steps", "save_steps": STEPS}
    anchor = {"ewc": {"strength": 10.0, "rows": 4}}
    whole = run(keys(world, tmp_path / "whole", anchor, **last))
    parts = keys(world, tmp_path / "parts", anchor, max_minutes=3.5, **last)
    assert run_in_parts(parts, minutes) >= 2
    for name in ("1-one", "2-two"):
        same(left(tmp_path / "whole/stages" / name), left(tmp_path / "parts/stages" / name))
    one, two = ((tmp_path / name / "stages/1-one/anchor.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == two
    with pytest.raises(BadInput, match="with anchor"):
        run(keys(world, tmp_path / "parts", {"ewc": {"strength": 11.0, "rows": 4}}), resume=True)
    run(keys(world, tmp_path / "free", None))
    for name in ("1-one", "2-two"):
        stage, other = (json.loads((tmp_path / side / "stages" / name / "run.json").read_text())
                        for side in ("whole", "free"))  # fmt: skip
        trained = 2 * 4 * stage["trainable_parameters"]
        for key in ("predicted", "measured"):
            assert stage[key]["bytes"]["adapter"] - other[key]["bytes"]["adapter"] == trained
    planned, live = (whole["stages"][1][key]["live_peak_bytes"] for key in ("predicted", "measured"))
    assert planned == pytest.approx(live, rel=0.02)


def test_a_damaged_anchor_is_refused(world, tmp_path):
    made = keys(world, tmp_path / "run", {"l2": {"strength": 1.0}}, stages=1)
    made["stages"] = keys(world, tmp_path / "run", None)["stages"]
    recipe = Recipe.from_dict(made)
    run(made)
    for path in ((tmp_path / "run/run.json"), (tmp_path / "run/stages/2-two/run.json")):
        path.unlink()
    (tmp_path / "run/stages/1-one/anchor.safetensors").write_bytes(b"x" * 40)
    assert recipe.stage_recipes()[1].anchor is not None
    with pytest.raises(BadInput, match="anchor .*it cannot be read"):
        run(made, resume=True)


@pytest.mark.parametrize("anchor,more,words", [
    ({}, {}, None),
    ({"ewc": {"strength": 0}}, {}, "strength"),
    ({"ewc": {"strength": 1}, "l2": {"strength": 1}}, {}, "one of ewc and l2"),
    ({"ewc": {"strength": 1}}, {"stepper": "mezo"}, "Mezo has no gradients"),
    ({"l2": {"strength": 1}}, {"patches": [{"meft": {"r": 64, "k": 16}}]}, "rows in the slow tier"),
])  # fmt: skip
def test_bad_input(world, tmp_path, anchor, more, words):
    made = keys(world, tmp_path / "run", anchor or None) | more
    if words is None:
        made["stages"][0]["anchor"], made["stages"][1]["anchor"] = {"l2": {"strength": 1}}, {"ewc": {"strength": 1}}
        words = "stage two has ewc, and stage one l2"
    with pytest.raises(BadInput, match=words):
        run(made)
    assert not (tmp_path / "run").exists()


def test_an_anchor_needs_a_stage_that_follows(world, tmp_path):
    lone = tree(world, tmp_path / "run", {"lora": {}}) | {"anchor": {"l2": {"strength": 1}}}
    with pytest.raises(BadInput, match="the recipe has no stages"):
        run(lone)
    made = keys(world, tmp_path / "run", {"l2": {"strength": 1}})
    made["stages"][1]["carry"] = "fresh"
    with pytest.raises(BadInput, match="no stage starts from the one before"):
        run(made)
