"""`generate` and `eval` inside a budget: a plan before, a guard during, and a record of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers_run import films, make_world, tree
from trimtab.artifacts.run_folder import begin_run
from trimtab.errors import BadInput, DoesNotFit, Stopped
from trimtab.inference import session
from trimtab.inference.evaluate import evaluate
from trimtab.inference.export import export
from trimtab.inference.generate import generate
from trimtab.inference.session import Inference
from trimtab.memory.guard import Guard
from trimtab.memory.meter import LiveTensors
from trimtab.model.sampling import complete
from trimtab.planning.inference import Work, plan_inference
from trimtab.recipe import Recipe
from trimtab.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore")
STREAMING = {"streaming_llm": {"window": 20}}
ASK = "which country is paris in ?"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> the recipe of a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    world, made = make_world(folder, torch.bfloat16), {}
    for name, keys, patch in (("lora", tree, {"lora": {"r": 4}}), ("meft", tree, {"meft": {"r": 64}}),
                              ("films", films, {"paca": {"r": 4}})):  # fmt: skip
        tell = keys(world, folder / name, patch, max_steps=2)
        tell["data"].setdefault("test", tell["data"]["train"])
        made[name] = Recipe.from_dict(tell)
        train(made[name])
    return made


def with_keys(recipe: Recipe, **keys) -> Recipe:
    return Recipe.from_dict({**recipe.to_dict(), **keys})


@pytest.mark.parametrize("work", [Work(4, 40, 50), Work(8, 20, 100)], ids=str)
@pytest.mark.parametrize("name,infer", [
    ("lora", []), ("lora", [STREAMING]), ("meft", []), ("lora", [{"cake": {"budget": "24KiB", "window": 4}}]),
    ("meft", [{"pyramidkv": {"budget": "50%", "window": 4, "chunk": 16}}]), ("lora", [{"full_cache": {"bits": 4}}]),
])  # fmt: skip
def test_the_plan_is_what_tensors_use(runs, name, infer, work):
    recipe = with_keys(runs[name], patches=[*runs[name].patches, *infer])
    made = Inference(recipe)
    planned = plan_inference(recipe, made.run.patches, work)
    ids = torch.randint(8, 60, (work.rows, work.tokens), generator=torch.Generator().manual_seed(0))
    tables = [t for surgery in made.surgeries for store in surgery.stores for t in store.mapped()]
    own = [t for surgery in made.surgeries if not surgery.stores for t in surgery.own_tensors().values()]
    with LiveTensors([*made.model.parameters(), *made.model.buffers(), *own], tables) as live:
        new = complete(
            made.model, made.tokenizer, ids, torch.ones_like(ids), cache=made.cache(), max_new_tokens=work.new,
            min_new_tokens=work.new, eos_token_id=1,
        )  # fmt: skip
    assert new.shape == (work.rows, work.new)
    assert planned.live_peak_bytes == pytest.approx(live.peak_bytes, rel=0.05)
    assert planned.kinds["cache"] > 0 and planned.phase in ("prompt", "reply")


def test_a_bounded_cache_is_planned_smaller(runs):
    recipe, work = runs["lora"], Work(4, 10, 400)
    full = plan_inference(recipe, recipe.load_patches(), work)
    bounded = with_keys(recipe, patches=[*recipe.patches, STREAMING])
    assert plan_inference(bounded, bounded.load_patches(), work).kinds["cache"] < full.kinds["cache"] / 5


@pytest.mark.parametrize("name", ["lora", "films"])
def test_the_plan_of_an_evaluation(runs, name):
    recipe = runs[name]
    made = Inference(recipe)
    small, large = (
        plan_inference(recipe, made.run.patches, Work(rows, 32), made.base.task, made.run.labels) for rows in (2, 8)
    )
    assert small.phase == "evaluation" and small.live_peak_bytes < large.live_peak_bytes


def test_work_beyond_the_budget_does_not_start(runs, call):
    for keys, verb in ((runs["lora"], lambda r: list(generate(r, [ASK]))), (runs["lora"], evaluate),
                       (runs["films"], evaluate)):  # fmt: skip
        with pytest.raises(DoesNotFit, match="of the fast tier"):
            verb(with_keys(keys, budget={"fast": "50MiB"}))
    folder = runs["lora"].output
    code, _, err = call("generate", folder, "-p", ASK, "budget.fast=50MiB")
    assert code == 3 and "max_new_tokens" in err


def test_the_largest_batch_that_fits_is_used(runs):
    made = Inference(runs["lora"])
    with made:
        lengths = [10] * 16
        assert made.replies(lengths, 40000) == 16, "without a budget, all at once"
        peaks = {size: made._planned(Work(size, 10, 40000)).fast_peak_bytes for size in (2, 4)}
        made.budget = session.Budget(fast=(peaks[2] + peaks[4]) // 2)
        made.recipe = with_keys(made.recipe, budget={"fast": made.budget.fast})
        assert made.replies(lengths, 40000) == 2
        assert made.replies(lengths, 40000, beams=2) == 1
        assert made.plan is not None and made.plan.rows in (2, 16)


def test_too_much_on_the_way_is_stopped(runs, monkeypatch, call):
    monkeypatch.setattr(Guard, "of", classmethod(lambda cls, budget, device: Guard(budget=2**20)))
    for keys, verb in ((runs["lora"], lambda r: list(generate(r, [ASK]))), (runs["lora"], evaluate),
                       (runs["films"], evaluate)):  # fmt: skip
        with pytest.raises(Stopped, match="stay within"):
            verb(keys)
    code, _, err = call("eval", runs["films"].output)
    assert code == 4 and "stay within" in err


def test_replies_without_a_run_are_recorded_where_its_folder_exists(runs, tmp_path):
    recipe = with_keys(runs["lora"], patches=[STREAMING], output=str(tmp_path / "run"))
    list(generate(recipe, [ASK], max_new_tokens=2))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    list(generate(recipe, [ASK], max_new_tokens=2))
    assert json.loads((tmp_path / "run" / "generate.json").read_text())["measured"]["new_tokens"] <= 2
    (tmp_path / "run" / "serve.json").write_text("{}")
    begin_run(tmp_path / "run", recipe, resumed=True)
    assert (tmp_path / "run" / "generate.json").exists()
    begin_run(tmp_path / "run", recipe, resumed=False)  # of the run before it
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_what_was_planned_and_used_is_recorded(runs):
    recipe, said = with_keys(runs["meft"], budget={"fast": "20GiB"}), []
    (reply,) = generate(recipe, [ASK], say=said.append, max_new_tokens=5)
    assert isinstance(reply, str) and any("planned" in line for line in said)
    folder = runs["meft"].output
    record = json.loads(open(f"{folder}/generate.json").read())
    assert record["predicted"]["fast_peak_bytes"] <= record["budget"]["fast"] == 20 * 2**30
    assert record["measured"]["fast_peak_bytes"] > 0 and record["measured"]["new_tokens"] <= 5
    assert record["reads"]["tokens"] > 0 and record["versions"]["trimtab"]
    found = evaluate(recipe)
    written = json.loads(open(f"{folder}/eval.json").read())
    assert written["metrics"] == found["metrics"] and written["measured"]["fast_peak_bytes"] > 0
    assert written["predicted"]["phase"] in ("prompt", "reply", "evaluation")


def test_an_inference_patch_serves_generate_and_eval(runs):
    plain = runs["lora"]
    streaming = with_keys(plain, patches=[*plain.patches, {"streaming_llm": {"window": 1000}}])
    assert list(generate(streaming, [ASK])) == list(generate(plain, [ASK]))
    narrow = with_keys(plain, patches=[*plain.patches, {"streaming_llm": {"window": 1, "sinks": 0}}])
    assert evaluate(narrow)["metrics"]["loss"] == evaluate(plain)["metrics"]["loss"], "a loss needs no cache"
    again = train(with_keys(streaming, output=f"{plain.output}-streaming"))
    assert again["adapter_numbers"] > 0, "training leaves it out"


def test_a_recipe_that_trains_nothing_needs_no_adapter(runs, tmp_path):
    recipe = with_keys(runs["lora"], patches=[STREAMING], output=str(tmp_path / "none"))
    assert len(list(generate(recipe, [ASK, ASK]))) == 2
    with pytest.raises(BadInput, match="no patch that is trained"):
        train(recipe)
    with pytest.raises(BadInput, match="Train first"):
        list(generate(with_keys(runs["lora"], output=str(tmp_path / "none")), [ASK]))


@pytest.mark.parametrize("verb", [lambda made: list(generate(made, [ASK])), evaluate])
def test_other_patches_do_not_make_an_interrupted_run_its_base(verb, runs, tmp_path):
    """`generate RUN patches=[...]` has no patch that is trained, but the run's own recipe has."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(Path(runs["lora"].output) / "recipe.yaml", folder)
    with pytest.raises(BadInput, match="Train first"):
        verb(with_keys(runs["lora"], patches=[STREAMING], output=str(folder)))


