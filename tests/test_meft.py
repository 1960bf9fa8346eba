"""What is particular to MEFT: its formula against naive references, its two semantics, what it keeps and moves."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from conftest import MODELS, logits, tiny_batch
from trimtab.contracts import Place
from trimtab.errors import BadInput
from trimtab.methods.meft.patch import Adapter, Meft
from trimtab.methods.parallel_adapter import ParallelAdapter
from trimtab.model import anatomy
from trimtab.tiered.store import GRADS, VALUES, TieredStore
from world import PLACE, train

WIDTH = 8


def adapter(width: int = WIDTH, slow: str = "ram", values: bool = True, **fields) -> Adapter:
    """One layer's adapter on random keys and values."""
    patch = Meft(**{"scale": 1.0, **fields})
    experts, block = patch.layout()
    fields = {"slow": slow, "cap": patch.cap}
    table = TieredStore("layer.router", experts, (width,), **fields) if patch.router == "gate" else None
    made = Adapter(patch, TieredStore("layer", experts, (block, 2 * width), **fields), table)
    if values:
        made.store.whole().normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        router = made.router.weight if table is None else table.whole()
        router.normal_(0, 0.5, generator=torch.Generator().manual_seed(2))
        made.router.refresh()
    return made


def tables(made: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """keys (r, D), values (r, D), router (N, D) as plain tensors that take gradients."""
    whole, D = made.store.whole().clone(), made.width
    tensors = whole[..., :D].reshape(-1, D), whole[..., D:].reshape(-1, D), made.router.weight.clone()
    return tuple(t.clone().requires_grad_() for t in tensors)  # type: ignore[return-value]


def naive_per_token(h: Tensor, y: Tensor, made: Adapter, keys: Tensor, values: Tensor, router: Tensor) -> Tensor:
    """Token by token and pair by pair, from the equations."""
    patch, block = made.patch, made.store.shape[0]
    out, allowed = [], common(h.detach().reshape(-1, h.shape[-1]), router, patch)
    for h_D, y_D in zip(h.reshape(-1, h.shape[-1]), y.reshape(-1, h.shape[-1]), strict=True):
        logits_N = router @ h_D
        probed = sorted(allowed, key=lambda e: -logits_N[e].item())[: patch.probes]
        gates = torch.softmax(logits_N[probed], 0) * len(probed) if patch.router == "gate" else torch.ones(len(probed))
        pairs = [(e * block + b, gates[p]) for p, e in enumerate(probed) for b in range(block)]
        fired = [(g * (keys[i] @ h_D)).relu() for i, g in pairs]
        best = sorted(range(len(pairs)), key=lambda c: -fired[c].item())[: patch.k]
        out.append(y_D + patch.scale * sum((fired[c] * values[pairs[c][0]] for c in best), torch.zeros_like(h_D)))
    return torch.stack(out).view(y.shape)


def common(h: Tensor, router: Tensor, patch: Meft) -> list[int]:
    """The experts that tokens may probe: all, or the `cap` that most tokens want."""
    wants = [(router @ h_D).topk(min(patch.probes, len(router))).indices.tolist() for h_D in h]
    wanted = Counter(expert for of in wants for expert in of)
    if not 0 < patch.cap < len(wanted):
        return list(range(len(router)))
    return sorted(range(len(router)), key=lambda expert: (-wanted[expert], expert))[: patch.cap]


def naive_union(h: Tensor, y: Tensor, made: Adapter, keys: Tensor, values: Tensor, router: Tensor) -> Tensor:
    """Algorithm 1: all tokens see the pairs that any of them chose."""
    patch, block = made.patch, made.store.shape[0]
    chosen: set[int] = set()
    for h_D in h.detach().reshape(-1, h.shape[-1]):
        candidates = [e * block + b for e in (router @ h_D).topk(patch.probes).indices.tolist() for b in range(block)]
        scores = torch.stack([(keys[i] @ h_D).relu() for i in candidates])
        chosen |= {candidates[c] for c in scores.topk(min(patch.k, len(candidates))).indices.tolist() if scores[c] > 0}
    ids = sorted(chosen)
    return y + patch.scale * (h @ keys[ids].T).relu() @ values[ids]


def row_gradients(made: Adapter, store: TieredStore | None = None) -> Tensor:
    """(N, B, 2 D), or of the router (N, D): what each row has to be stepped with; zeros where nothing came."""
    store = store or made.store
    grads = torch.zeros_like(store.whole(GRADS))
    for row in store.pending():
        grads[row] = store.part(GRADS, row)
    return grads


LAYERS = {
    "gate": {"r": 24, "experts": 6, "probes": 2, "k": 3},
    "gate, all candidates": {"r": 24, "experts": 6, "probes": 3, "k": 64, "scale": 1.5},
    "fixed": {"r": 24, "experts": 6, "probes": 2, "k": 3, "router": "fixed"},
    "capped": {"r": 24, "experts": 8, "probes": 2, "k": 3, "cap": 3},
    "one pair each": {"r": 12, "experts": 12, "probes": 4, "k": 2, "router": "centroid"},
    "union": {"r": 24, "experts": 6, "probes": 2, "k": 3, "semantics": "union", "router": "fixed", "scale": 0.5},
}


@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("slow", ["ram", "disk"])
@pytest.mark.parametrize("same", [False, True])
def test_equals_the_equations_with_all_gradients(fields, slow, same):
    made = adapter(slow=slow, **fields)
    keys, values, router = tables(made)
    h = torch.randn(2, 5, WIDTH, requires_grad=True)
    y = h if same else torch.randn(2, 5, WIDTH, requires_grad=True)
    ours = made(h, y)
    naive = naive_union if made.patch.semantics == "union" else naive_per_token
    plain = naive(h, y, made, keys, values, router)
    assert torch.allclose(ours, plain, atol=1e-5)
    grad = torch.randn_like(ours)
    inputs = (h,) if same else (h, y)
    ours_back = torch.autograd.grad(ours, (*inputs, made.trained), grad)
    plain_back = torch.autograd.grad(plain, (*inputs, keys, values, router), grad, allow_unused=True)
    for left, right in zip(ours_back[: len(inputs)], plain_back[: len(inputs)], strict=True):
        assert torch.allclose(left, right, atol=1e-5)
    grad_keys, grad_values, grad_router = plain_back[len(inputs) :]
    rows = row_gradients(made)
    assert torch.allclose(rows[..., :WIDTH].reshape(-1, WIDTH), grad_keys, atol=1e-5)
    assert torch.allclose(rows[..., WIDTH:].reshape(-1, WIDTH), grad_values, atol=1e-5)
    if made.patch.router == "gate":
        assert grad_router.abs().max() > 1e-3
        assert torch.allclose(row_gradients(made, made.router.table), grad_router, atol=1e-5)


@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("retrieval", ["fast", "slow"])
def test_rows_that_are_copied_before_they_are_computed_with_give_the_same(fields, retrieval, monkeypatch):
    monkeypatch.setattr(TieredStore, "in_place", False)  # as before an accelerator
    test_equals_the_equations_with_all_gradients({**fields, "retrieval": retrieval}, "ram", False)


@pytest.mark.parametrize("router", ["gate", "fixed"])
def test_matched_in_the_slow_tier_only_experts_that_fired_are_brought_up(router, monkeypatch):
    monkeypatch.setattr(TieredStore, "in_place", False)
    moved = {}
    for retrieval in ("fast", "slow"):
        made = adapter(r=48, experts=12, probes=4, k=1, router=router, retrieval=retrieval)
        made(h := torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(5)), h)
        moved[retrieval] = made.store.traffic
    row, short = 4 * 2 * WIDTH * 4, 6 * (4 + 2)  # bytes of an expert, of the tokens' best scores and their places
    assert moved["slow"].misses < moved["fast"].misses <= 12
    assert moved["slow"].up == moved["slow"].misses * row + short and moved["fast"].up == moved["fast"].misses * row
    assert moved["slow"].down == h.nbytes and moved["fast"].down == 0


