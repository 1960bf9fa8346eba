"""The KV cache within a budget: shares of layers, memory at each moment, chunks, bits, bad input."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import MODELS, tiny_batch
from trimtab import methods
from trimtab.cost.trace import Trace
from trimtab.errors import BadInput
from trimtab.model import kv_rows, kv_scores
from trimtab.model.kv_cache import KeptCache, attending
from trimtab.model.kv_rows import Row
from trimtab.model.kv_scores import water_filling, window_attention
from trimtab.model.sampling import complete
from trimtab.planning import planned_reply
from trimtab.planning.inference import Work, plan_inference
from trimtab.recipe import Recipe
from world import PLACE

EVICTING = {
    "cake": {"budget": 12, "window": 4}, "snapkv": {"budget": 12, "window": 4}, "tova": {"budget": 12},
    "pyramidkv": {"budget": 12, "window": 4}, "streaming_llm": {"window": 10, "sinks": 2},
}  # fmt: skip


def policy(name: str, **fields):
    return methods.find(name)(**fields)


def passes(model, cache, ids: torch.Tensor, mask: torch.Tensor, parts: list[slice]) -> torch.Tensor:
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), attending(model, cache, mask):
        return torch.cat([
            model(input_ids=ids[:, part], attention_mask=mask[:, : part.stop], position_ids=places[:, part],
                  past_key_values=cache, use_cache=True).logits
            for part in parts
        ], 1)  # fmt: skip


def text(rows: int = 2, tokens: int = 40, padded: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[-1, :padded] = 0
    return ids, mask


# --- shares of layers ------------------------------------------------------------------------------------------------


def cases(seed: int):
    draw = random.Random(seed)
    for _ in range(300):
        layers = draw.randint(1, 12)
        prefers = [draw.choice([0.0, draw.lognormvariate(0, 2), draw.lognormvariate(0, 6)]) for _ in range(layers)]
        most = [draw.randint(0, 60) for _ in range(layers)]
        least = [min(length, draw.randint(0, 5)) for length in most]
        yield prefers, least, most, draw.randint(sum(least), sum(most) + 5)


def test_shares_use_the_budget_exactly():
    for prefers, least, most, total in cases(0):
        shares = water_filling(prefers, least, most, total)
        assert sum(shares) == min(total, sum(most))
        assert all(low <= share <= high for low, share, high in zip(least, shares, most, strict=True))


def test_shares_follow_preferences_between_the_limits():
    assert water_filling([1, 2, 3], [0, 0, 0], [99, 99, 99], 60) == [10, 20, 30]
    assert water_filling([1, 2, 3], [0, 0, 0], [99, 99, 15], 60) == [15, 30, 15], "the rest goes by preference"
    assert water_filling([1, 1, 1000], [4, 4, 0], [99, 99, 99], 60) == [4, 4, 52], "each keeps its least"
    assert water_filling([0, 0], [0, 0], [50, 50], 10) == [5, 5]


def test_a_share_never_grows_when_a_layer_is_added():
    """CAKE's proposition 1, with limits and rounding: a cascade ends where one division would."""
    for prefers, least, most, total in cases(1):
        total = max(total, sum(least))
        kept = list(most)
        for layers in range(1, len(prefers) + 1):
            before = kept[:layers]
            last = layers == len(prefers)
            kept[:layers] = water_filling(prefers[:layers], least[:layers], before, total, up=not last)
            assert all(new <= old for new, old in zip(kept, before, strict=False))
        assert kept == water_filling(prefers, least, most, total)


# --- attention of the newest queries ---------------------------------------------------------------------------------


def test_statistics_in_blocks_are_those_of_the_whole(monkeypatch):
    torch.manual_seed(0)
    row = Row(16)
    row.append(torch.randn(2, 50, 8), torch.randn(2, 50, 8))
    row.queries = torch.randn(6, 5, 8)
    whole = window_attention(row, 0.3, 5)
    logits = torch.einsum("hgwd,hnd->hgwn", row.queries.view(2, 3, 5, 8), row.keys) * 0.3
    A = logits.masked_fill(torch.arange(50) > torch.arange(45, 50)[:, None], -torch.inf).softmax(-1).flatten(0, 1)
    torch.testing.assert_close(whole.mean_AN, A.mean(1))
    torch.testing.assert_close(whole.variance_AN, A.var(1))
    old = A[..., :45]
    torch.testing.assert_close(whole.entropy, -(old * (old + 1e-10).log()).sum())
    torch.testing.assert_close(whole.variance, old.var(1).sum())
    monkeypatch.setattr(kv_scores, "BLOCK", 7)
    for name, value in vars(window_attention(row, 0.3, 5)).items():
        torch.testing.assert_close(value, getattr(whole, name))


