"""`plan --on`: plans for GPUs that are not here, from published figures."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from trimtab import cli
from trimtab.errors import BadInput
from trimtab.planning import devices
from trimtab.planning.plan import plan
from trimtab.recipe import Recipe


@pytest.fixture(scope="module")
def recipe(folders) -> Recipe:
    training = {"max_length": 32, "per_device_train_batch_size": 2}
    return Recipe(model=folders("llama", torch.bfloat16), patches=[{"lora": {"r": 4}}], training=training)


def test_names_and_counts():
    assert devices.parse("rtx-4090, 2xL40S") == [("rtx-4090", 1), ("l40s", 2)]
    for text, said in (("rtx4090", 'Did you mean "rtx-4090"'), ("0xl4", "two of them"), (" ,", "no device")):
        with pytest.raises(BadInput, match=said):
            devices.parse(text)


def test_memory_is_the_plans_own_and_speed_follows_the_figures(recipe):
    slow, fast, two = devices.plan_on(recipe, devices.parse("t4,h100,2xh100"))
    own = plan(Recipe.from_dict({**recipe.to_dict(), "place": {"fast": "cuda"}, "budget": {"fast": "20GiB"}}))
    assert slow.peak == fast.peak == own.fast_peak_bytes and slow.fits and fast.fits
    assert slow.speed < fast.speed and two.speed == 2 * fast.speed
    assert two.peak - fast.peak == 4 * own.trained, "DDP's buckets"


def test_a_budget_that_is_stated_is_kept(recipe):
    small = Recipe.from_dict({**recipe.to_dict(), "budget": {"fast": "64KiB"}})
    (found,) = devices.plan_on(small, devices.parse("h100"))
    assert not found.fits


def test_rates_are_below_what_is_published():
    for device in devices.DEVICES.values():
        rates = devices.rates_of(device)
        assert max(rates.products["bfloat16"]) < device.bf16 * 1e12 and rates.bandwidth < device.bandwidth * 1e12


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_the_command(recipe, tmp_path, monkeypatch, capsys, more):
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    call = ["trimtab", "plan", str(tmp_path / "recipe.yaml"), "engine.allocator=none", "--on", "rtx-4090,2xl4", *more]
    monkeypatch.setattr(sys, "argv", call)
    cli.main()
    out = capsys.readouterr().out
    if more:
        assert [row["device"] for row in json.loads(out)] == ["rtx-4090", "l4"]
        assert all(row["figures"] == "published" and row["fits"] for row in json.loads(out))
    else:
        assert "2 x l4" in out and out.splitlines()[-1] == devices.NOTE
    monkeypatch.setattr(sys, "argv", [*call, "--search"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
