"""Data that a patch is calibrated with: training rows, or a file of its own."""

from __future__ import annotations

import pytest

import trimtab
from helpers_run import films, make_world, tree, write_rows
from trimtab.errors import BadInput
from trimtab.inference.export import export
from trimtab.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = [{"text": "the country of paris is france " * 6}, {"text": "madrid is in the country of spain " * 6}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def run(keys: dict) -> dict:
    return Recipe.from_dict(keys).train()


def columns(folder) -> dict:
    from safetensors.torch import load_file

    found = load_file(next((folder / "adapter").rglob("adapter_model.safetensors")))
    return {key: tensor.tolist() for key, tensor in found.items() if key.endswith("columns")}


def test_a_file_of_text_chooses_other_weights_than_the_rows(world, tmp_path):
    file = write_rows(tmp_path / "text.jsonl", TEXT)
    fields = {"density": 0.01, "rows": 2}
    made = {}
    for name, more in (("rows", {}), ("text", {"calibration": str(file)}), ("again", {"calibration": str(file)})):
        run(tree(world, tmp_path / name, {"senszoq": {**fields, **more}}, max_steps=2))
        made[name] = columns(tmp_path / name)
    assert made["text"] == made["again"] != made["rows"]
    assert sum(map(len, made["text"].values())) == sum(map(len, made["rows"].values()))


def test_a_file_beside_the_recipe_is_found(world, tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    write_rows(tmp_path / "recipes" / "text.jsonl", TEXT)
    keys = tree(world, tmp_path / "run", {"senszoq": {"density": 0.01, "calibration": "text.jsonl"}}, max_steps=1)
    path = tmp_path / "recipes" / "recipe.yaml"
    path.write_text(Recipe.from_dict(keys).to_yaml())
    monkeypatch.chdir(tmp_path)
    assert Recipe.load(path).patches == [
        {"senszoq": {"density": 0.01, "calibration": str(tmp_path / "recipes" / "text.jsonl")}}
    ]
    Recipe.load(path).train()


def test_a_run_is_resumed_and_exported_without_the_file(world, tmp_path):
    file = write_rows(tmp_path / "text.jsonl", TEXT)
    keys = tree(world, tmp_path / "run", {"senszoq": {"density": 0.01, "calibration": str(file)}}, max_steps=4)
    run(keys)
    file.unlink()
    assert export(Recipe.from_dict(keys), "merged").is_dir()


@pytest.mark.parametrize(
    "rows,match", [([{"text": ""}], "text|token"), ([{"text": "paris"}], "rows have [0-9]+ tokens")]
)
def test_text_that_is_too_short_is_refused(world, tmp_path, rows, match):
    file = write_rows(tmp_path / "text.jsonl", rows)
    keys = tree(world, tmp_path / "run", {"senszoq": {"calibration": str(file)}}, max_steps=1)
    with pytest.raises(BadInput, match=match):
        run(keys)
    assert not (tmp_path / "run").exists()


def test_text_for_a_classifier_is_refused(world, tmp_path):
    file = write_rows(tmp_path / "text.jsonl", TEXT)
    with pytest.raises(BadInput, match="trains a classifier"):
        run(films(world, tmp_path / "run", {"senszoq": {"calibration": str(file)}}, max_steps=1))
    run(films(world, tmp_path / "run", {"senszoq": {"rows": 4}}, max_steps=2))
    assert trimtab.Recipe.load(tmp_path / "run").patches[0]["senszoq"]["rows"] == 4


def test_a_missing_file_is_refused_by_the_plan_too(world, tmp_path):
    keys = tree(world, tmp_path / "run", {"senszoq": {"calibration": str(tmp_path / "none.jsonl")}}, max_steps=1)
    for verb in (lambda: trimtab.Recipe.from_dict(keys).plan(), lambda: run(keys)):
        with pytest.raises(BadInput, match="none.jsonl"):
            verb()
