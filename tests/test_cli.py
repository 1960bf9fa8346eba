"""The command line: every mistake of a user is one clear message, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import trimtab
from helpers_load import tiny_llama
from helpers_run import make_world, tree, write_rows
from trimtab.artifacts import adapter
from trimtab.cost.overhead import Overhead
from trimtab.model.load import load_model
from world import flat

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def ran(world) -> Path:
    """A finished run; -> its recipe."""
    keys = tree(world, world / "ran", {"paca": {"r": 4}}, max_steps=3, save_strategy="steps", save_steps=3)
    keys["data"]["test"] = keys["data"]["train"]
    recipe = world / "ran.yaml"
    recipe.write_text(yaml.safe_dump(keys))
    trimtab.Recipe.load(recipe).train()
    return recipe


def written(path: Path, keys: dict | str) -> Path:
    path.write_text(keys if isinstance(keys, str) else yaml.safe_dump(keys))
    return path


def change(keys: dict, path: str, value: object) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        keys = keys[int(parent)] if isinstance(keys, list) else keys.setdefault(parent, {})
    keys[last] = value


WRONG = {  # what is wrong in the recipe -> what the message must say
    "top key": ({"modle": "x"}, ["modle", 'Did you mean "model"']),
    "model key": ({"model": {"name": "x", "precison": "nf4"}}, ["precison", 'Did you mean "precision"']),
    "data key": ({"data.trian": "x"}, ["trian", 'Did you mean "train"']),
    "place key": ({"place": {"fats": "cpu"}}, ["fats", 'Did you mean "fast"']),
    "engine key": ({"engine.fuse_ops": True}, ['"fuse_ops"', 'Did you mean "fused_ops"']),
    "renamed key": ({"engine.lean": True}, ['"lean": there is no such key', "fused_ops"]),
    "patch": ({"patches": [{"pacca": {}}]}, ["pacca", 'Did you mean "paca"']),
    "patch field": ({"patches": [{"paca": {"rnak": 4, "selecton": "block"}}]}, ["rnak"]),
    "patch value": ({"patches": [{"paca": {"r": "four"}}]}, ["four"]),
    "patch choice": ({"patches": [{"paca": {"form": "sideways"}}]}, ["sideways"]),
    "patch not keys": ({"patches": [{"paca": 5}]}, ["paca"]),
    "patch bare number": ({"patches": [7]}, ["7"]),
    "patches not a list": ({"patches": {"paca": {}}}, ["patches"]),
    "no patch": ({"patches": []}, ["no patch"]),
    "patch r": ({"patches": [{"paca": {"r": 0}}]}, ["r: 0"]),
    "targets": ({"patches": [{"lora": {"targets": "nose_proj"}}]}, ["nose_proj", "q_proj"]),
    "full and lora": ({"patches": [{"full": {}}, {"lora": {}}]}, ["full", "lora"]),
    "training key": ({"training.max_step": 3}, ["max_step", 'Did you mean "max_steps"']),
    "training number key": ({"training": {5: 3}}, ["5"]),
    "training value": ({"training.lr_scheduler_type": "wavy"}, ["wavy"]),
    "training text": ({"training.max_steps": "many"}, ["many"]),
    "training rate": ({"training.learning_rate": "fast"}, ["fast"]),
    "training save": ({"training.save_strategy": "sometimes"}, ["sometimes"]),
    "training output": ({"training.output_dir": "elsewhere"}, ["output"]),
    "training list": ({"training": [1]}, ["training"]),
    "optimizer": ({"training.optim": "adamz"}, ["adamz"]),
    "objective": ({"objective": "causal"}, ["causal", 'Did you mean "causal_lm"']),
    "objective kind": ({"objective": 5}, ["objective"]),
    "objective twice": ({"objective": {"causal_lm": {}, "classification": {}}}, ["objective"]),
    "stepper": ({"stepper": "backpropp"}, ["backpropp", 'Did you mean "backprop"']),
    "resume text": ({"resume": "maybe"}, ["resume"]),
    "output number": ({"output": 5}, ["output"]),
    "device": ({"place": {"fast": "gpuu"}}, ["gpuu"]),
    "column": ({"data.columns": {"question": "ask"}}, ["ask"]),
    "column name": ({"data.columns": {"qestion": "ask"}}, ["qestion", 'Did you mean "question"']),
    "data file": ({"data.train": "nowhere.jsonl"}, ["nowhere.jsonl"]),
    "no data": ({"data": {}}, ["data.train"]),
    "model folder": ({"model": "./nowhere"}, ["nowhere"]),
    "too long": ({"training.max_length": 12}, ["12 tokens", "longest", "data.too_long=cut"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_refused(case, call, world, tmp_path):
    changes, words = WRONG[case]
    keys = tree(world, tmp_path / "out", {"paca": {"r": 4}}, max_steps=1)
    for path, value in changes.items():
        change(keys, path, value)
    refused(call("train", written(tmp_path / "r.yaml", keys)), words)
    assert not (tmp_path / "out").exists()


def refused(done: tuple[int, str, str], words: list[str], code: int = 2) -> None:
    """One message of three parts, on standard error, and no traceback."""
    got, out, err = done
    assert got == code, err
    assert "Traceback" not in err and out == ""
    message = [line for line in err.splitlines() if line.startswith("trimtab: ")]
    assert len(message) == 1 and err.strip().splitlines()[-1] == message[0], err
    assert message[0].count(". ") >= 1 and ": " in message[0][9:], "asked: have. do."
    for word in words:
        assert word in message[0], message[0]


@pytest.mark.parametrize("name,content,words", [
    ("json", '{"question": "a", "answer": "b"}\n{"question": oops}\n', ["bad.jsonl", "2"]),
    ("empty", "", ["bad.jsonl"]),
    ("blank", "\n\n", ["bad.jsonl"]),
    ("list", "[1, 2]\n", ["bad.jsonl"]),
    ("null", '{"question": null, "answer": "b"}\n', ["bad.jsonl"]),
])  # fmt: skip
def test_wrong_data_is_refused(name, content, words, call, world, tmp_path):
    (tmp_path / "bad.jsonl").write_text(content)
    keys = tree(world, tmp_path / "out", {"paca": {"r": 4}}, max_steps=1)
    keys["data"] = {"train": "bad.jsonl"}  # looked for beside the recipe
    refused(call("train", written(tmp_path / "r.yaml", keys)), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text,words", [
    ("model: [", ["r.yaml", "line"]), ("", ["r.yaml", "no keys"]), ("- a\n- b\n", ["r.yaml"]), ("5", ["r.yaml"]),
    ("model: x\n\tdata: y\n", ["r.yaml", "line 2"]), ("model: !!python/object:os.system x", ["r.yaml"]),
])  # fmt: skip
def test_bad_yaml_is_refused(text, words, call, tmp_path):
    refused(call("train", written(tmp_path / "r.yaml", text)), words)


def test_a_missing_recipe_and_a_binary_one(call, tmp_path):
    written(tmp_path / "other.yaml", "model: x")
    refused(call("train", tmp_path / "recipe.yaml"), ["no such file", "other.yaml"])
    (tmp_path / "binary.yaml").write_bytes(bytes(range(128, 256)))
    refused(call("train", tmp_path / "binary.yaml"), ["binary.yaml"])
    refused(call("train", tmp_path), [str(tmp_path)])


@pytest.mark.parametrize("order,words", [
    ("max_steps", ["max_steps", "key=value"]), ("=3", ["key=value"]), ("training=3", ["training"]),
    ("training.max_step=3", ["max_step", "max_steps"]), ("patches.lora.r=3", ["lora"]), ("patches.paca=3", ["patches"]),
    ("patches.paca.q=3", ["q"]), ("output.x=3", ["output"]), ("data.trian=x", ["trian", "train"]),
    ("patches.paca.r=[", ["["]), ("model.precision=nf5", ["nf5", "nf4"]),
])  # fmt: skip
def test_a_bad_override_is_refused(order, words, call, world, tmp_path):
    recipe = written(tmp_path / "r.yaml", tree(world, tmp_path / "out", {"paca": {"r": 4}}, max_steps=1))
    refused(call("train", recipe, order), words)
    assert not (tmp_path / "out").exists()


def test_a_model_folder_without_config(call, world, tmp_path):
    (tmp_path / "model").mkdir()
    keys = tree(world, tmp_path / "out", {"paca": {"r": 4}}) | {"model": str(tmp_path / "model")}
    refused(call("train", written(tmp_path / "r.yaml", keys)), ["config.json"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("trian", "x"), ("train", "x", "--loud"), ("train",), ("export", "x", "--to")])
def test_unknown_verbs_and_options(arguments, call):
    code, out, err = call(*arguments)
    assert code == 2 and "Traceback" not in err and err.strip()


def test_a_folder_that_holds_a_run(call, ran, world):
    before = {p: p.stat().st_mtime_ns for p in (world / "ran").rglob("*")}
    refused(call("train", ran), ["already has a run", "resume=true", "overwrite=true"])
    for changed in ("patches.paca.r=8", "training.learning_rate=0.5", "training.seed=3", "objective=classification",
                    "model.precision=bf16", "data.limit=4"):  # fmt: skip
        refused(call("train", ran, "resume=true", changed), ["resume", "started with"])
    assert before == {p: p.stat().st_mtime_ns for p in (world / "ran").rglob("*")}


def test_an_output_that_cannot_be(call, ran, world, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(call("train", ran, f"output={tmp_path / 'file'}"), ["is a file"])
    refused(call("train", ran, f"output={tmp_path / 'file' / 'deeper'}"), ["is a file"])
    assert call("train", ran, "output=/proc/nowhere")[0] == 2


def test_resume_goes_on_and_overwrite_begins_anew(call, ran, world, tmp_path):
    keys = yaml.safe_load(ran.read_text()) | {"output": str(tmp_path / "out")}
    recipe = written(tmp_path / "r.yaml", keys)
    code, out, err = call("train", recipe, "resume=true", "--json", "--quiet")  # nothing to go on with: it begins
    assert code == 0 and json.loads(out)["steps"] == 3
    assert call("train", recipe, "resume=true", "training.max_steps=5", "-q")[0] == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["steps"] == 5
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert call("train", recipe, "overwrite=true", "training.save_strategy=no", "-q")[0] == 0
    assert not list((tmp_path / "out").glob("checkpoint-*")) and (tmp_path / "out" / "mine.txt").exists()
    assert "finished after 3 steps" in call("train", recipe, "resume=true")[2]
    refused(call("train", recipe, "resume=true", "training.max_steps=5"), ["no complete checkpoint"])


# --- the other verbs -------------------------------------------------------------------------------------------------


def test_eval(call, ran):
    code, out, _ = call("eval", ran, "--json")
    found = json.loads(out)
    assert code == 0 and found["rows"] == 15 and {"loss", "perplexity", "exact_match"} <= found["metrics"].keys()
    base = json.loads(call("eval", ran, "--json", "--base", "--limit", 4)[1])
    assert base["rows"] == 4 and base["metrics"]["loss"] > found["metrics"]["loss"]
    assert call("eval", ran)[0] == 0
    refused(call("eval", ran, "data.test=null"), ["data.test"])
    refused(call("eval", ran, "output=nowhere"), ["nowhere"])
    refused(call("eval", ran, "--adapter", "nowhere"), ["nowhere"])


def test_an_adapter_of_another_base(call, ran, tmp_path):
    other = tiny_llama(tmp_path / "other", seed=1, dtype=torch.float32)
    for verb in (("eval", ran), ("generate", ran, "-p", "x"), ("export", ran, "--to", "merged")):
        refused(call(*verb, f"model={other}"), ["hash", "another"])


def test_generate(call, ran):
    code, out, _ = call("generate", ran, "-p", "paris is in ?", "-p", "spain", "--set", "max_new_tokens=3", "--json")
    assert code == 0 and [row["prompt"] for row in json.loads(out)] == ["paris is in ?", "spain"]
    assert call("generate", ran, "-p", "paris", "--set", "temperature=0.7", "--set", "max_new_tokens=2")[0] == 0
    refused(call("generate", ran, "-p", "x", "--set", "temprature=1"), ["temprature", "temperature"])
    refused(call("generate", ran, "-p", "x", "--set", "temperature"), ["key=value"])


def loaded(ran: Path):
    from trimtab.inference.load_run import load_run

    run = load_run(trimtab.Recipe.load(ran))
    model, tokenizer = run.model, run.tokenizer
    ids = torch.tensor([tokenizer("paris is in the country of france")["input_ids"]])
    with torch.no_grad():
        return ids, model(input_ids=ids).logits


def test_export_to_peft_and_merged(call, ran, world, tmp_path):
    from peft import PeftModel

    ids, wanted = loaded(ran)
    code, out, _ = call("export", ran, "--to", "peft", "--out", tmp_path / "peft")
    assert code == 0 and out.strip() == str(tmp_path / "peft")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "llama"), tmp_path / "peft")
    assert call("export", ran, "--to", "merged", "--out", tmp_path / "merged")[0] == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=ids).logits, wanted, atol=1e-5)
        assert torch.allclose(plain(input_ids=ids).logits, wanted, atol=1e-5)
    assert str(world) not in (tmp_path / "merged" / "config.json").read_text()
    refused(call("export", ran, "--to", "merged", "--out", tmp_path / "merged"), ["exists already"])
    assert call("export", ran, "--to", "merged", "--out", tmp_path / "merged", "--overwrite")[0] == 0
    refused(call("export", ran, "--to", "mergd"), ["mergd", "merged"])


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_export_from_a_quantised_base(precision, call, world, tmp_path):
    tiny_llama(tmp_path / "llama")
    keys = tree(world, tmp_path / "out", {"paca": {"r": 4}}, max_steps=3)
    keys["model"] = {"name": str(tmp_path / "llama"), "precision": precision}
    recipe = written(tmp_path / "r.yaml", keys)
    assert call("train", recipe, "-q")[0] == 0
    ids, wanted = loaded(recipe)
    assert call("export", recipe, "--to", "merged")[0] == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert not hasattr(plain.config, "quantization_config")
    with torch.no_grad():
        got = plain(input_ids=ids).logits.float()
    assert (got - wanted.float()).abs().max() < 0.05 * wanted.float().abs().max()


def test_what_depends_on_its_input_is_not_exported(call, world, tmp_path):
    recipe = written(tmp_path / "r.yaml", tree(world, tmp_path / "out", {"parallel_adapter": {"r": 8}}, max_steps=1))
    assert call("train", recipe, "-q")[0] == 0
    for form in ("peft", "merged"):
        refused(call("export", recipe, "--to", form), ["ParallelAdapter"])
        assert not (tmp_path / "out" / form).exists() and not list((tmp_path / "out").glob(".*"))


def test_two_patches_in_one_adapter(call, world, tmp_path):
    keys = tree(world, tmp_path / "out", {"paca": {"r": 4, "targets": "q_proj"}}, max_steps=2)
    keys["patches"].append({"lora": {"r": 4, "targets": "down_proj"}})
    recipe = written(tmp_path / "r.yaml", keys)
    assert call("train", recipe, "-q")[0] == 0
    ids, wanted = loaded(recipe)
    model, _ = load_model(str(world / "llama"))
    adapter.load_adapter(model, tmp_path / "out" / "adapter")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wanted)
    refused(call("export", recipe, "--to", "peft"), ["several parts"])


def test_a_classifier_does_not_talk(call, world, tmp_path):
    from helpers_run import films

    recipe = written(tmp_path / "r.yaml", films(world, tmp_path / "out", {"paca": {"r": 4}}, max_steps=1))
    assert call("train", recipe, "-q")[0] == 0
    refused(call("generate", recipe, "-p", "x"), ["classifier"])


def test_doctor_and_version(call, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setattr("trimtab.planning.calibrate.subprocess_call", lambda _, machine: asdict(flat(machine=machine)))
    held = Overhead(process=400 * 2**20, measured=True)
    monkeypatch.setattr("trimtab.planning.calibrate.measure_overhead", lambda *_: held)
    assert call("version")[1].strip() == trimtab.__version__
    found = json.loads(call("doctor", "--json")[1])
    assert found["gflops"]["float32"] > 0 and found["machine"]["memory_bytes"] > 0
    assert found["process"]["process_bytes"] == held.process
    assert "was busy" not in call("doctor")[1]
    monkeypatch.setattr(
        "trimtab.planning.calibrate.measure_overhead",
        lambda *_: Overhead(process=400 * 2**20, efficiency=6.2, measured=True),
    )
    assert "The machine was busy" in call("doctor", "--fresh")[1]
    monkeypatch.setattr("trimtab.planning.calibrate.measure_overhead", lambda *_: Overhead())
    assert call("doctor")[0] == 0, "both are kept"
    code, out, _ = call("doctor", "--fresh")
    assert code == 0 and "A small training failed" in out


def test_quiet_says_nothing_and_plain_lines_elsewhere(call, world, tmp_path):
    recipe = written(tmp_path / "r.yaml", tree(world, tmp_path / "out", {"paca": {"r": 4}}, max_steps=2))
    code, out, err = call("train", recipe)
    assert code == 0 and out == "" and "step 2/2" in err and "\x1b" not in err and "Warning" not in err
    code, out, err = call("train", recipe, "overwrite=true", "--quiet")
    assert (code, out, err) == (0, "", "")


def test_a_long_row_is_cut_and_said(call, world, tmp_path):
    long = [{"question": "paris " * n, "answer": "france"} for n in (3, 30)]
    keys = tree(world, tmp_path / "out", {"paca": {"r": 4}}, max_steps=1, max_length=16)
    keys["data"] = {"train": str(write_rows(tmp_path / "long.jsonl", long)), "too_long": "drop"}
    code, _, err = call("train", written(tmp_path / "r.yaml", keys))
    assert code == 0 and "1 train rows are longer than max_length 16: 0 cut, 1 left out" in err


def test_help_is_quick_and_loads_no_torch():
    source = str(Path(trimtab.__file__).parents[1])
    code = (
        "import sys; sys.argv = ['trimtab', '--help']\n"
        "from trimtab.cli import app\n"
        "try: app()\nexcept SystemExit as done: assert not done.code\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False False") and "train" in done.stdout
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "trimtab.cli", "train", "--help"], env=environment, check=True,
                   capture_output=True)  # fmt: skip
    assert time.monotonic() - began < 10  # under 1 s on an idle machine; no test depends on timing
