"""`trimtab serve` of trained runs with patches for inference: replies are `generate`'s, whatever came before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from helpers_reply import byte_folder, learned
from helpers_serve import serving
from trimtab.inference.generate import generate
from trimtab.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [{"question": "sky", "answer": "blue as the sea"}, {"question": "coal", "answer": "black, and then some"}]
CAKE = {"cake": {"budget": 16, "window": 4, "chunk": 32}}
FIDDLER = {"fiddler": {"cache": 0.0001}}  # GiB: some experts of each layer
ASKED = ["what is the colour of the sky number one, and of the next " * 2, "coal", "tell me about coal and x " * 5]
NEW = 24


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Recipe]:
    """name -> the recipe of a run with its patches for inference, and the same without them (`plain`)."""
    folder = tmp_path_factory.mktemp("served")
    dense, mixture = (
        byte_folder(folder / "dense"),
        byte_folder(folder / "mixture", family="Mixtral", num_local_experts=4),
    )
    made = {}
    for name, model, patches in (("cake", dense, [{"lora": {"r": 8}}]),
                                 ("fiddler", mixture, [FIDDLER, {"lora": {"r": 8}}])):  # fmt: skip
        (folder / name).mkdir()
        made[name] = learned(folder / name, model, ROWS, patches, training={"max_steps": 20})
    made["cake plain"] = made["cake"]
    made["cake"] = dataclasses.replace(made["cake"], patches=[*made["cake"].patches, CAKE])
    made["fiddler plain"] = dataclasses.replace(made["fiddler"], patches=[{"lora": {"r": 8}}])
    return made


def replies(recipe: Recipe, *asked: str) -> list[str]:
    """Those to each of `asked`, each alone."""
    return [reply for ask in asked for reply in generate(recipe, [ask], max_new_tokens=NEW)]


@pytest.mark.parametrize("name", ["cake", "fiddler"])
def test_a_served_run_replies_as_generate_does(runs, name):
    recipe = runs[name]
    alone, plain = replies(recipe, *ASKED), replies(runs[f"{name} plain"], ASKED[0])
    assert len(set(alone)) == len(ASKED)
    if name == "cake":
        assert alone[0] != plain[0], "what was evicted must matter"
    else:
        assert alone[0] == plain[0], "its outputs are exact"
    with serving(recipe.output, f"patches={json.dumps(recipe.patches)}") as server:
        for at in (0, 1, 2, 0, 2, 1, 1, 0):
            reply = server.chat(ASKED[at], max_tokens=NEW).choices[0].message.content
            assert reply == alone[at], f"request {at}"
        assert server.end()[0] == 0
    record = json.loads((Path(recipe.output) / "serve.json").read_text())
    assert record["measured"]["new_tokens"] > 0 and record["predicted"]["bytes"]["cache"] > 0
