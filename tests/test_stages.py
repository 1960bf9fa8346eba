"""`stages:` of a recipe: each stage is an ordinary run from the files of the one before, and the whole one run."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers_run import PLACES, left, make_stages_world, metrics, run, same, tree, write_rows
from trimtab.data.continual import figures, interval
from trimtab.errors import BadInput, Stopped
from trimtab.inference.evaluate import scores
from trimtab.planning.inference import plan_largest, plan_recipe
from trimtab.recipe import Recipe
from trimtab.report.report import report
from trimtab.training.stages import lines

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_stages_world(tmp_path_factory.mktemp("world"))


def keys(world: Path, output: Path, *carries: str, patch: dict | None = None, **training: Any) -> dict[str, Any]:
    """A recipe of a stage per item of `carries`."""
    made = tree(world, output, patch or {"lora": {"r": 4, "dropout": 0.2}}, max_steps=STEPS, **training)
    made["data"] = {"reply_tokens": 4}
    made["stages"] = [
        {"name": name, "data": {"train": str(world / f"{name}.jsonl"), "test": str(world / f"{name}_test.jsonl")},
         "carry": carry}
        for name, carry in zip(("one", "two", "three"), carries, strict=False)
    ]  # fmt: skip
    return made


def stage(made: dict, index: int, **changes: Any) -> None:
    made["stages"][index] |= changes


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def ran(world, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("ran") / "run"
    return output, run(keys(world, output, "fresh", "adapter", "full"))


def test_one_run_json_and_one_log(ran):
    output, result = ran
    assert json.loads((output / "run.json").read_text()) == json.loads(json.dumps(result, default=str))
    assert [stage["name"] for stage in result["stages"]] == ["one", "two", "three"]
    assert result["steps"] == 3 * STEPS and result["tokens"] == sum(stage["tokens"] for stage in result["stages"])
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == list(range(1, 3 * STEPS + 1))
    assert [row["stage"] for row in losses] == ["one"] * STEPS + ["two"] * STEPS + ["three"] * STEPS
    assert losses[-1]["num_tokens"] == result["tokens"]
    last = output / "stages/3-three"
    assert all(torch.equal(weights(output)[key], value) for key, value in weights(last).items())
    assert (output / "memory.jsonl").is_file()


def test_the_task_matrix_is_that_of_eval(ran, world):
    """Each row's figures are what `trimtab eval` says of the stage's adapter on that test set."""
    output, result = ran
    tasks = result["tasks"]
    recipe = Recipe.load(output)
    for index, stage in enumerate(recipe.stage_recipes()):
        found = dataclasses.replace(stage, output=str(output)).evaluate(adapter=output / "stages/2-two/adapter")
        for metric in ("loss", "exact_match", "contains"):
            assert tasks["matrix"][metric][2][index] == pytest.approx(found["metrics"][metric], rel=1e-4)
    assert len(tasks["matrix"]["loss"]) == 4 and tasks["metric"] == "exact_match"
    base = recipe.stage_recipes()[0].evaluate(base_only=True)
    assert tasks["matrix"]["loss"][0][0] == pytest.approx(base["metrics"]["loss"], rel=1e-4)
    change = tasks["change"]["three"]["loss"]
    assert change["low"] <= change["change"] <= change["high"] < 0, "training helps on the task that it is for"


def step_of(folder: Path) -> set[float]:
    """The optimizer's count of steps in a stage's last checkpoint."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    return {float(slot["step"]) for slot in state.values()}


def test_what_is_carried(world, ran, tmp_path):
    """`adapter` starts where the stage before ended; `full` with its optimizer too; `fresh` with neither."""
    output, _ = ran
    made = keys(world, tmp_path / "run", "fresh", "full", "full")
    for index in (1, 2):
        stage(made, index, training={"learning_rate": 0.0, "max_steps": 1, "save_strategy": "steps", "save_steps": 1})
    run(made)
    folders = sorted((tmp_path / "run/stages").glob("*-*"))
    first, *others = (weights(folder) for folder in folders)
    assert all(torch.equal(value, other[key]) for key, value in first.items() for other in others)
    assert [step_of(folder) for folder in folders] == [{STEPS}, {STEPS + 1}, {STEPS + 2}]
    assert all(torch.equal(value, weights(output / "stages/1-one")[key]) for key, value in first.items())
    assert step_of(output / "stages/2-two") == {STEPS}, "a new optimizer"
    assert not list((output / "stages/1-one").glob("checkpoint-*")), "only a stage that `full` follows needs one"


