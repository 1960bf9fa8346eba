"""Objectives that reward sampled replies, together with what else a recipe may ask for."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from helpers_run import POLICIES as OBJECTIVES
from helpers_run import make_world, prompts
from trimtab.errors import BadInput
from trimtab.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")
objectives = pytest.mark.parametrize("name", OBJECTIVES)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@objectives
def test_held_out_rewards_during_training(name, world, tmp_path):
    made = prompts(
        world, tmp_path / "run", {"lora": {"r": 4}}, OBJECTIVES[name], max_steps=2, eval_strategy="steps", eval_steps=1
    )
    made["data"]["test"] = made["data"]["train"]
    Recipe.from_dict(made).train()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum("eval_reward" in line for line in lines) == 2


@pytest.mark.parametrize("name", ["s_grpo", "t_spmo"])
def test_by_forward_passes(name, world, tmp_path):
    """MeZO perturbs the weights under the policy's loss, over replies that are sampled without a perturbation."""
    for rate in (0.0, 0.1):
        made = prompts(
            world, tmp_path / str(rate), {"lora": {"r": 4}}, OBJECTIVES[name], max_steps=2, learning_rate=rate
        )
        Recipe.from_dict({**made, "stepper": "mezo"}).train()
    one, other = (load_file(next((tmp_path / of / "adapter").rglob("*.safetensors"))) for of in ("0.0", "0.1"))
    assert any(bool((one[key] != other[key]).any()) for key in one)


def test_trls_loss_has_no_finite_difference(world, tmp_path):
    made = prompts(world, tmp_path / "run", {"lora": {"r": 4}}, "grpo", max_steps=1)
    with pytest.raises(BadInput, match="see no difference"):
        Recipe.from_dict({**made, "stepper": "mezo"}).train()


def test_what_is_switched_off_is_no_question(world, tmp_path):
    """T-SPMO has no divergence term, so `beta` is refused, but not `beta: 0`."""
    made = prompts(world, tmp_path / "run", {"lora": {"r": 4}}, "t_spmo", max_steps=1, beta=0.0)
    assert Recipe.from_dict(made).train()["steps"] == 1
