"""Recipe <-> YAML: short forms, overrides, round trips, and values that YAML reads strangely."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

import trimtab
from trimtab import methods
from trimtab.errors import BadInput, TrimtabError, nearest
from trimtab.recipe import Recipe, override
from trimtab.validation import read_yaml

WHOLE = """
model: smollm2-135m
data: {train: facts.jsonl.gz, test: facts_test.jsonl.gz, columns: {prompt: ask, completion: reply}}
budget: {fast: 2GiB, slow: 40GiB}
place: {fast: cpu, slow: disk, folder: scratch}
patches:
  - paca: {r: 8, targets: all-linear}
objective: causal_lm
stepper: backprop
training: {max_steps: 200, per_device_train_batch_size: 4, max_length: 256, learning_rate: 1.0e-4, packing: true}
output: runs/facts
"""


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "r.yaml").write_text(WHOLE)
    return tmp_path / "r.yaml"


def test_a_whole_recipe(file):
    recipe = Recipe.load(file)
    assert recipe.model.name == "smollm2-135m" and recipe.model.precision == "auto"
    assert recipe.place.slow == "disk" and recipe.place.device.type == "cpu"
    (patch,) = recipe.load_patches()
    assert patch == trimtab.PaCA(r=8)
    assert recipe.training_values()["max_steps"] == 200 and recipe.training_values()["seed"] == 0
    assert recipe.load_objective().head == "causal-lm" and type(recipe.load_stepper()).__name__ == "Backprop"


def test_what_is_written_is_what_is_read(file, tmp_path):
    recipe = Recipe.load(file, ["training.seed=7"])
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "recipe.yaml").write_text(recipe.to_yaml())
    again = Recipe.load(tmp_path / "again")  # the folder of a run
    assert again == dataclasses.replace(recipe, output=str(tmp_path / "again")), "a copied run is its own"
    assert again.hash == recipe.hash
    assert Recipe.load(tmp_path / "again", ["output=other"]).output == "other"


def test_the_hash_names_what_is_computed(file):
    recipe = Recipe.load(file)
    assert Recipe.load(file, ["output=elsewhere", "resume=true"]).hash == recipe.hash
    assert Recipe.load(file, ["training.max_steps=201"]).hash != recipe.hash


def test_python_takes_objects_paths_and_short_forms(tmp_path):
    one = Recipe(model="x", data=Path("rows.jsonl"), patches=[trimtab.PaCA(r=4)], output=tmp_path / "out")
    two = Recipe(model={"name": "x"}, data={"train": Path("rows.jsonl")}, patches=[{"paca": {"r": 4}}],
                 output=str(tmp_path / "out"))  # fmt: skip
    assert one.model == two.model and one.data == two.data and one.output == two.output
    assert one.load_patches() == two.load_patches()
    assert yaml.safe_load(one.to_yaml())["data"]["train"] == "rows.jsonl"
    assert Recipe(model="x", patches=["paca", {"lora": None}]).patches == [{"paca": {}}, {"lora": {}}]


@pytest.mark.parametrize("name", methods.names("patch"))
def test_each_patch_goes_through_yaml(name):
    made = methods.find(name)()
    recipe = Recipe(model="x", patches=[made])
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())).load_patches() == [made]


@pytest.mark.parametrize("order,path,value", [
    ("training.max_steps=20", ("training", "max_steps"), 20),
    ("training.learning_rate=1e-4", ("training", "learning_rate"), 1e-4),
    ("training.report_to=[tensorboard]", ("training", "report_to"), ["tensorboard"]),
    ("training.run_name=a=b", ("training", "run_name"), "a=b"),
    ("engine.fused_ops=false", ("engine", "fused_ops"), False),
    ("model.precision=nf4", ("model", "precision"), "nf4"),
    ("data.system=Be brief.", ("data", "system"), "Be brief."),
    ("patches.paca.r=4", ("patches", 0, "paca", "r"), 4),
    ("output=runs/x y", ("output",), "runs/x y"),
    ("data.test=null", ("data", "test"), None),
])  # fmt: skip
def test_overrides(order, path, value):
    tree = yaml.safe_load(WHOLE)
    override(tree, order)
    node = tree
    for key in path:
        node = node[key]
    assert node == value


@pytest.mark.parametrize("start", ["- paca", "- paca:", "- lora: {}\n- paca: {}"])
def test_overrides_of_short_patches(start):
    tree = {"patches": yaml.safe_load(start)}
    override(tree, "patches.paca.r=4")
    assert Recipe.from_dict({"model": "x", **tree}).patches[-1] == {"paca": {"r": 4}}


def test_overrides_of_short_data_and_place():
    tree = {"model": "x", "data": "rows.jsonl", "place": "cpu"}
    for order in ("data.limit=3", "place.slow=ram", "model.precision=bf16"):
        override(tree, order)
    recipe = Recipe.from_dict(tree)
    assert (recipe.data.train, recipe.data.limit) == ("rows.jsonl", 3)
    assert (recipe.place.fast, recipe.place.slow, recipe.model.precision) == ("cpu", "ram", "bf16")


def test_data_is_looked_for_beside_the_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("model: x\ndata: {train: [a.jsonl, b.jsonl], test: hub/name}\n")
    assert Recipe.load(tmp_path / "r.yaml").data.train == ["a.jsonl", "b.jsonl"], "not there: the working folder's"
    for name in "ab":
        (tmp_path / f"{name}.jsonl").touch()
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.data.train == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert recipe.data.test == "hub/name"


@pytest.mark.parametrize("text,read", [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("0.001", 1e-3), ("1", 1.0)])
def test_numbers_as_yaml_writes_them(text, read):
    recipe = Recipe.from_dict(yaml.safe_load(f"model: x\npatches: [lora: {{alpha: {text}}}]"))
    assert recipe.load_patches()[0].alpha == read


def test_the_training_block_is_of_the_librarys_kinds(tmp_path):
    from transformers import TrainingArguments
    from trl import SFTConfig

    from trimtab.engine.arguments import training_arguments

    text = "{learning_rate: 1e-4, save_strategy: no, eval_strategy: no, max_steps: '3', packing: false, optim: sgd}"
    recipe = Recipe(model="x", training=yaml.safe_load(text))
    args = training_arguments(recipe, SFTConfig, tmp_path / "out", True)
    assert args.learning_rate == 1e-4 and args.save_strategy == "no" and args.max_steps == 3
    assert not args.gradient_checkpointing and args.report_to == []
    plain = Recipe(model="x", training={"max_steps": 3})
    assert training_arguments(plain, TrainingArguments, tmp_path / "out", True).max_steps == 3
    assert not (tmp_path / "out").exists()


def test_a_bare_word_is_what_is_wanted_there(tmp_path):
    """Text where a text is wanted, else a boolean; also where the libraries declare no type."""
    from trl import SFTConfig

    from trimtab.engine.arguments import training_arguments

    recipe = Recipe.from_dict(read_yaml("""
