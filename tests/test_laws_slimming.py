"""What holds for every patch that slims a model (When.BOTH): nothing is trained, and it is saved with the adapter.

A new one adds a row to CASES.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from conftest import MODELS, logits, quantise, tiny_batch
from trimtab import methods
from trimtab.artifacts.adapter import Base, load_adapter, save_adapter
from trimtab.contracts import When
from trimtab.errors import BadInput
from trimtab.model.load import base_hash
from world import CASES as TRAINED
from world import PLACE, calibrated, named, same, snapshot, train, values

CASES = {  # a name of one's own -> the table's name, fields
    "magnitude": ("pruning", {}),
    "magnitude 2:4": ("pruning", {"pattern": "2:4"}),
    "wanda": ("pruning", {"score": "wanda", "sparsity": 0.6}),
    "wanda 2:4": ("pruning", {"score": "wanda", "pattern": "2:4"}),
    "sparsegpt": ("sparsegpt", {}),
    "sparsegpt 2:4, 4 bits": ("sparsegpt", {"pattern": "2:4", "bits": 4}),
    "embedding": ("embedding_pruning", {}),
    "embedding, kept": ("embedding_pruning", {"softmax": "kept"}),
}
EXACT = [name for name, (patch, _) in CASES.items() if patch == "embedding_pruning"]  # outputs stay; 4 bits are taken
VALUES = [name for name, (patch, _) in CASES.items() if patch == "sparsegpt"]  # it saves weights, not only which stay
cases = pytest.mark.parametrize("name", CASES)
families = pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])


def make(name: str, **more):
    return named(CASES[name], **more)


def put(name: str, model: nn.Module, **more):
    return calibrated(make(name, **more), model)


def test_every_slimming_patch_has_a_case():
    assert {patch for patch, _ in CASES.values()} == set(methods.names("patch", "both"))
    assert all(make(name).when is When.BOTH for name in CASES)


@cases
@families
def test_it_changes_the_model_and_revert_leaves_nothing(name, family):
    model = MODELS[family]()
    batch, before, weights = tiny_batch(model), snapshot(model), values(model)
    outputs = logits(model, batch)
    ends = []
    for _ in range(2):
        surgery = put(name, model)
        assert not surgery.starts_at_zero and not any(t.requires_grad for t in surgery.own_tensors().values())
        ends.append(logits(model, batch))
        surgery.revert()
        assert snapshot(model) == before and same(model.state_dict(), weights)
        assert torch.equal(logits(model, batch), outputs)
    assert torch.equal(*ends) and torch.allclose(ends[0], outputs, atol=1e-3) == (name in EXACT)


@cases
@families
def test_a_saved_one_needs_no_data(name, family, tmp_path):
    model = MODELS[family]()
    base = Base("tiny", base_hash(model))
    surgery = put(name, model)
    folder = save_adapter(tmp_path / "adapter", [surgery], base)
    fresh = MODELS[family]()
    (again,) = load_adapter(fresh, folder)
    batch = tiny_batch(model)
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    whole = sum(p.nbytes for p in model.parameters())
    assert sum(path.stat().st_size for path in folder.iterdir()) < (whole if name in VALUES else whole / 4)
    with pytest.raises(BadInput):
        again.load_tensors(dict(list(load_file(folder / "adapter_model.safetensors").items())[1:]))


@cases
@families
def test_merged_is_a_plain_model(name, family, tmp_path):
    model, plain = MODELS[family](), MODELS[family]()
    batch = tiny_batch(model)
    surgery = put(name, model)
    outputs = logits(model, batch)
    surgery.merge()
    assert str(model) == str(plain) and list(model.state_dict()) == list(plain.state_dict())
    assert snapshot(model)["hooks"] == snapshot(plain)["hooks"]
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if family != "bert" else AutoModelForSequenceClassification
    assert torch.equal(logits(auto.from_pretrained(tmp_path).eval(), batch), outputs)


@pytest.mark.parametrize("name,patch", itertools.product(CASES, TRAINED))
def test_a_trained_patch_goes_on_top(name, patch):
    """It starts at what the slimmed model computes, is trained, and both are undone."""
    model = MODELS["llama"]()
    batch, before, weights = tiny_batch(model), snapshot(model), values(model)
    below = put(name, model)
    outputs = logits(model, batch)
    above = methods.find(patch)(**TRAINED[patch]).apply(model, PLACE)
    assert torch.allclose(logits(model, batch), outputs, atol=1e-5)
    losses = train(model, above, 4)
    assert losses[-1] < losses[0]
    above.revert()
    assert torch.equal(logits(model, batch), outputs)
    below.revert()
    assert snapshot(model) == before and same(model.state_dict(), weights)


@cases
@pytest.mark.parametrize("how", ["patched", "nf4"])
def test_on_a_patched_or_quantised_model_it_is_refused(name, how):
    model = MODELS["llama"]()
    if how == "patched":
        methods.find("paca")(r=4).apply(model, PLACE)
    else:
        quantise(model, "nf4")
        if name in EXACT:
            assert put(name, model).own_tensors()
            return
    before = snapshot(model)
    with pytest.raises(BadInput):
        make(name).apply(model, PLACE)
    assert snapshot(model) == before, "a refusal must change nothing"
