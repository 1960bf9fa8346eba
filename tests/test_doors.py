"""Kinds of methods that the table does not have yet, end to end: through recipe, plan, train, resume and eval."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from doors import PlainSGD, ScaledTrainer, doors  # noqa: F401 (a fixture)
from helpers_run import make_world, tree
from trimtab.errors import BadInput
from trimtab.inference.evaluate import evaluate
from trimtab.planning.plan import plan
from trimtab.recipe import Recipe
from trimtab.training.train import train

pytestmark = [pytest.mark.usefixtures("doors"), pytest.mark.filterwarnings("ignore")]
PACA = {"paca": {"r": 4}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def trained(output) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def run(keys: dict, **more) -> dict:
    return train(Recipe.from_dict({**keys, **more}))


def same(one, two) -> bool:
    a, b = trained(one), trained(two)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- steppers --------------------------------------------------------------------------------------------------------


def test_a_stepper_of_its_own_does_what_it_says(world, tmp_path):
    """Bit for bit what the library's SGD does, under accumulation and clipping too."""
    for number, more in enumerate(({}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01})):
        own, theirs = tmp_path / f"own{number}", tmp_path / f"theirs{number}"
        run(tree(world, own, PACA, max_steps=3, **more), stepper="plain_sgd")
        assert len(PlainSGD.seen) == 3 * more.get("gradient_accumulation_steps", 1), "each micro-batch, once"
        run(tree(world, theirs, PACA, max_steps=3, optim="sgd", **more))
        assert same(own, theirs)
        assert any(t.any() for key, t in trained(own).items() if key.endswith("delta"))


def test_its_options_state_and_checkpoints(world, tmp_path):
    momentum = {"plain_sgd": {"momentum": 0.9}}
    saved = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = tree(world, tmp_path / "whole", PACA, max_steps=4, **saved)
    run(whole, stepper=momentum)
    parts = tree(world, tmp_path / "parts", PACA, max_steps=2, **saved)
    run(parts, stepper=momentum)
    state = torch.load(tmp_path / "parts" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert all("momentum_buffer" in slots for slots in state["state"].values())
    whole["output"] = str(tmp_path / "parts")
    run(whole, stepper=momentum, resume=True)
    assert same(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(BadInput, match="started with"):
        run({**whole, "training": {**whole["training"], "max_steps": 6}}, resume=True)


def test_its_plan_has_its_optimizer(world, tmp_path):
    keys = tree(world, tmp_path / "run", PACA, max_steps=2)
    adam, sgd, momentum = (
        plan(Recipe.from_dict({**keys, "stepper": stepper}))
        for stepper in ("backprop", "plain_sgd", {"plain_sgd": {"momentum": 0.9}})
    )
    state = [made.kinds.get("optimizer", 0) for made in (sgd, momentum, adam)]
    assert state[1] - state[0] == 4 * momentum.trained and state[1] < state[2]


def test_an_optimizer_that_would_not_be_used_is_refused(world, tmp_path):
    keys = tree(world, tmp_path / "run", PACA, max_steps=2, optim="adamw_torch")
    with pytest.raises(BadInput, match="an optimizer of its own"):
        run(keys, stepper="plain_sgd")
    keys = tree(world, tmp_path / "run", {"meft": {"r": 64}}, max_steps=2)
    for verb in (plan, train):
        with pytest.raises(BadInput, match="only Adam steps"):
            verb(Recipe.from_dict({**keys, "stepper": "plain_sgd"}))
    assert not (tmp_path / "run").exists()


# --- penalties -------------------------------------------------------------------------------------------------------


def penalised(decay: float) -> dict:
    return {"penalised": {"r": 8, "decay": decay}}


def test_a_penalty_is_in_each_step_once(world, tmp_path):
    """However the step is cut into micro-batches; and at decay 0 nothing changes."""
    ends = {}
    for name, decay, size, times in (("one", 50.0, 4, 1), ("four", 50.0, 1, 4), ("none", 0.0, 4, 1)):
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_grad_norm": 0.0}
        run(tree(world, tmp_path / name, penalised(decay), max_steps=3, optim="sgd", learning_rate=1e-3, **training))
        ends[name] = trained(tmp_path / name)
    plain = tree(world, tmp_path / "plain", {"parallel_adapter": {"r": 8}}, max_steps=3, optim="sgd",
                 learning_rate=1e-3, per_device_train_batch_size=4, max_grad_norm=0.0)  # fmt: skip
    run(plain)
    keys = [key for key in ends["one"] if key.endswith("keys")]
    for key in keys:
        assert torch.allclose(ends["one"][key], ends["four"][key], atol=1e-6)
        assert torch.equal(ends["none"][key], trained(tmp_path / "plain")[key])
        drawn, free = ends["one"][key].norm(), ends["none"][key].norm()
        assert drawn / free == pytest.approx((1 - 1e-3 * 50 * (1 + 2 / 3 + 1 / 3) / 3) ** 3, rel=0.03), "three steps"


def test_a_penalty_is_planned(world, tmp_path):
    keys = tree(world, tmp_path / "run", penalised(1.0), max_steps=3)
    made = run({**keys, "budget": {"fast": "20GiB"}})
    assert made["predicted"]["live_peak_bytes"] == pytest.approx(made["measured"]["live_peak_bytes"], rel=0.02)


# --- objectives ------------------------------------------------------------------------------------------------------


def test_an_objective_has_its_own_trainer_arguments_and_defaults(world, tmp_path):
    keys = tree(world, tmp_path / "scaled", PACA, max_steps=3, optim="sgd", max_grad_norm=0.0)
    run(keys, objective="scaled")
    assert all(type(made).__name__ == "ScaledTrainer" for made in ScaledTrainer.made) and ScaledTrainer.made
    assert ScaledTrainer.made[-1].args.scale_of_loss == 0.5
    rate = keys["training"]["learning_rate"]
    half = tree(world, tmp_path / "half", PACA, max_steps=3, optim="sgd", max_grad_norm=0.0,
                lr_scheduler_type="constant")  # fmt: skip
    half["training"]["learning_rate"] = rate / 2
    run(half)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(
        trained(tmp_path / "scaled").values(), trained(tmp_path / "half").values(), strict=True
    ))  # fmt: skip
    written = json.loads((tmp_path / "scaled" / "run.json").read_text())
    assert written["steps"] == 3 and written["predicted"]["live_peak_bytes"] > 0


def test_its_arguments_are_checked(world, tmp_path):
    keys = tree(world, tmp_path / "run", PACA, max_steps=2)
    for fields, message in (({"scale_of_los": 2.0}, "scale_of_loss"), ({"scale_of_loss": "much"}, "scale_of_loss")):
        made = {**keys, "objective": "scaled", "training": {**keys["training"], **fields}}
        for verb in (plan, train):
            with pytest.raises(BadInput, match=message):
                verb(Recipe.from_dict(made))
    with pytest.raises(BadInput, match="has no such field"):
        run({**keys, "training": {**keys["training"], "scale_of_loss": 2.0}})


def test_its_evaluator_evaluates(world, tmp_path):
    keys = tree(world, tmp_path / "run", PACA, max_steps=2)
    keys["data"]["test"] = keys["data"]["train"]
    run(keys, objective="scaled")
    found = evaluate(Recipe.from_dict({**keys, "objective": "scaled"}))
    assert found["metrics"].keys() == {"parameters"} and found["metrics"]["parameters"] > 1000