def test_what_a_recipe_that_trains_nothing_plans_and_exports(runs, call, tmp_path):
    recipe = with_keys(runs["lora"], patches=[STREAMING], output=str(tmp_path / "none"), budget={"fast": "20GiB"})
    made = recipe.plan()
    assert made.fits and made.trained == 0 and made.kinds["cache"] > 0 and "optimiser" not in made.kinds
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    code, out, _ = call("plan", tmp_path / "r.yaml")
    assert code == 0 and "nothing is trained" in out and "trained  " not in out
    assert call("plan", tmp_path / "r.yaml", "budget.fast=50MiB")[0] == 3
    with pytest.raises(BadInput, match="this machine has none"):
        with_keys(recipe, place={"fast": "cuda"}, budget=None).plan()
    for form in ("merged", "peft"):
        with pytest.raises(BadInput, match="changes no weight"):
            export(recipe, form)


def test_an_adapter_of_another_task_is_refused(runs):
    with pytest.raises(BadInput, match="trained for classification"):
        evaluate(with_keys(runs["lora"], model=runs["films"].model.name), adapter=f"{runs['films'].output}/adapter")


def test_a_cache_from_the_command_line(runs, call):
    folder, said = runs["lora"].output, ("-p", ASK, "--set", "max_new_tokens=6")
    plain, wide = call("generate", folder, *said), call("generate", folder, *said, "patches.cake.budget=1000")
    assert plain[:2] == wide[:2] and plain[0] == 0
    code, out, err = call("generate", folder, *said, "patches.cake.budget=3")
    assert code == 2 and "at least" in err and out == ""
    assert call("generate", folder, *said, "patches.cakes.budget=3")[0] == 2


def test_a_cache_gets_what_the_budget_leaves(runs):
    auto = {"cake": {"budget": "auto", "window": 4}}
    made, said = Inference(with_keys(runs["lora"], patches=[*runs["lora"].patches, auto]), say=lambda line: None), []
    made.say = said.append
    with made:
        lengths, new = [40, 30], 200_000
        assert made.replies(lengths, new) == 2, "without a budget, nothing is evicted"
        whole = made._planned(Work(1, 40, new))
        budget = whole.fast_peak_bytes - whole.kinds["cache"] // 2
        made.plan, made.recipe = None, with_keys(made.recipe, budget={"fast": budget})
        made.budget = session.Budget(fast=budget)
        assert made.replies(lengths, new) == 1
        assert any("KV cache of a text gets" in line for line in said)
        assert made.plan.fast_peak_bytes <= budget and made.plan.kinds["cache"] > whole.kinds["cache"] // 4
        assert made.cache().policy.budget != "auto"
        made.budget, made.recipe = session.Budget(fast=2**20), with_keys(made.recipe, budget={"fast": 2**20})
        with pytest.raises(DoesNotFit):
            made.replies(lengths, new)