def test_one_expert_and_all_pairs_equal_the_dense_adapter():
    dense, sparse = MODELS["llama"](), MODELS["llama"]()
    theirs = ParallelAdapter(r=16, scale=2.0).apply(dense, PLACE)
    ours = Meft(r=16, experts=1, probes=1, k=16, scale=2.0).apply(sparse, PLACE)
    train(dense, theirs, 2)
    dense_own = theirs.own_tensors()
    own = ours.own_tensors()
    with torch.no_grad():
        for name, tensor in dense_own.items():
            own[name].copy_(tensor.view(1, 16, 64))
    batch = tiny_batch(dense)
    assert torch.allclose(logits(sparse, batch), logits(dense, batch), atol=1e-5)
    for model in (dense, sparse):
        model.zero_grad()
        model.enable_input_require_grads()
        model(**batch).loss.backward()
    for name, made in ours.adapters.items():
        rows = row_gradients(made)[0]
        assert torch.allclose(rows[:, :64], dense_own[f"{name}.keys"].grad, atol=1e-5)
        assert torch.allclose(rows[:, 64:], dense_own[f"{name}.values"].grad, atol=1e-5)
        assert rows.abs().max() > 1e-4


def test_a_tokens_output_does_not_depend_on_its_batch():
    model = MODELS["llama"]()
    surgery = Meft(r=64, experts=16, probes=3, k=5).apply(model, PLACE)
    train(model, surgery, 4)
    batch = tiny_batch(model)
    together = model(**batch).logits
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        alone = model(input_ids=batch["input_ids"][row : row + 1, :length]).logits
        assert torch.allclose(alone[0], together[row, :length], atol=1e-5)


