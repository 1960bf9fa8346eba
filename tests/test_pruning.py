"""Magnitude pruning and Wanda against a reference written from the papers' equations, and through whole runs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import MODELS, tiny_batch
from helpers_run import make_world, tree
from trimtab.errors import BadInput
from trimtab.inference.evaluate import evaluate
from trimtab.inference.export import export
from trimtab.methods.pruning import Pruning, _packed, _unpacked
from trimtab.model import anatomy
from trimtab.recipe import Recipe
from trimtab.training.train import train
from world import PLACE

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def smallest(scores: list[float], share: float) -> set[int]:
    """The places of the `share` smallest, one by one."""
    order = sorted(range(len(scores)), key=lambda at: scores[at])
    return set(order[: int(share * len(scores))])


def reference(weight: torch.Tensor, norms: torch.Tensor | None, share: float, pattern: str) -> torch.Tensor:
    """(out, in), 0 where a weight goes: loops over rows and groups, as the papers say it."""
    kept = torch.ones_like(weight)
    scores = weight.abs() * (1.0 if norms is None else norms)
    if pattern == "2:4":
        for row in range(weight.shape[0]):
            for start in range(0, weight.shape[1], 4):
                for at in smallest(scores[row, start : start + 4].tolist(), 0.5):
                    kept[row, start + at] = 0
    elif norms is None:
        for at in smallest(scores.flatten().tolist(), share):
            kept.view(-1)[at] = 0
    else:
        for row in range(weight.shape[0]):
            for at in smallest(scores[row].tolist(), share):
                kept[row, at] = 0
    return kept


@pytest.mark.parametrize("pattern,share", [("unstructured", 0.3), ("unstructured", 0.5), ("2:4", 0.5)])
def test_magnitude_is_the_smallest_of_a_matrix(pattern, share):
    model, plain = MODELS["qwen2"](3), MODELS["qwen2"](3)
    surgery = Pruning(sparsity=share, pattern=pattern).apply(model, PLACE)
    for name, linear in surgery.linears.items():
        original = plain.get_submodule(name).weight.detach()
        assert torch.equal(linear.weight, original * reference(original, None, share, pattern)), name


@pytest.mark.parametrize("pattern,share", [("unstructured", 0.4), ("2:4", 0.5)])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_wanda_prunes_block_by_block(family, pattern, share):
    """Norms over tokens that count, taken with a naive pass through the model whose earlier blocks are pruned."""
    model, naive = MODELS[family](5), MODELS[family](5)
    batches = [tiny_batch(model, rows=3, tokens=12, seed=seed) for seed in (7, 8)]
    surgery = Pruning(score="wanda", sparsity=share, pattern=pattern).apply(model, PLACE)
    surgery.calibrate(batches)
    for block in anatomy.blocks(naive)[1]:
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        sums = {id(m): torch.zeros(m.in_features) for m in linears}
        for batch in batches:
            inputs = {}

            def seen(m, args, out, inputs=inputs):
                inputs[id(m)] = args[0]

            hooks = [m.register_forward_hook(seen) for m in linears]
            with torch.no_grad():
                naive(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for hook in hooks:
                hook.remove()
            for row, token in batch["attention_mask"].nonzero().tolist():
                for key, x in inputs.items():
                    sums[key] += x[row, token] ** 2
        with torch.no_grad():
            for m in linears:
                m.weight.mul_(reference(m.weight, sums[id(m)].sqrt(), share, pattern))
    for name, linear in surgery.linears.items():
        ours, theirs = linear.weight != 0, naive.get_submodule(name).weight != 0
        assert (ours == theirs).float().mean() > 0.999, name  # sums in another order may swap equal scores
        assert torch.equal(linear.weight[ours & theirs], naive.get_submodule(name).weight[ours & theirs])


def test_bits_are_packed_and_read_back():
    for size in ((1, 1), (3, 5), (8, 8), (7, 9)):
        kept = torch.rand(size) > 0.5
        bits = _packed(kept)
        assert bits.numel() == -(-kept.numel() // 8) and torch.equal(_unpacked(bits, kept.shape), kept)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"sparsity": 0.0}, "above 0"), ({"sparsity": 1.0}, "below 1"), ({"sparsity": float("nan")}, "above 0"),
        ({"pattern": "2:4", "sparsity": 0.6}, "one half"), ({"rows": 0, "score": "wanda"}, "at least one row"),
        ({"targets": "nothing_like_it"}, "nothing_like_it"),
    ],
)  # fmt: skip
def test_bad_fields(fields, message):
    with pytest.raises(BadInput, match=message):
        Pruning(**fields).apply(MODELS["llama"](), PLACE)


# --- whole runs ------------------------------------------------------------------------------------------------------

WANDA = {"pruning": {"score": "wanda", "rows": 8}}


def test_a_run_trains_on_the_pruned_model(world, tmp_path):
    keys = tree(world, tmp_path / "run", WANDA, max_steps=3)
    keys["data"]["test"] = keys["data"]["train"]
    keys["patches"] = [WANDA, {"lora": {"r": 4}}]
    made = train(Recipe.from_dict(keys))
    assert made["predicted"]["live_peak_bytes"] == pytest.approx(made["measured"]["live_peak_bytes"], rel=0.005)
    predicted, measured = ({kind: made[side]["bytes"].get(kind, 0) for kind in ("weights", "adapter")}
                           for side in ("predicted", "measured"))  # fmt: skip
    assert sum(predicted.values()) == pytest.approx(sum(measured.values()), abs=64)
    mask = load_file(tmp_path / "run" / "adapter" / "0-pruning" / "adapter_model.safetensors")
    assert all(t.dtype == torch.uint8 for t in mask.values())
    found = evaluate(Recipe.from_dict(keys))
    assert found["metrics"]["loss"] == pytest.approx(made["final_loss"], abs=1.0)
    export(Recipe.from_dict(keys), "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert merged.config.model_type == "llama"


def test_a_recipe_that_only_prunes_is_evaluated_and_exported(world, tmp_path):
    keys = tree(world, tmp_path / "run", WANDA)
    keys["data"]["test"] = keys["data"]["train"]
    recipe = Recipe.from_dict(keys)
    with pytest.raises(BadInput, match="no patch that is trained"):
        train(recipe)
    assert not (tmp_path / "run").exists()
    pruned, base = evaluate(recipe), evaluate(recipe, base_only=True)
    assert not (tmp_path / "run").exists(), "no run, and so no record of one"
    assert pruned["metrics"]["loss"] != base["metrics"]["loss"]
    export(recipe, "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    zeros = [float((m.weight == 0).float().mean()) for m in merged.model.layers.modules() if isinstance(m, nn.Linear)]
    assert zeros and all(share == pytest.approx(0.5, abs=0.01) for share in zeros)
    assert json.loads((tmp_path / "run" / "merged" / "config.json").read_text())["model_type"] == "llama"
