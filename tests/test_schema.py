"""`trimtab schema`: it takes every recipe that ships, and marks what a recipe may not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from trimtab import methods
from trimtab.engine.fields import REFUSED
from trimtab.recipe import Recipe
from trimtab.schema import schema
from trimtab.validation import read_yaml

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").rglob("*.yaml"))


@pytest.fixture(scope="module")
def checker() -> jsonschema.Draft202012Validator:
    made = json.loads(json.dumps(schema()))
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path, checker):
    checker.validate(read_yaml(path.read_text(), path.name))


@pytest.mark.parametrize("name", methods.names("patch"))
def test_a_resolved_recipe_is_valid(name, checker):
    """As `recipe.yaml` of a run's folder holds it."""
    try:
        patch = methods.find(name)()
    except TypeError:
        pytest.skip("it has a field without a default")
    checker.validate(json.loads(json.dumps(Recipe(patches=[patch]).to_dict())))


SHORT = ["model", {"model": {"name": "m", "precision": "nf4"}}, {"data": "rows.jsonl"}, {"patches": ["paca"]},
         {"patches": [{"paca": None}]}, {"training": {"gradient_checkpointing": True, "max_minutes": 3}},
         {"objective": {"causal_lm": {"chunk": 8}}}, {"budget": {"fast": "2GiB", "slow": "80%"}}]  # fmt: skip


@pytest.mark.parametrize("tree", [{"model": "m"} if tree == "model" else tree for tree in SHORT], ids=str)
def test_short_forms_are_valid(tree, checker):
    checker.validate(tree)


WRONG = [
    {"modle": "m"}, {"model": {"nam": "m"}}, {"model": {"name": "m", "precision": "nf5"}}, {"patches": ["pacca"]},
    {"patches": [{"paca": {"rank": 8}}]}, {"patches": [{"paca": {"r": "eight"}}]},
    {"patches": [{"paca": {}, "lora": {}}]},
    {"training": {"max_step": 3}}, {"training": {"learning_rate": "fast"}}, {"training": {"logging_strategy": 3}},
    {"objective": "grp"}, {"stepper": {"mezo": {"epsilon": 1}}}, {"engine": {"recompute": "sometimes"}},
    {"budget": {"fast": [1]}}, {"stages": [{"nam": "one"}]}, *({"training": {name: 1}} for name in list(REFUSED)[:3]),
]  # fmt: skip


@pytest.mark.parametrize("tree", WRONG, ids=str)
def test_mistakes_are_marked(tree, checker):
    assert not checker.is_valid(tree)


def test_fields_have_descriptions_and_the_command_prints_them():
    call = [sys.executable, "-m", "trimtab", "schema"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    made = json.loads(done.stdout)
    assert not done.stderr
    fields = made["properties"]["patches"]["items"]["anyOf"][1]["properties"]["meft"]["anyOf"][0]["properties"]
    assert fields["probes"]["description"] == "n_p, experts per token" and fields["probes"]["type"] == "integer"
    assert "optim" in made["properties"]["training"]["properties"]