# --- chunks, bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_prompt_in_chunks_is_the_prompt(family, monkeypatch):
    monkeypatch.setattr(kv_rows, "SPARE", 2)
    model, (ids, mask) = MODELS[family](), text()
    whole = passes(model, KeptCache(2, policy("full_cache")), ids, mask, [slice(0, 40)])
    parts = [slice(0, 2), slice(2, 13), slice(13, 14), slice(14, 40)]  # the first one is padding only in a row
    assert torch.allclose(passes(model, KeptCache(2, policy("full_cache")), ids, mask, parts)[mask == 1],
                          whole[mask == 1], atol=1e-5)  # fmt: skip
    own = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    assert torch.allclose(whole[mask == 1], own[mask == 1], atol=1e-5)


@pytest.mark.parametrize("bits,share", [(8, 0.01), (4, 0.2)])
def test_fewer_bits_are_near(bits, share):
    torch.manual_seed(0)
    keys, values, row = torch.randn(3, 20, 64), 100 + torch.randn(3, 20, 64), Row(bits)
    row.append(keys, values)
    for found, own in ((row.keys, keys), (row.values, values)):
        grouped, near = own.unflatten(2, (-1, 32)), found.unflatten(2, (-1, 32))
        step = (grouped.amax(-1) - grouped.amin(-1)) / (2**bits - 1)
        assert ((near - grouped).abs() <= (step * 0.51)[..., None] + grouped.abs() * 6e-4).all()
    assert row.nbytes < keys.nbytes * 2 * (bits + 3) / 32
    model, (ids, mask) = MODELS["llama"](), text()
    parts = [slice(0, 30), slice(30, 40)]
    own = passes(model, KeptCache(2, policy("full_cache")), ids, mask, parts)
    ours = passes(model, KeptCache(2, policy("full_cache", bits=bits)), ids, mask, parts)
    assert 0 < (ours - own)[mask == 1].abs().max() < share * own.abs().max()


def test_the_same_bytes_hold_more_tokens_in_fewer_bits():
    lengths = []
    for bits in (16, 8, 4):
        cache = KeptCache(2, policy("snapkv", budget="12KiB", window=4, bits=bits))
        passes(MODELS["llama"](), cache, *text(1, 120, 0), [slice(0, 120)])
        lengths.append(cache.layers[0].rows[0].length)
        assert cache.nbytes <= 1.05 * 12 * 1024
    assert lengths[0] * 2 < lengths[1] < lengths[2]


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("chunk", [60, 20])
def test_the_peak_is_the_budget_and_a_chunk(name, chunk, monkeypatch):
    model, held = MODELS["llama"](), list[int]()
    made = policy(name, **EVICTING[name], chunk=chunk)
    cache = KeptCache(2, made)
    after = KeptCache.attended

    def watched(cache, number, new):
        held.append(sum(row.length for layer in cache.layers for row in layer.rows))
        after(cache, number, new)

    monkeypatch.setattr(KeptCache, "attended", watched)
    ids, mask = text(1, 60, 0)
    parts = [slice(at, at + chunk) for at in range(0, 60, chunk)] + [slice(60, 61)] * 0
    passes(model, cache, ids, mask, parts)
    total = made.tokens(cache.layers[0].rows[0], 2)
    assert sum(layer.rows[0].length for layer in cache.layers) == total == 24
    assert max(held) <= total + chunk + 2
    assert cache.get_seq_length() == 60 and all(layer.rows[0].seen == 60 for layer in cache.layers)


@pytest.mark.parametrize("name", ["cake", "snapkv", "tova"])
def test_bytes_are_kept_at_each_token(name):
    model, ids = MODELS["llama"](), text(1, 50, 0)[0]
    window = {} if name == "tova" else {"window": 4}
    cache, most = KeptCache(2, policy(name, budget="10KiB", **window)), []
    complete(model, TOKENIZER, ids, torch.ones_like(ids), cache=cache, on_token=lambda rows: most.append(cache.nbytes),
             max_new_tokens=40, min_new_tokens=40, eos_token_id=2)  # fmt: skip
    assert len(most) == 40 and 9 * 1024 < max(most) <= 1.05 * 10 * 1024


