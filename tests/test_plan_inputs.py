"""`plan` reads what `train` will read: the same batch, the same process, the same refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from byte_model import byte_tokenizer
from helpers_run import films, make_world, tree, write_rows
from trimtab.engine.inputs import foresee, unread
from trimtab.errors import BadInput
from trimtab.recipe import Recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), torch.bfloat16)


@pytest.mark.parametrize("training", [
    {}, {"packing": True}, {"packing": True, "packing_strategy": "wrapped"}, {"gradient_accumulation_steps": 3},
    {"pad_to_multiple_of": None, "num_train_epochs": 2, "max_steps": -1}, {"label_smoothing_factor": 0.1},
])  # fmt: skip
@pytest.mark.parametrize("kind", [tree, films])
def test_a_plan_is_the_one_that_the_run_makes(kind, training, world, tmp_path):
    if kind is films:
        training = {key: value for key, value in training.items() if "pack" not in key and "pad_" not in key}
    keys = kind(world, tmp_path / "run", {"paca": {"r": 4}}, **{"max_steps": 2, **training})
    planned = Recipe.from_dict(keys).plan().predicted()
    assert not (tmp_path / "run").exists()
    ran = Recipe.from_dict(keys).train()["predicted"]
    same = ("live_peak_bytes", "live_growth_bytes", "overhead_bytes", "slow_bytes", "phase", "batch", "bytes")
    assert {key: planned[key] for key in same} == {key: ran[key] for key in same}


def test_what_tokenizer_and_rows_use_is_counted(world, tmp_path):
    recipe = Recipe.from_dict(tree(world, tmp_path / "run", {"paca": {"r": 4}}))
    foresee(recipe)  # what it imports is there now
    small = foresee(recipe)
    many = [{"question": f"which country is city {i} in ?", "answer": "france"} for i in range(40_000)]
    large = foresee(Recipe.from_dict({**recipe.to_dict(), "data": str(write_rows(tmp_path / "many.jsonl", many))}))
    assert large.nbytes > small.nbytes + 2 * 2**20 and large.batch["rows"] == small.batch["rows"]


@pytest.mark.parametrize("rows,words", [
    ([{"question": "x", "reply": "y"}], "reply"),
    ([{"question": "x " * 99, "answer": "y"}], "more than 48 tokens"),
    ([{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": 7}]}], "messages"),
])  # fmt: skip
def test_a_plan_refuses_what_the_run_would(rows, words, world, tmp_path):
    keys = tree(world, tmp_path / "run", {"paca": {"r": 4}}) | {"data": str(write_rows(tmp_path / "d.jsonl", rows))}
    for verb in ("plan", "train"):
        with pytest.raises(BadInput, match=words):
            getattr(Recipe.from_dict(keys), verb)()


def test_ids_beyond_the_embeddings_are_seen_without_weights(world, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((world / "llama" / "config.json").read_text())
    recipe = Recipe.from_dict({**tree(world, tmp_path / "run", {"paca": {"r": 4}}), "model": str(folder)})
    assert "no tokenizer" in unread(recipe)
    planned = recipe.plan()
    assert planned.tokens == 48 and any("max_length" in note for note in planned.notes)
    byte_tokenizer().save_pretrained(folder)  # of 260 words, and the model has fewer
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert words < 256
    with pytest.raises(BadInput, match=f"embeddings of {words} tokens"):
        recipe.plan()


def test_rows_on_the_hub_and_no_rows_are_no_fault_of_a_plan(world, tmp_path):
    keys = tree(world, tmp_path / "run", {"paca": {"r": 4}})
    for data, words in (({"train": "owner/name"}, "on the hub"), ({}, "names no data.train")):
        made = Recipe.from_dict({**keys, "data": data}).plan()
        assert made.tokens == 48 and any(words in note for note in made.notes)