@pytest.mark.parametrize("seed", [1])
def test_resume_is_exact_across_stages(world, tmp_path, minutes, seed):
    last = {"save_strategy": "steps", "save_steps": STEPS}
    run(keys(world, tmp_path / "whole", "fresh", "full", **last))
    made, draw, stopped = keys(world, tmp_path / "parts", "fresh", "full", **last), random.Random(seed), 0
    for attempt in range(20):
        minutes.clear()
        made["training"]["max_minutes"] = draw.choice((2.5, 3.5))
        try:
            run(made, resume=attempt > 0)
            break
        except Stopped as error:
            assert "stage " in str(error)
            stopped += 1
    assert stopped >= 2
    for name in ("1-one", "2-two"):
        same(left(tmp_path / "whole/stages" / name), left(tmp_path / "parts/stages" / name))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    one, two = (json.loads((tmp_path / name / "run.json").read_text())["tasks"] for name in ("whole", "parts"))
    assert one["matrix"] == two["matrix"] and one["change"] == two["change"]
    again = run(made, resume=True)
    assert again["steps"] == 2 * STEPS


CARRIED = [{"paca": {"r": 4}}, {"full": {}}, {"meft": {"r": 64, "k": 16, "scale": 1.0}}]


@pytest.mark.parametrize("patch", CARRIED, ids=lambda patch: next(iter(patch)))
def test_adapters_are_carried(world, tmp_path, patch):
    """A stage without a learning rate leaves the model as the stage before it left it: the same losses."""
    made = keys(world, tmp_path / "run", "fresh", "adapter", "full", patch=patch)
    for stage in made["stages"][1:]:
        stage["training"] = {"learning_rate": 0.0, "max_steps": 2}
    found = run(made)["tasks"]["matrix"]["loss"]
    assert found[1] == found[2] == found[3] != found[0]


def test_a_classifier(world, tmp_path):
    made = keys(world, tmp_path / "run", "fresh", "adapter")
    made |= {"model": str(world / "bert"), "objective": "classification", "data": {}}
    for stage in made["stages"]:
        stage["data"] = {"train": str(world / "films.jsonl"), "test": str(world / "films.jsonl")}
    tasks = run(made)["tasks"]
    assert tasks["metric"] == "accuracy" and len(tasks["matrix"]["accuracy"]) == 3
    found = Recipe.load(tmp_path / "run", final=True).evaluate()["metrics"]
    assert found["accuracy"] == tasks["matrix"]["accuracy"][2][1]


def test_the_plan_is_of_the_largest_stage(world, tmp_path):
    made = keys(world, tmp_path / "run", "fresh", "adapter")
    made["stages"][1]["training"] = {"per_device_train_batch_size": 8}
    recipe = Recipe.from_dict(made)
    plan, largest = plan_largest(recipe)
    each = [plan_recipe(stage) for stage in recipe.stage_recipes()]
    assert largest == recipe.stage_recipes()[1] and plan.rows == 8
    assert plan.live_peak_bytes == each[1].live_peak_bytes > each[0].live_peak_bytes
    assert any("stage one" in note for note in plan.notes)
    assert recipe.plan().rows == 8