def test_a_share_is_that_of_the_prompt():
    model, ids = MODELS["llama"](), text(1, 100, 0)[0]
    for budget, kept in (("25%", 25), ("100%", 100), ("1%", 8)):  # 8: window and floor
        cache = policy("snapkv", budget=budget, window=4).apply(model, PLACE).cache()
        complete(model, TOKENIZER, ids, torch.ones_like(ids), cache=cache, max_new_tokens=1, eos_token_id=2)
        assert [layer.rows[0].length for layer in cache.layers] == [kept, kept]


def test_layers_differ_in_cake_and_pyramidkv():
    model = MODELS["llama"]()
    for name in ("cake", "pyramidkv"):
        cache = KeptCache(2, policy(name, **EVICTING[name]))
        passes(model, cache, *text(1, 60, 0), [slice(0, 60)])
        one, other = (layer.rows[0].length for layer in cache.layers)
        assert one != other and one + other == 24


def test_memory_is_reserved_once():
    model, (ids, mask) = MODELS["llama"](), text(1, 20, 0)
    cache, places = KeptCache(2, policy("full_cache")), set()
    complete(model, TOKENIZER, ids, mask, cache=cache, max_new_tokens=30, min_new_tokens=30, eos_token_id=2,
             on_token=lambda rows: places.add(cache.layers[0].rows[0].parts["k"].data_ptr()))  # fmt: skip
    assert len(places) == 1 and cache.layers[0].rows[0].capacity == 50


class TOKENIZER:
    pad_token_id = 0


def test_the_chunk_of_a_policy_is_used_by_generate():
    model, (ids, mask), sizes = MODELS["llama"](), text(), []
    hook = model.register_forward_pre_hook(lambda m, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]),
                                           with_kwargs=True)  # fmt: skip
    whole = complete(model, TOKENIZER, ids, mask, max_new_tokens=4, eos_token_id=2)
    sizes.clear()
    cache = KeptCache(2, policy("full_cache", chunk=16))
    assert torch.equal(complete(model, TOKENIZER, ids, mask, cache=cache, max_new_tokens=4, eos_token_id=2), whole)
    assert sizes[:4] == [16, 16, 8, 1]
    hook.remove()


def test_tokens_before_a_sliding_window_are_forgotten(monkeypatch):
    monkeypatch.setattr(kv_rows, "SPARE", 3)
    model, (ids, mask) = MODELS["mistral"](), text()
    own = complete(model, TOKENIZER, ids, mask, max_new_tokens=20, eos_token_id=2)
    cache = policy("full_cache").apply(model, PLACE).cache()
    assert torch.equal(complete(model, TOKENIZER, ids, mask, cache=cache, max_new_tokens=20, eos_token_id=2), own)
    assert all(row.length <= 8 + 3 and row.capacity <= 16 for layer in cache.layers for row in layer.rows)


def test_a_sliding_window_that_attention_does_not_hear_of_is_refused():
    model = MODELS["llama"]()
    model.config.sliding_window = 8
    with pytest.raises(BadInput, match="sliding window"):
        policy("full_cache").apply(model, PLACE)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(BadInput, match="chunked attention"):
        policy("full_cache").apply(model, PLACE)


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,fields,match",
    [
        ("cake", {"budget": 20}, "at least"), ("cake", {"budget": "1KiB"}, "at least"),
        ("cake", {"budget": "0%"}, "a share is above 0"), ("cake", {"budget": "x%"}, "a share is above 0"),
        ("cake", {"budget": "64"}, "no unit"), ("cake", {"budget": "64 parsecs"}, "not a unit"),
        ("cake", {"gamma": -1.0}, "0 or more"), ("cake", {"tau1": 0.0}, "0.05 or more"),
        ("cake", {"tau2": float("nan")}, "0.05 or more"), ("snapkv", {"window": 0}, "1 or more"),
        ("snapkv", {"kernel": 4}, "odd"), ("pyramidkv", {"beta": 0.5}, "1 or more"),
        ("tova", {"budget": 1}, "at least"), ("tova", {"bits": 5}, "16, 8 or 4"),
        ("full_cache", {"chunk": -1}, "two tokens or more"),
    ],
)  # fmt: skip
def test_bad_fields_are_refused(name, fields, match):
    with pytest.raises(BadInput, match=match):
        policy(name, **fields).apply(MODELS["llama"](), PLACE)


