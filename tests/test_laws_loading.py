"""What holds for every patch that says where the base's weights are (When.LOAD): outputs stay, and nothing is saved.

A new one adds a row to CASES.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from conftest import MIXTURES, MODELS, logits, tiny_batch
from tiny import recipe_of, tiny_folder
from trimtab import methods
from trimtab.artifacts.adapter import Base, load_adapter, save_adapter
from trimtab.contracts import When
from trimtab.errors import BadInput
from trimtab.memory.meter import LiveTensors
from trimtab.model.load import base_hash, load_model
from trimtab.planning.inference import Work, plan_inference
from trimtab.recipe import Recipe
from world import CASES as TRAINED
from world import PLACE, calibrated, named, same, snapshot, train, values

CASES = {  # a name of one's own -> the table's name, fields
    "dynamic": ("fiddler", {"cache": 1e-4}),
    "popular": ("fiddler", {"residency": "popular", "cache": 1e-4}),
    "lru": ("fiddler", {"residency": "lru", "cache": 2e-4}),
    "all in slow memory": ("fiddler", {"cache": 0.0}),
    "all in fast memory": ("fiddler", {"cache": 1.0}),
}
cases = pytest.mark.parametrize("name", CASES)
families = pytest.mark.parametrize("family", MIXTURES)
ON_TOP = [name for name in TRAINED if name != "full"]


def make(name: str, **more):
    return named(CASES[name], **more)


def put(name: str, model: nn.Module, **more):
    return calibrated(make(name, **more), model)


def plain(family: str) -> nn.Module:
    """With the library's plainest form of experts, which the numbers are to be."""
    model = MIXTURES[family]()
    model.set_experts_implementation("eager")
    return model


def test_every_loading_patch_has_a_case():
    assert {patch for patch, _ in CASES.values()} == set(methods.names("patch", "load"))
    assert all(make(name).when is When.LOAD for name in CASES)


@cases
@families
def test_outputs_are_the_models_own_and_revert_leaves_nothing(name, family):
    model = plain(family)
    batch, before, weights = tiny_batch(model), snapshot(model), values(model)
    outputs, ids = logits(model, batch), batch["input_ids"][:2]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ways = [{}, {"num_beams": 3}]
    own = [model.generate(ids, attention_mask=mask, max_new_tokens=6, **way) for way in ways]
    for _ in range(2):
        surgery = put(name, model)
        assert surgery.own_tensors() == {} and surgery.starts_at_zero and surgery.keeps_outputs
        for _ in range(2):
            assert torch.equal(logits(model, batch), outputs)
        for way, wanted in zip(ways, own, strict=True):
            assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, **way), wanted)
        surgery.revert()
        model.set_experts_implementation("eager")
        assert snapshot(model) == before and same(model.state_dict(), weights)
        assert torch.equal(logits(model, batch), outputs)


@cases
@families
def test_from_a_checkpoint_it_is_the_same(name, family, tmp_path):
    folder = tiny_folder(tmp_path / family, family, torch.float32)
    whole, left = load_model(folder)[0], load_model(folder, experts=False)[0]
    whole.set_experts_implementation("eager")
    assert whole.trimtab_base == left.trimtab_base and any(p.is_meta for p in left.parameters())
    surgery = put(name, left)
    assert not any(p.is_meta for p in left.parameters()) and base_hash(left) == whole.trimtab_base
    batch = tiny_batch(whole)
    assert torch.equal(logits(left, batch), logits(whole, batch))
    surgery.revert()
    assert [(n, p.shape, p.dtype) for n, p in left.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in whole.named_parameters()
    ]


@pytest.mark.parametrize("name,patch", itertools.product(["dynamic", "lru"], ON_TOP))
def test_a_trained_patch_goes_on_top_and_is_saved_alone(name, patch, tmp_path):
    """It is trained to the numbers that it is trained to without, and its adapter folder is the same."""
    model, other = plain("mixtral"), plain("mixtral")
    batch, before, base = tiny_batch(model), snapshot(model), Base("tiny", base_hash(model))
    below = put(name, model)
    fields = TRAINED[patch] | ({"candidates": 1.0} if patch == "diff_pruning" else {})
    above, alone = (methods.find(patch)(**fields).apply(m, PLACE) for m in (model, other))
    assert torch.allclose(logits(model, batch), logits(other, batch), atol=1e-6)
    losses, own = train(model, above, 4), train(other, alone, 4)
    assert losses == pytest.approx(own, abs=2e-4) and losses[-1] < losses[0]
    folder = save_adapter(tmp_path / "adapter", [below, above], base)
    assert (folder / "adapter_config.json").is_file() and not list(folder.glob("*-fiddler"))
    (again,) = load_adapter(fresh := plain("mixtral"), folder)
    assert torch.allclose(logits(fresh, batch), logits(model, batch), atol=1e-5)
    again.revert()
    above.revert()
    below.revert()
    model.set_experts_implementation("eager")
    assert snapshot(model) == before


@cases
def test_training_every_weight_is_refused(name):
    recipe = Recipe(model="x", patches=[{"fiddler": CASES[name][1]}, {"full": {}}])
    with pytest.raises(BadInput, match="frozen"):
        recipe.load_patches()


@cases
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_model_without_experts_is_refused(name, family):
    model = MODELS[family]()
    before = snapshot(model)
    with pytest.raises(BadInput, match="has no experts"):
        put(name, model)
    assert snapshot(model) == before


@cases
@families
def test_the_plan_is_what_tensors_use(name, family, tmp_path):
    """The plan is a bound, which is reached if some experts have all tokens."""
    patch, fields = CASES[name]
    recipe = recipe_of(tiny_folder(tmp_path / family, family, torch.float32), {patch: fields})
    model = load_model(recipe.model, experts=False)[0]
    for path, module in model.named_modules():
        if path.endswith((".gate", ".router")):
            for parameter in module.parameters():
                parameter.data = torch.zeros_like(parameter)
    surgery = put(name, model)
    planned = plan_inference(recipe, recipe.load_patches(), Work(4, 40, 50))
    outside = surgery.outside()
    for kind, tensors in outside.items():
        assert planned.kinds.get(kind, 0) == sum(t.untyped_storage().nbytes() for t in tensors)
    ids = torch.randint(3, 128, (4, 40), generator=torch.Generator().manual_seed(0))
    mapped = [*model.parameters(), *outside["experts in the slow tier"]]
    with torch.no_grad(), LiveTensors([*model.buffers(), *outside["experts"]], mapped) as live:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, min_new_tokens=50)
    assert planned.live_peak_bytes == pytest.approx(live.peak_bytes, rel=0.03)
    assert surgery.tiers.traffic.misses > 0