def test_the_plan_of_a_stage_sees_the_rows_it_rehearses(world, tmp_path):
    long = [{"question": "which country is the good paris in ? " * 4, "answer": "france"}] * 8
    write_rows(tmp_path / "long.jsonl", long)
    made = keys(world, tmp_path / "run", "fresh", "adapter") | {"rehearsal": {"budget": 3000, "mix": 0.5}}
    made["stages"][0]["data"]["train"] = str(tmp_path / "long.jsonl")
    recipe = Recipe.from_dict(made)
    first, second = (plan_recipe(stage) for stage in recipe.stage_recipes())
    assert second.tokens < first.tokens
    plan, largest = plan_largest(dataclasses.replace(recipe, stages=recipe.stages))
    assert plan.tokens == first.tokens and plan.process >= first.process
    found = run(made)["stages"][1]
    assert found["predicted"]["batch"]["tokens"] == first.tokens
    logits = dataclasses.replace(recipe, rehearsal=dataclasses.replace(recipe.rehearsal, keep="logits", top=32))
    soft = plan_recipe(logits.stage_recipes()[1])
    assert soft.live_peak_bytes - second.live_peak_bytes >= second.rows * second.tokens * 32 * 12
    made["rehearsal"], made["output"] = (
        {"budget": 3000, "mix": 0.5, "keep": "logits", "top": 32},
        str(tmp_path / "soft"),
    )
    found = run(made)["stages"][1]
    assert found["predicted"]["live_peak_bytes"] == pytest.approx(found["measured"]["live_peak_bytes"], rel=0.02)


def test_neutral_text(world, tmp_path):
    write_rows(tmp_path / "text.jsonl", [{"text": f"the country of {place} is {answer}"} for place, answer in PLACES])
    made = keys(world, tmp_path / "run", "fresh", "adapter") | {"neutral": str(tmp_path / "text.jsonl")}
    found = run(made)["tasks"]
    general = found["general"]
    assert general["file"] == "text.jsonl" and general["rows"] == 5 and len(general["perplexity"]) == 3
    text = dataclasses.replace(Recipe.load(tmp_path / "run", final=True), neutral=None)
    data = dataclasses.replace(text.data, train=str(tmp_path / "text.jsonl"), test=str(tmp_path / "text.jsonl"))
    text = dataclasses.replace(text, data=data)
    assert text.evaluate()["metrics"]["perplexity"] == pytest.approx(general["perplexity"][2], rel=1e-4)
    base = text.evaluate(base_only=True)["metrics"]
    assert base["perplexity"] == pytest.approx(general["perplexity"][0], rel=1e-4)
    change = general["change_of_loss"]
    assert change["low"] <= change["change"] <= change["high"]
    assert "perplexity on text.jsonl" in report([tmp_path / "run"]).read_text()
    assert lines(found)[-1].startswith("perplexity on text.jsonl: base ") and "general" not in keys(world, tmp_path)
    for change, words in [({"neutral": "nowhere.jsonl"}, "no such file"),
                          ({"neutral": made["neutral"], "objective": "classification"}, "no perplexity")]:  # fmt: skip
        with pytest.raises(BadInput, match=words):
            run(keys(world, tmp_path / "bad", "fresh", "adapter") | change)


@pytest.mark.parametrize(
    "patch", [{"diff_pruning": {"density": 0.02, "candidates": 0.2}}, {"senszoq": {}}], ids=["diff", "senszoq"]
)
def test_a_diff_per_task_forgets_nothing(world, tmp_path, patch):
    """With `carry: fresh` a task's own diff gives after all stages, and again from its files, what it gave before."""
    made = keys(world, tmp_path / "run", "fresh", "fresh", "fresh", patch=patch, seed=1)
    found = run(made)["tasks"]
    recipe = Recipe.load(tmp_path / "run")
    for index, (spec, one) in enumerate(zip(recipe.stages, recipe.stage_recipes(), strict=True)):
        at_once = {metric: rows[index + 1][index] for metric, rows in found["matrix"].items()}
        assert {metric: row[index] for metric, row in found["switched"]["row"].items()} == at_once
        adapter = tmp_path / f"run/stages/{index + 1}-{spec.name}/adapter"
        again = scores(recipe.final, [one], adapter=adapter)[0]["metrics"]
        assert {metric: again[metric] for metric in at_once} == at_once, "bit for bit"
    row = found["switched"]["row"]["loss"]
    assert found["switched"]["acc"]["loss"] == pytest.approx(sum(row) / 3)
    assert any(line.startswith("own adapters") for line in lines(found))
    heat = report([tmp_path / "run"]).read_text()
    assert "each with its own adapter" in heat