def test_a_gradient_through_it_is_refused():
    model = MODELS["llama"]()
    cache = KeptCache(2, policy("full_cache"))
    with attending(model, cache), pytest.raises(BadInput, match="no backward pass"):
        model(**{k: v for k, v in tiny_batch(model).items() if k == "input_ids"}, past_key_values=cache)


def test_an_interrupted_generation_leaves_the_model_as_it_was():
    model, (ids, mask) = MODELS["llama"](), text()
    before = model.config._attn_implementation

    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(model, TOKENIZER, ids, mask, cache=KeptCache(2, policy("cake")), on_token=stop, max_new_tokens=4)
    assert model.config._attn_implementation == before
    static = {"cache_implementation": "static", "max_new_tokens": 4}
    with pytest.raises(BadInput, match="transformers refuses it"):
        complete(model, TOKENIZER, ids, mask, cache=KeptCache(2, policy("cake")), **static)


def test_a_prompt_shorter_than_the_window_is_kept_whole():
    model, (ids, mask) = MODELS["llama"](), text(2, 6, 2)
    own = complete(model, TOKENIZER, ids, mask, max_new_tokens=8, eos_token_id=2)
    for name in EVICTING:
        cache = KeptCache(2, policy(name))
        assert torch.equal(complete(model, TOKENIZER, ids, mask, cache=cache, max_new_tokens=8, eos_token_id=2), own)


def test_a_cache_is_freed_at_once():
    cache = KeptCache(2, policy("cake"))
    passes(MODELS["llama"](), cache, *text(), [slice(0, 40)])
    row = weakref.ref(cache.layers[0].rows[0])
    gc.disable()
    try:
        del cache
        assert row() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name,fields", [("cake", {"window": 4}), ("pyramidkv", {"window": 4}), ("tova", {})])
def test_the_plan_of_a_deep_model_has_the_whole_budget(name, fields, tmp_path):
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=12,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "deep")
    size = 200 * 1024
    recipe = Recipe(model=str(tmp_path / "deep"), patches=[{name: {"budget": f"{size}B", **fields}}])
    for work in (Work(1, 300, 50), Work(3, 300, 50)):
        planned = plan_inference(recipe, recipe.load_patches(), work).kinds["cache"]
        assert 0.9 * size < planned / work.rows < 1.25 * size


@pytest.mark.parametrize("name,fields", [
    ("cake", {"window": 4, "budget": 24}), ("cake", {"window": 4, "budget": "auto"}),
    ("pyramidkv", {"window": 4, "budget": "50%"}), ("snapkv", {"window": 4, "budget": "100KiB", "bits": 4}),
    ("tova", {"budget": 30}), ("streaming_llm", {"window": 20}), ("full_cache", {}),
])  # fmt: skip
def test_the_plan_of_a_long_reply_takes_as_many_operations_as_that_of_a_short_one(name, fields, tmp_path, monkeypatch):
    MODELS["llama"]().save_pretrained(tmp_path / "tiny")
    recipe = Recipe(model=str(tmp_path / "tiny"), patches=[{name: fields}])
    done, own = [0], Trace.__torch_dispatch__

    def counting(*args, **kwargs):
        done[0] += 1
        return own(*args, **kwargs)

    monkeypatch.setattr(Trace, "__torch_dispatch__", counting)

    def planned(new: int):
        done[0] = 0
        return plan_inference(recipe, recipe.load_patches(), Work(2, 40, new)), done[0]

    assert planned(1_000_000)[1] == planned(1_000)[1]
    quick, operations = planned(20_000)
    monkeypatch.setattr(planned_reply.Unjudged, "judge", lambda self, row, scale: self.policy.judge(row, scale))
    scored, more = planned(20_000)  # each token of the reply is scored, as in a run
    assert (quick.kinds, quick.phase, quick.fast_peak_bytes) == (scored.kinds, scored.phase, scored.fast_peak_bytes)
    assert more > operations or name in ("streaming_llm", "full_cache")