model: x
data: {train: t.jsonl, columns: {prompt: on}, system: no, chat: off}
engine: {fused_ops: no, compile: on}
training: {run_name: yes, packing: no, lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-6},
           activation_checkpointing: yes, activation_checkpointing_kwargs: {use_reentrant: no}, save_strategy: no,
           eval_strategy: false}
""", "recipe"))  # fmt: skip
    assert recipe.data.columns == {"prompt": "on"} and recipe.data.system == "no" and recipe.data.chat is False
    assert recipe.engine.fused_ops is False and recipe.engine.compile is True
    args = training_arguments(recipe, SFTConfig, tmp_path / "out", True)
    assert args.run_name == "yes" and args.packing is False and args.save_strategy == args.eval_strategy == "no"
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert args.activation_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize("tree,message", [
    ({"modle": "x"}, 'recipe: "modle": there is no such key. Did you mean "model".'),
    ({"model": {"nam": "x"}}, 'model: "nam": there is no such key. Did you mean "name".'),
    ({"model": {"precision": "bf61", "name": "x"}},
     "model: precision: 'bf61': there is no such choice. Did you mean \"bf16\"."),
    ({"data": {"columns": {"promt": "q"}}},
     "data: columns: 'promt': there is no such choice. Did you mean \"prompt\"."),
    ({"data": {"limit": "many"}}, "data: limit: 'many': input should be a valid integer"),
    ({"data": {"limit": 0}}, "data: limit: 0: input should be greater than or equal to 1. Give a value of that kind."),
    ({"engine": {"fused_ops": ["nrom"]}}, "engine: fused_ops: 'nrom': there is no such choice. Did you mean \"norm\"."),
    ({"place": 5}, "place: 5: a block of keys is wanted there. Check the indentation."),
    ({"training": "x"}, "recipe: training: 'x': a block of keys is wanted there. Check the indentation."),
    ({"patches": {"paca": {}}}, "recipe: patches: {'paca': {}}: a list is wanted there."),
    ({"patches": ["pacca"]}, 'patch "pacca": there is no such patch. Did you mean "paca".'),
    ({"output": "a\0b"}, "recipe: output: 'a\\x00b': no file can have such a name."),
    ({"model": " "}, "model: ' ': it names no model."), ({"model": {}}, "model: name: {}: field required."),
    ({"resume": "perhaps"}, "recipe: resume: 'perhaps': input should be a valid boolean"),
])  # fmt: skip
def test_what_is_wrong_is_named(tree, message):
    for make in (Recipe.from_dict, lambda tree: Recipe(**tree)):
        with pytest.raises(BadInput) as caught:
            make(tree)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize("values,message", [
    ({"rr": 8}, 'patches: paca: "rr": there is no such key. Did you mean "r".'),
    ({"r": "x"}, "patches: paca: r: 'x': input should be a valid integer"),
    ({"target": "q_proj"}, 'patches: paca: "target": there is no such key. Did you mean "targets".'),
])  # fmt: skip
def test_what_is_wrong_with_a_patch_is_named(values, message):
    with pytest.raises(BadInput) as caught:
        Recipe(model="x", patches=[{"paca": values}]).load_patches()
    assert str(caught.value).startswith(message)


def test_errors_have_three_parts_and_a_code():
    with pytest.raises(BadInput) as caught:
        Recipe.from_dict({"modle": "x"})
    error = caught.value
    assert str(error) == f"{error.asked}: {error.have}. {error.do}." and error.exit_code == 2
    kinds = [kind for kind in TrimtabError.__subclasses__() if kind.__module__ == TrimtabError.__module__]
    assert {kind.__name__: kind.exit_code for kind in kinds} == {
        "BadInput": 2, "DoesNotFit": 3, "Stopped": 4, "Interrupted": 130}  # fmt: skip
    assert nearest("lora_", ["lora", "paca"]) == 'Did you mean "lora"'
    assert nearest("zzz", ["lora", "paca"]) == "Known: lora, paca"


def test_a_chat_template_is_looked_for_beside_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "own.jinja").write_text("x")
    recipe = tmp_path / "folder" / "r.yaml"
    recipe.write_text("data: {train: t.jsonl, chat_template: own.jinja}\npatches: [full]\n")
    assert Recipe.load(recipe).data.chat_template == str(recipe.parent / "own.jinja")
    recipe.write_text("data: {train: t.jsonl, chat_template: chatml}\npatches: [full]\n")
    assert Recipe.load(recipe).data.chat_template == "chatml"


def test_a_field_of_a_stepper_that_is_named_by_text_can_be_set(file):
    made = Recipe.load(file, ["stepper=mezo", "stepper.mezo.eps=0.01", "objective.causal_lm.chunk=64"])
    assert made.stepper == {"mezo": {"eps": 0.01}} and made.load_objective().chunk == 64


def test_choices_that_are_numbers_are_named():
    with pytest.raises(BadInput, match="bits: 3: there is no such choice. Known: 16, 4, 8"):
        Recipe.from_dict({"model": "x", "patches": [{"full_cache": {"bits": 3}}]}).load_patches()