def test_adapters_of_chains_are_those_of_their_last_stage(world, tmp_path):
    found = run(keys(world, tmp_path / "run", "fresh", "adapter", "fresh"))["tasks"]
    a = found["matrix"]["loss"]
    assert found["switched"]["row"]["loss"] == [a[2][0], a[2][1], a[3][2]]
    assert "switched" not in run(keys(world, tmp_path / "one", "fresh", "adapter"))["tasks"]


BAD = {
    "two of one name": (lambda m: stage(m, 1, name="one"), "stages: one: two stages have this name"),
    "no test": (lambda m: m["stages"][1]["data"].pop("test"), "stages: two: it has no data.test"),
    "no rows": (lambda m: m["stages"][1]["data"].pop("train"), "stages: two: it has no data.train"),
    "missing adapter": (lambda m: stage(m, 1, adapter="nowhere"), "there is no adapter in nowhere"),
    "full first": (lambda m: stage(m, 0, carry="full"), "carry: full: no stage comes before it"),
    "carry": (lambda m: stage(m, 1, carry="all"), "there is no such choice"),
    "key": (lambda m: stage(m, 1, date="x"), "Did you mean"),
    "data key": (lambda m: m["stages"][1]["data"].update(trian="x"), 'data: "trian": there is no such key'),
    "a folder's name": (lambda m: stage(m, 1, name="a/b"), "name of a folder"),
    "missing file": (lambda m: m["stages"][1]["data"].update(train="x.jsonl"), "no such file"),
    "limit": (lambda m: stage(m, 1, training={"max_minutes": 0}), "max_minutes: 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_stages_are_refused_before_the_first(world, tmp_path, case):
    made = keys(world, tmp_path / "run", "fresh", "adapter")
    change, words = BAD[case]
    change(made)
    with pytest.raises(BadInput, match=words):
        run(made)
    assert not (tmp_path / "run").exists()


def test_changed_stages_are_refused_on_resume(world, ran):
    output, _ = ran
    for change, words in [
        (lambda m: m["stages"].pop(), "stages: .'one', 'two'.: the run was started with .'one', 'two', 'three'."),
        (lambda m: stage(m, 1, carry="full"), "stages: two: carry: full: the run was started with adapter"),
        (lambda m: stage(m, 1, training={"learning_rate": 0.5}), "with training"),
        (lambda m: stage(m, 0, training={"max_steps": 9}), "stage one further: .*2-two has started from it"),
    ]:  # fmt: skip
        made = keys(world, output, "fresh", "adapter", "full")
        change(made)
        with pytest.raises(BadInput, match=words):
            run(made, resume=True)
    with pytest.raises(BadInput, match="already has a run"):
        run(keys(world, output, "fresh", "adapter", "full"))


def test_overwrite_and_a_named_adapter(world, ran, tmp_path):
    output, _ = ran
    made = keys(world, tmp_path / "run", "adapter")
    stage(made, 0, adapter=str(output / "adapter"), training={"learning_rate": 0.0, "max_steps": 1})
    run(made)
    assert all(torch.equal(weights(output)[key], value) for key, value in weights(tmp_path / "run").items())
    run(keys(world, tmp_path / "run", "fresh", "adapter"), overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run/stages").glob("*-*")) == ["1-one", "2-two"]
    made = keys(world, tmp_path / "other", "adapter", patch={"paca": {"r": 4}})
    stage(made, 0, adapter=str(output / "adapter"))
    with pytest.raises(BadInput, match="it has LoRA, and the recipe PaCA"):
        run(made)


def test_figures_of_a_matrix():
    """By hand: after stage 1, 2 and 3 of three tasks; row 0 is the base."""
    a = [[0.1, 0.2, 0.3], [0.9, 0.25, 0.3], [0.7, 0.8, 0.5], [0.6, 0.9, 0.7]]
    found = figures(a, "exact_match")
    assert found["acc"] == pytest.approx((0.6 + 0.9 + 0.7) / 3)
    assert found["bwt"] == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.6) + (0.8 - 0.9)) / 2)
    assert found["fwt"] == pytest.approx(((0.25 - 0.2) + (0.5 - 0.3)) / 2)
    lower = figures([[-x for x in row] for row in a], "loss")
    assert {key: value for key, value in lower.items() if key != "acc"} == pytest.approx(
        {key: value for key, value in found.items() if key != "acc"})  # fmt: skip
    assert figures([[0.1], [0.4]], "exact_match") == {"acc": 0.4}