@pytest.mark.parametrize("semantics", ["per_token", "union"])
def test_a_cap_bounds_what_training_brings_up_and_nothing_else(semantics):
    """In a pass of many tokens; few tokens probe what they want, and with the model in evaluation all do."""
    router = {"semantics": semantics, "router": "gate" if semantics == "per_token" else "fixed"}
    free, made = (adapter(r=96, experts=24, probes=4, k=6, cap=cap, **router) for cap in (0, 6))
    h = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(3))
    for each in (free, made):
        each(h, h).sum().backward()
    assert len(free.store.pending()) > 12 and 4 <= len(made.store.pending()) <= 6
    assert made.store.traffic.misses <= 3 * 6 and made.router.route(h)[0].unique().numel() <= 6
    assert torch.equal(made(h[:1], h[:1]), free(h[:1], h[:1])), "a token alone wants no more than the cap"
    assert not torch.allclose(made(h, h), free(h, h), atol=1e-3)
    for each in (free, made):
        each.eval()
    assert torch.equal(made(h, h), free(h, h))


@pytest.mark.parametrize("fields", [{}, {"semantics": "union", "router": "centroid"}, {"cap": 3}, {"moments": "bf16"},
                                    {"adam": "exact"}, {"balance": 0.1, "revive": 3}], ids=str)  # fmt: skip
def test_ram_file_and_hot_slots_are_the_same_bit_for_bit(fields):
    ends = []
    for slow, cache in (("ram", 0.0), ("disk", 0.0), ("disk", 3 * 9000 / 2**30), ("ram", 1.0)):
        model = MODELS["llama"]()
        patch = Meft(r=64, experts=16, probes=2, k=6, cache=cache, scale=1.0, **fields)
        surgery = patch.apply(model, Place(fast="cpu", slow=slow))
        train(model, surgery, 50)
        ends.append({key: tensor.detach().clone() for key, tensor in surgery.own_tensors().items()})
    for end in ends[1:]:
        assert all(torch.equal(end[key], ends[0][key]) for key in ends[0])


