"""What holds for every patch that acts while a model generates (When.INFER).

A new one adds a row to CASES, and to REFERENCES (both helpers_kv.py) if it evicts from the KV cache: how it judges.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from conftest import MODELS, logits, tiny_batch
from helpers_kv import CASES, REFERENCES, Naive
from trimtab import methods
from trimtab.bases.cache import CachePolicy
from trimtab.contracts import When
from trimtab.errors import BadInput
from trimtab.model.kv_cache import attending
from trimtab.model.kv_rows import Row
from trimtab.recipe import Recipe
from world import CASES as TRAINED
from world import PLACE, same, snapshot, train, values

WIDE = {name: {} for name in CASES}  # nothing is ever evicted
EVICTING = [name for name in CASES if name in REFERENCES]
cases = pytest.mark.parametrize("name", CASES)
families = pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])  # a sliding window is the third's
NEW = 9


def put(name: str, model: nn.Module, fields: dict | None = None):
    return methods.find(name)(**(CASES[name] if fields is None else fields)).apply(model, PLACE)


def generate(model: nn.Module, ids: Tensor, mask: Tensor, cache=None, **settings) -> Tensor:
    """The new ids, (rows, NEW)."""
    with torch.no_grad(), attending(model, cache, mask):
        more = {} if cache is None else {"past_key_values": cache}
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0,
            **{"do_sample": False, **settings}, **more,
        )  # fmt: skip
    return out[:, ids.shape[1] :]


def prompts(tokens: int = 10, padded: int = 3) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 128, (2, tokens), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :padded], ids[1, :padded] = 0, 0
    return ids, mask


def naive(name: str, patch: CachePolicy, layers: int) -> Naive:
    total = patch.tokens(Row(16), layers)
    return Naive(name, CASES[name], total, patch.window, patch.floor, patch.slack, patch.shares(layers))


def test_every_inference_patch_has_a_case():
    assert set(CASES) == set(WIDE) == set(methods.names("patch", "infer"))
    assert all(methods.find(name).when is When.INFER for name in CASES)


@cases
@families
def test_it_changes_nothing_but_generation(name, family):
    model = MODELS[family]()
    batch, before, weights = tiny_batch(model), snapshot(model), values(model)
    outputs, own = logits(model, batch), generate(model, *prompts())
    surgery = put(name, model)
    assert snapshot(model) == before and surgery.own_tensors() == {}
    assert torch.equal(logits(model, batch), outputs) and torch.equal(generate(model, *prompts()), own)
    generate(model, *prompts(), surgery.cache())
    assert snapshot(model) == before and same(model.state_dict(), weights)
    assert torch.equal(logits(model, batch), outputs)
    with pytest.raises(BadInput):
        surgery.merge()
    surgery.revert()
    assert snapshot(model) == before


@cases
@families
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_where_nothing_is_evicted_it_is_the_model_itself(name, family, settings):
    model = MODELS[family]()
    surgery = put(name, model, WIDE[name])
    own = generate(model, *prompts(), **settings)
    assert torch.equal(generate(model, *prompts(), surgery.cache(), **settings), own)


@pytest.mark.parametrize("name", EVICTING)
@families
def test_it_generates_what_a_naive_mask_does(name, family):
    model = MODELS[family]()
    surgery = put(name, model)
    ids, mask = prompts()
    ours = generate(model, ids, mask, cache := surgery.cache())
    assert not torch.equal(ours, generate(model, ids, mask)), "the case must evict what matters"
    for row in range(len(ids)):
        alone = ids[row][mask[row] == 1].tolist()
        reference = naive(name, surgery.patch, len(cache.layers))
        assert ours[row].tolist() == reference.generate(model, alone, NEW, forbidden=2)
        for layer, kept in reference.kept.items():
            assert cache.layers[layer].rows[row].positions.sort(1).values.tolist() == kept


@pytest.mark.parametrize("name", EVICTING)
def test_memory_is_bounded_and_the_count_is_true(name):
    model = MODELS["llama"]()
    surgery = put(name, model)
    sizes = []
    for tokens in (12, 30):
        cache = surgery.cache()
        generate(model, *prompts(tokens), cache)
        assert cache.get_seq_length() == tokens + NEW - 1
        sizes.append(cache.nbytes)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


@cases
@pytest.mark.parametrize("family", ["gemma2", "bert"])
def test_attention_of_another_kind_is_refused(name, family):
    model = MODELS[family]()
    before = snapshot(model)
    with pytest.raises(BadInput):
        put(name, model)
    assert snapshot(model) == before


@pytest.mark.parametrize("name,patch", itertools.product(CASES, TRAINED))
def test_it_serves_a_trained_model(name, patch):
    model = MODELS["llama"]()
    trained = methods.find(patch)(**TRAINED[patch]).apply(model, PLACE)
    train(model, trained, 2)
    model.eval()
    own = generate(model, *prompts())
    assert torch.equal(generate(model, *prompts(), put(name, model, WIDE[name]).cache()), own)


@pytest.mark.parametrize("first,second", itertools.product(CASES, repeat=2))
def test_two_caches_are_refused(first, second):
    recipe = Recipe(model="x", patches=[{first: CASES[first]}, {second: CASES[second]}])
    with pytest.raises(BadInput, match="one KV cache"):
        recipe.load_patches()