def test_the_interval_holds_the_change_as_often_as_it_says():
    draw = random.Random(0)
    held = 0
    for trial in range(200):
        before = [draw.gauss(0, 1) for _ in range(40)]
        after = [x + draw.gauss(0.5, 1) for x in before]
        found = interval(before, after, seed=trial)
        held += found["low"] <= 0.5 <= found["high"]
    assert 176 <= held <= 200  # 95 % of 200 within 4 standard deviations


def test_the_report_shows_tasks_and_stages(ran):
    output, result = ran
    text = report([output]).read_text()
    assert text.index("<h2>Tasks</h2>") < text.index("<h2>Loss and speed</h2>")
    figures_ = json.loads(text.split('id="figures">')[1].split("</script>")[0])
    (heat,) = (f for f in figures_.values() if f["data"][0]["type"] == "heatmap")
    assert heat["data"][0]["z"] == result["tasks"]["matrix"]["exact_match"]
    assert heat["data"][0]["y"] == ["base", "after one", "after two", "after three"]
    (loss,) = (f for f in figures_.values() if f["layout"]["yaxis"].get("title", {}).get("text") == "loss")
    assert [shape["x0"] for shape in loss["layout"]["shapes"]] == [STEPS + 0.5, 2 * STEPS + 0.5]
    assert [note["text"] for note in loss["layout"]["annotations"]] == ["one", "two", "three"]
    assert f"{result['tasks']['figures']['loss']['forgetting']:+.4f}" in text
    change = result["tasks"]["change"]["two"]["loss"]
    assert f"{change['low']:+.4f} to {change['high']:+.4f}" in text


def test_baselines(world, tmp_path):
    made = keys(world, tmp_path / "run", "fresh", "adapter") | {"rehearsal": {"budget": 300, "mix": 0.5}}
    recipe = Recipe.from_dict(made)
    found = recipe.train(baselines=["sequential", "joint", "frozen"])
    held = found["baselines"]
    assert json.loads((tmp_path / "run/run.json").read_text())["baselines"] == json.loads(json.dumps(held))
    assert held["frozen"]["row"]["loss"] == found["tasks"]["matrix"]["loss"][0]
    lone = run(keys(world, tmp_path / "lone", "fresh", "adapter"))["tasks"]
    assert held["sequential"]["row"]["loss"] == lone["matrix"]["loss"][-1]
    assert held["sequential"]["figures"] == lone["figures"]
    joint = Recipe.load(tmp_path / "run/baselines/joint")
    assert len(joint.data.train) == 2 and joint.training["max_steps"] == found["steps"]
    assert held["joint"]["gap"]["loss"] == pytest.approx(
        sum(held["joint"]["row"]["loss"]) / 2 - found["tasks"]["figures"]["loss"]["acc"])  # fmt: skip
    text = report([tmp_path / "run"]).read_text()
    assert "joint (baseline)" in text and "loss, sequential" in text
    again = dataclasses.replace(recipe, resume=True).train(baselines=["joint"])
    assert again["baselines"]["joint"]["row"] == held["joint"]["row"]


@pytest.mark.parametrize("names,carries,words", [
    (["jiont"], ("fresh", "adapter"), 'Did you mean "joint"'), (["joint"], ("fresh",), "less than two stages"),
    (["joint"], (), "no stages"),
])  # fmt: skip
def test_bad_baselines(world, tmp_path, names, carries, words):
    with pytest.raises(BadInput, match=words):
        Recipe.from_dict(keys(world, tmp_path / "run", *carries)).train(baselines=names)
    assert not (tmp_path / "run").exists()


def test_joint_needs_rows_of_one_form(world, tmp_path):
    made = keys(world, tmp_path / "run", "fresh", "adapter")
    made["stages"][1]["data"]["chat"] = False
    with pytest.raises(BadInput, match="one and two as one set of rows"):
        Recipe.from_dict(made).train(baselines=["joint"])
