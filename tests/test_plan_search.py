"""The search: what it combines, how it ranks, what it writes; rates are given, so that nothing is timed."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import torch
import yaml
from trl import SFTConfig

from tiny import tiny_folder
from trimtab import methods
from trimtab.engine.arguments import training_arguments
from trimtab.errors import BadInput, DoesNotFit
from trimtab.memory.budget import Budget
from trimtab.planning import calibrate, search
from trimtab.planning.plan import Plan, plan
from trimtab.planning.step import PlannedStep
from trimtab.recipe import Recipe
from world import flat

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def found(folder):
    return search.search(recipe(folder), process=0, rates=flat())


def recipe(folder: str, **more) -> Recipe:
    training = {"per_device_train_batch_size": 2, "max_length": 16, **more.pop("training", {})}
    return Recipe(**{"model": {"name": folder, "precision": "fp32"}, "training": training, **more})


def made(peak: int, speed: float | None, trained: int, fits: bool = True) -> search.Candidate:
    found = Plan({"adapter": peak}, "blocks", 0, 0, 0, Budget(None if fits else 1), 10**9, 1, 1, None, speed, trained)
    return search.Candidate("paca", 1, False, "bf16", None, Recipe(), found)


def test_what_fits_comes_first_then_speed_then_what_is_trained():
    small, fast = made(10, 100.0, 5), made(20, 200.0, 5)
    alike, large = made(20, 201.0, 50), made(90, 900.0, 9, fits=False)
    smaller = made(80, 1.0, 9, fits=False)
    ranked = sorted([large, small, smaller, fast, alike], key=search._rank)
    assert [ranked.index(c) for c in (alike, fast, small, smaller, large)] == [0, 1, 2, 3, 4]


def test_every_training_method_of_the_table_is_tried(folder, found):
    tried = {c.method for c in (*found.candidates, *found.refused)}
    forms = {"lora fa", "lora velora", "full offload: slow"}
    assert tried == {n for n in methods.names("patch") if methods.find(n).when.value == "train"} | forms
    assert {c.method for c in found.candidates} >= {"lora fa", "full offload: slow", "lst", "senszoq", "edora"}
    assert {(c.micro_batch, c.checkpointing) for c in found.candidates} == {
        (2, False),
        (1, True),
        (2, True),
        (1, False),
    }
    for c in found.candidates:
        values = c.recipe.training_values()
        assert values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] == 2
        assert c.plan.tokens_per_second > 0 and c.plan.trained > 0
    assert len(list(search._combinations(Recipe()))) >= 40


def test_what_a_recipe_states_is_kept(folder):
    stated = recipe(folder, training={"activation_checkpointing": True, "gradient_accumulation_steps": 2})
    every = list(search._combinations(stated))
    assert {c.precision for c in every} == {"fp32"} and {c.checkpointing for c in every} == {True}
    assert {c.micro_batch for c in every} == {4, 2, 1}
    own = Recipe(**{**vars(stated), "patches": [{"paca": {"r": 3}}]})
    assert own.patches in [c.recipe.patches for c in search._combinations(own)]
    free, fixed = recipe(folder), recipe(folder, objective={"causal_lm": {"chunk": 7}})
    assert search._chunk_is_free(free) and not search._chunk_is_free(fixed)


def test_plans_can_be_made_by_several_processes(folder, found):
    one = next(search._combinations(recipe(folder)))
    planned = search._planned(one, {"process": 0, "rates": flat(), "tokens": None})
    assert pickle.loads(pickle.dumps(planned)) == planned
    assert all(pickle.dumps(c) for c in found.candidates)


def test_a_candidate_is_planned_as_a_recipe_is(found):
    for c in found.candidates[:3]:
        alone = plan(c.recipe, process=0, rates=flat())
        assert (alone.kinds, alone.tokens_per_second) == (c.plan.kinds, c.plan.tokens_per_second)


def test_between_no_checkpointing_and_all_blocks_are_every_second_and_fourth(folder, monkeypatch):
    """With a budget that LoRA exceeds without checkpointing."""
    monkeypatch.setattr(search, "_methods", lambda recipe: [("lora", recipe.patches)])
    training = {"per_device_train_batch_size": 2, "max_length": 256}
    wide = recipe(folder, patches=["lora"], training=training, objective={"causal_lm": {"chunk": 16}})
    whole = [plan(c.recipe, process=0, rates=flat()) for c in search._combinations(wide)]
    most, least = (pick(p.fast_peak_bytes for p in whole) for pick in (max, min))
    tight = dataclasses.replace(wide, budget={"fast": (most + least) // 2})
    found = search.search(tight, process=0, rates=flat())
    between = [c for c in found.candidates if c.how]
    assert {(c.blocks, c.micro_batch) for c in between} == {("1/2", 2), ("1/4", 2), ("1/2", 1), ("1/4", 1)}
    best = found.best
    assert best.fits and all(c.plan.tokens_per_second <= best.plan.tokens_per_second * 1.06 for c in between if c.fits)
    for c in between:
        assert c.recipe.training["activation_checkpointing_kwargs"]["every_n_layers"] == int(c.blocks[2:])
        assert "activation_checkpointing_kwargs" in c.to_dict() and c.blocks in "\n".join(found.lines())
    stated = recipe(folder, patches=["lora"], training={"activation_checkpointing": True})
    assert not list(search._between(stated, found.candidates))


def test_offloading_is_tried_and_planned_on_a_gpu_only(folder, tmp_path, monkeypatch):
    gpu = recipe(folder, patches=["lora"], place={"fast": "cuda"}, budget={"fast": "24GiB"}, training={
        "per_device_train_batch_size": 8, "max_length": 64, "activation_checkpointing": True})  # fmt: skip
    kwargs = {"activation_checkpointing_kwargs": {"offload": True}}
    away = dataclasses.replace(gpu, training={**gpu.training, **kwargs})
    plain, held = (
        PlannedStep(r, training_arguments(r, SFTConfig, tmp_path, False), None)
        .trace(8, 64)
        .peaks["backward of the head"]
        for r in (gpu, away)
    )
    kept = 8 * 64 * 64 * 4  # the input of a block, fp32
    assert held["activations in the slow tier"] == 2 * kept and "activations in the slow tier" not in plain
    assert plain["activations"] - held["activations"] == kept, "the input of the first is the embedding's too"
    assert plan(away).slow_bytes > 0
    monkeypatch.setattr(search, "_methods", lambda recipe: [("lora", recipe.patches)])
    small = dataclasses.replace(gpu, training={"per_device_train_batch_size": 2, "max_length": 64}, budget={"fast": 1})
    tried = [search._planned(c, {"process": 0}) for c in search._combinations(small)]
    fitting = [dataclasses.replace(c, plan=dataclasses.replace(c.plan, budget=Budget(10**9))) if c.checkpointing else c
               for c in tried]  # fmt: skip
    assert "off" in {c.blocks for c in search._between(small, fitting)}


def test_checkpointing_and_products_cost_time(found):
    speed = {
        (c.method, c.micro_batch, c.checkpointing): c.plan.tokens_per_second for c in found.candidates if not c.chunk
    }
    for method in {method for method, _, _ in speed}:
        assert speed[method, 2, True] < speed[method, 2, False]


def test_what_is_written_loads_and_plans_the_same(found, tmp_path):
    path = tmp_path / "best.yaml"
    search.write(found, path)
    again = plan(Recipe.load(path), process=0, rates=flat())
    assert again.predicted() == found.best.plan.predicted()
    before = path.read_text()
    with pytest.raises(BadInput, match="exists already"):
        search.write(found, path)
    assert path.read_text() == before
    search.write(found, path, overwrite=True)


def test_without_a_fit_the_smallest_is_told(found, tmp_path):
    none = [dataclasses.replace(c, plan=dataclasses.replace(c.plan, budget=Budget(1))) for c in found.candidates]
    nothing = search.Found(sorted(none, key=search._rank), [])
    least = min(c.plan.fast_peak_bytes for c in found.candidates)
    assert nothing.best is None and nothing.candidates[0].plan.fast_peak_bytes == least
    with pytest.raises(DoesNotFit, match="the smallest would use"):
        search.write(nothing, tmp_path / "none.yaml")
    assert not (tmp_path / "none.yaml").exists()


def test_mezo_is_the_last_resort(folder, found, tmp_path, monkeypatch):
    assert not any("mezo" in c.method for c in found.candidates), "back-propagation fits"
    training = {"learning_rate": 0.5, "max_grad_norm": 1.0, "activation_checkpointing": True, "weight_decay": 0.1}
    least = min(c.plan.fast_peak_bytes for c in found.candidates if c.method in ("paca", "full"))
    two = [("paca", [{"paca": {}}]), ("full", [{"full": {}}])]
    monkeypatch.setattr(search, "_methods", lambda recipe: two)
    tight = recipe(folder, training=training, budget={"fast": f"{least - 1}B"})
    last = search.search(tight, process=0, rates=flat())
    assert last.best.method.endswith(", mezo") and last.best.plan.fast_peak_bytes < least
    assert not any(c.fits for c in last.candidates if "mezo" not in c.method)
    assert any("learns far more slowly" in n and "learning_rate, max_grad_norm" in n for n in last.notes)
    written = search.write(last, tmp_path / "last.yaml")
    values = Recipe.load(tmp_path / "last.yaml").training_values()
    assert written.stepper == "mezo" and (values["learning_rate"], values["weight_decay"]) == (1e-6, 0.1)
    assert plan(written, process=0, rates=flat()).fits
    none = search.search(recipe(folder, training=training, budget={"fast": "1KiB"}), process=0, rates=flat())
    assert none.best is None and not any("slowly" in note for note in none.notes)
    with pytest.raises(DoesNotFit, match="mezo"):
        none.require_fit()


def test_a_mapped_base_beyond_free_memory_is_read_again(folder, monkeypatch):
    import trimtab.planning.plan as verb

    mapped = recipe(folder, patches=["paca"], model=folder)
    before = plan(mapped, process=0, rates=flat(disk={"read": 1e6}))
    monkeypatch.setattr(verb, "ram", lambda: {"MemAvailable": before.live_peak_bytes})
    after = plan(mapped, process=0, rates=flat(disk={"read": 1e6}))
    assert before.disk_bytes_per_step == 0 and after.disk_bytes_per_step == 2 * before.slow_bytes
    more = 32 / after.tokens_per_second - 32 / before.tokens_per_second
    assert more == pytest.approx(2 * before.slow_bytes / 1e6) and any("read from the disk" in n for n in after.notes)


def test_the_verb_searches_where_no_patch_is_named(folder, tmp_path, call, monkeypatch):
    monkeypatch.setattr(calibrate, "measured_rates", lambda *_: flat())
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    path, best = tmp_path / "recipe.yaml", tmp_path / "best.yaml"
    keys = {
        "model": {"name": folder, "precision": "fp32"}, "objective": {"causal_lm": {"chunk": 8}},
        "training": {"per_device_train_batch_size": 1, "max_length": 8, "activation_checkpointing": False},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(keys))
    code, out, _ = call("plan", path, "--json", "--write", best)
    tree = json.loads(out)
    assert code == 0 and tree["fits"] and tree["best"] == tree["candidates"][0]
    assert Recipe.load(best) == Recipe.from_dict(tree["recipe"])
    assert call("plan", path, "--write", best)[0] == 2
    code, out, err = call("plan", path, "budget.fast=1MiB")
    assert code == 3 and "the smallest would use" in err and out.splitlines()[0].startswith("method")