@pytest.mark.parametrize("semantics", ["per_token", "union"])
def test_accumulated_micro_batches_equal_one_batch(semantics):
    """Rows do not move inside the window, and a row's gradients add up."""
    made = adapter(r=24, experts=6, probes=2, k=64, semantics=semantics, router="fixed")
    h = torch.randn(8, WIDTH)
    made(h, h).square().sum().backward()
    whole = row_gradients(made)
    made.store.stepped()
    for part in h.split(2) if semantics == "per_token" else (h,):
        made(part, part).square().sum().backward()
    assert torch.allclose(row_gradients(made), whole, atol=1e-5) and whole.abs().max() > 0


def test_only_h_the_experts_and_the_k_scores_are_kept_for_the_pass_back():
    made = adapter(r=64, experts=8, probes=4, k=3)
    h, y = (torch.randn(5, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made(h, y)
    assert [(tuple(t.shape), t.dtype) for t in saved] == [
        ((5, WIDTH), torch.bfloat16), ((5, 4), torch.int32), ((5, 4), torch.float32), ((5, 3), torch.float32),
        ((5, 3), torch.int16),
    ]  # fmt: skip
    assert saved[0].data_ptr() == h.data_ptr(), "by reference"


def test_traffic_equals_the_formula():
    """Probed experts come up; those of which a pair fired come up again in the pass back, their gradients go down."""
    made = adapter(r=64, experts=16, probes=4, k=2)
    h = torch.randn(6, WIDTH)
    probed_TP, gate_TP = made.router.route(h)[:2]
    keys = made.store.whole()[..., :WIDTH]
    scores_TPB = torch.einsum("td,tpbd->tpb", h, keys[probed_TP]) * gate_TP[..., None]
    best_TC = scores_TPB.relu().flatten(1).argsort(1, descending=True)[:, :2]
    at_TP = (torch.zeros(6, 16).scatter_(1, best_TC, 1) * (scores_TPB.flatten(1) > 0)).view(6, 4, 4).any(-1)
    probed, fired = len(probed_TP.unique()), len(probed_TP[at_TP].unique())
    made(h, h).sum().backward()
    moved, row = made.store.traffic, 4 * 2 * WIDTH * 4  # pairs of an expert * numbers * bytes
    assert 0 < fired < probed
    assert (moved.up, moved.down, moved.misses) == ((probed + fired) * row, fired * row, probed + fired)
    assert len(made.store.pending()) == fired


@pytest.mark.parametrize("family", MODELS)
def test_start(family):
    model = MODELS[family]()
    own = Meft(r=256, seed=3).apply(model, PLACE).own_tensors()
    for ffn in anatomy.ffns(model):
        keys, values, router = (own[f"{ffn.name}.{kind}"].detach() for kind in ("keys", "values", "router"))
        assert keys.shape == values.shape == (32, 8, 64) and router.shape == (32, 64)
        assert keys.std() == pytest.approx(0.02, rel=0.05) and not values.any()
        assert torch.allclose(router, torch.nn.functional.normalize(keys.mean(1)), atol=1e-6)
    first, second = (own[f"{ffn.name}.keys"] for ffn in anatomy.ffns(model))
    assert not torch.equal(first, second), "each layer has its own keys"
    other = Meft(r=256, seed=4).apply(MODELS[family](), PLACE).own_tensors()
    assert not any(torch.equal(own[name], other[name]) for name in own if name.endswith("keys"))


def test_widths_are_rounded_up_to_whole_experts():
    assert Meft(r=1024).layout() == (128, 8) and Meft(r=16384).layout() == (1490, 11)
    assert Meft(r=16384, probes=2).layout() == (512, 32), "a token has k candidates"
    assert Meft(r=40).layout() == (5, 8) and Meft(r=4, probes=1).layout() == (1, 4)
    for r in (1, 2, 3200, 6400, 32768):
        experts, block = Meft(r=r).layout()
        assert r <= experts * block < r + block
    assert Meft(r=100, experts=7).layout() == (7, 15)
    said = Meft(r=100, experts=7, probes=7).apply(MODELS["llama"](), PLACE).notes
    assert said == ("meft: r 100 is rounded up to 105: 7 experts of 15 pairs",)
    assert Meft(r=64, k=16).apply(MODELS["llama"](), PLACE).notes == ()


def test_centroids_follow_the_keys():
    model = MODELS["llama"]()
    surgery = Meft(r=64, router="centroid").apply(model, PLACE)
    before = {name: tensor.clone() for name, tensor in surgery.own_tensors().items() if name.endswith("router")}
    train(model, surgery, 6)
    own = surgery.own_tensors()
    for name, router in before.items():
        keys = own[name.replace("router", "keys")]
        assert torch.allclose(own[name], torch.nn.functional.normalize(keys.mean(1)), atol=1e-6)
        assert not torch.equal(own[name], router)


def test_balance_evens_the_load():
    shares = {}
    for balance in (0.0, 0.05):
        made = adapter(r=64, experts=16, probes=2, balance=balance, router="fixed").train()
        h = torch.randn(64, WIDTH) + 2.0  # tokens that look alike load few experts
        for step in range(100):
            probed = made.router.route(h)[0]
            made.after_step(step, [])
        shares[balance] = torch.bincount(probed.flatten(), minlength=16).max().item() / probed.numel()
    assert shares[0.05] < 0.5 * shares[0.0]


def test_a_dead_expert_is_revived_where_a_token_is_served_worst():
    made = adapter(r=64, experts=16, probes=2, revive=3, router="fixed").train()
    h = torch.randn(64, WIDTH) + 2.0
    before = made.store.whole().clone()
    for step in range(4):
        probed = made.router.route(h)[0]
        made.after_step(step, [])
    dead = sorted(set(range(16)) - set(probed.unique().tolist()))
    revived = made.store.dirty_rows()
    assert len(revived) == 8 and set(revived) <= set(dead)
    after = made.store.whole()
    alive = [row for row in range(16) if row not in revived]
    assert not after[revived][..., WIDTH:].any() and torch.equal(after[alive], before[alive])
    assert made.router.route(h)[0].unique().numel() > probed.unique().numel()


@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_is_in_training_if_its_model_is(training):
    surgery = Meft(r=64).apply(MODELS["llama"]().train(training), PLACE)
    assert all(m.training == training for made in surgery.adapters.values() for m in made.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_store_survives_casts_and_moves(dtype):
    model = MODELS["llama"]()
    surgery = Meft(r=64).apply(model, PLACE)
    train(model, surgery, 3)
    rows = {name: made.store.whole(VALUES).clone() for name, made in surgery.adapters.items()}
    model = Accelerator(cpu=True).prepare(model.to(dtype).to("cpu"))
    batch = tiny_batch(model)
    assert logits(model, batch).isfinite().all()
    assert all(torch.equal(made.store.whole(VALUES), rows[name]) for name, made in surgery.adapters.items())


NAN, INF = float("nan"), float("inf")
MISFITS = [{"r": 0}, {"probes": 0}, {"k": 0}, {"experts": 9, "r": 8}, {"router": "gates"}, {"adam": "fast"},
           {"cap": 7, "probes": 8}, {"cap": -1},
           {"semantics": "union"}, {"moments": "int3"}, {"prefetch": "guess"}, {"cache": -1.0}, {"revive": -1},
           *({"scale": x} for x in (0.0, -1.0, NAN, INF)), *({"balance": x} for x in (-1.0, NAN, INF)),
           {"cache": NAN}, {"cache": INF}]  # fmt: skip


@pytest.mark.parametrize("fields", MISFITS, ids=str)
def test_misfits_are_refused(fields):
    model = MODELS["llama"]()
    with pytest.raises(BadInput):
        Meft(**fields).apply(model, PLACE)
    Meft(r=8).apply(model, PLACE)
    with pytest.raises(BadInput, match="has one"):
        Meft(r=8).apply(model, PLACE)
