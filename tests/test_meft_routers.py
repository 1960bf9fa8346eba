"""Switch's and StableMoE's routers: against the equations, over the stages of a run, and what they cost to plan."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import MODELS, logits, tiny_batch
from trimtab.errors import BadInput
from trimtab.methods.meft.patch import Adapter, Meft
from trimtab.methods.meft.routing import StableRouter, Words
from trimtab.tiered.store import GRADS, VALUES, TieredStore
from world import PLACE, train

WIDTH, EMBEDDED = 8, 6
SWITCH = {"r": 24, "experts": 6, "probes": 1, "k": 3, "router": "switch", "scale": 1.5}
STABLE = {"r": 24, "experts": 6, "probes": 2, "k": 5, "router": "stable"}


def adapter(words: Words | None = None, **fields) -> Adapter:
    """One layer's adapter on random rows."""
    patch = Meft(**{"scale": 1.0, **fields})
    experts, block = patch.layout()
    shapes = {"layer": (block, 2 * WIDTH), "layer.router": (WIDTH,), "layer.words": (EMBEDDED,)}
    stores = [TieredStore(name, experts, shape, slow="ram") for name, shape in shapes.items()]
    made = Adapter(patch, *stores[: 3 if words is not None else 2], words=words)
    for seed, store in enumerate(made.stores):
        store.whole().normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    made.router.refresh()
    if isinstance(made.router, StableRouter):
        made.router.refresh_words()
    return made.train()


def leaves(made: Adapter) -> list[Tensor]:
    """keys (N, B, D), values, router (N, D) and words (N, E), as plain tensors that take gradients."""
    rows = made.store.whole()
    found = [rows[..., :WIDTH], rows[..., WIDTH:], *(store.whole() for store in made.stores[1:])]
    return [tensor.clone().requires_grad_() for tensor in found]


def output(made: Adapter, h: Tensor, chosen: list[list[int]], gates: list[Tensor], keys: Tensor, values: Tensor):
    """What a token's chosen experts add, pair by pair."""
    out = []
    for h_D, experts, gate_P in zip(h, chosen, gates, strict=True):
        pairs = [(gate * (key @ h_D)).relu() for e, gate in zip(experts, gate_P, strict=True) for key in keys[e]]
        of = [value for e in experts for value in values[e]]
        best = sorted(range(len(pairs)), key=lambda c: -pairs[c].item())[: made.patch.k]
        out.append(made.patch.scale * sum((pairs[c] * of[c] for c in best), torch.zeros_like(h_D)))
    return torch.stack(out)


def naive_switch(made: Adapter, h: Tensor, keys: Tensor, values: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    tokens, experts = len(h), len(router)
    shares = torch.stack([(router @ h_D).softmax(0) for h_D in h])
    chosen = [int(share.argmax()) for share in shares]
    room = made.patch.capacity and -(-made.patch.capacity * tokens // experts)
    served = [not room or chosen[:at].count(e) < room for at, e in enumerate(chosen)]
    gates = [share[[e]] * ok for share, e, ok in zip(shares, chosen, served, strict=True)]
    loss = sum((chosen.count(e) / tokens * shares[:, e].mean() for e in range(experts)), torch.zeros(()))
    return output(made, h, [[e] for e in chosen], gates, keys, values), 0.01 * experts * loss


def naive_stable(made: Adapter, h: Tensor, x: Tensor, keys: Tensor, values: Tensor, router: Tensor, words: Tensor):
    tokens, experts, probes = len(h), len(router), made.patch.probes
    scores, guesses, second = h @ router.T, x @ words.T, bool(made.router.frozen)
    chosen = [row.argsort(descending=True)[:probes].tolist() for row in (guesses if second else scores)]
    gates = [row[of].sigmoid() for row, of in zip(scores, chosen, strict=True)]
    counts = [sum(e in of for of in chosen) for e in range(experts)]
    mean = sum(counts) / experts
    balance = sum(((counts[e] - mean) / mean * g for of, gs in zip(chosen, gates, strict=True)
                   for e, g in zip(of, gs, strict=True)), torch.zeros(()))  # fmt: skip
    logs = guesses.log_softmax(1)
    distilled = -torch.stack([logs[t, e] for t, of in enumerate(chosen) for e in of]).mean()
    loss = torch.zeros(()) if second else 0.3 * balance / tokens + distilled
    return output(made, h, chosen, gates, keys, values), loss


def compare(made: Adapter, h: Tensor, expected: tuple[Tensor, Tensor], plain: list[Tensor], factor: float) -> None:
    """Output, loss and all gradients, of a random combination of both."""
    ours = made(h, torch.zeros_like(h))
    loss = made.router_loss if made.router_loss is not None else torch.zeros(())
    assert torch.allclose(ours, expected[0], atol=1e-5) and torch.allclose(loss, expected[1], atol=1e-6)
    grad = torch.randn_like(ours)
    (ours_h,) = torch.autograd.grad((ours * grad).sum() + factor * loss, h)
    want = torch.autograd.grad((expected[0] * grad).sum() + factor * expected[1], [h, *plain], allow_unused=True)
    assert torch.allclose(ours_h, want[0], atol=1e-5)
    got = []
    for store in made.stores:
        rows = torch.zeros_like(store.whole(GRADS))
        for row in store.pending():
            rows[row] = store.part(GRADS, row)
        got.append(rows)
    for left, right in zip([got[0][..., :WIDTH], got[0][..., WIDTH:], *got[1:]], want[1:], strict=True):
        assert torch.allclose(left, torch.zeros_like(left) if right is None else right, atol=1e-5)


@pytest.mark.parametrize("capacity", [0, 0.5, 1.25, 100.0])
def test_switch_equals_the_equations(capacity):
    made, h = adapter(**SWITCH, capacity=capacity), torch.randn(17, WIDTH, requires_grad=True)
    plain = leaves(made)
    expected = naive_switch(made, h, *plain)
    passed = (expected[0] == 0).all(1).sum()
    assert capacity != 0.5 or passed > 3, "with little room several tokens pass their expert by"
    compare(made, h, expected, plain, 3.0)


@pytest.mark.parametrize("second", [False, True])
def test_stable_equals_the_equations_in_both_stages(second):
    made, x = adapter(words := Words(), **STABLE), torch.randn(1, 17, EMBEDDED)
    words(torch.nn.Identity(), None, x)
    made.router.frozen.fill_(second)
    h, plain = torch.randn(17, WIDTH, requires_grad=True), leaves(made)
    compare(made, h, naive_stable(made, h, x[0], *plain), plain, 3.0)
    assert bool(made.stores[2].pending()) != second, "D learns in the first stage only"


def test_switch_evens_the_load_and_a_capacity_is_for_training_alone():
    most = {}
    for balance in (0.0, 1.0):
        made = adapter(**{**SWITCH, "r": 64, "experts": 16, "balance_loss": balance}, capacity=1.0)
        h = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(5)) + 2.0  # tokens alike
        router = made.router.table
        for _ in range(100):
            made(h, h)
            made.router_loss.backward()
            for row in router.pending():
                router.part(VALUES, row).sub_(router.part(GRADS, row), alpha=0.1)
            for store in made.stores:
                store.forget()
            made.router.refresh()
        routed = made.router.route(h)
        most[balance] = torch.bincount(routed.probed_TP.flatten()).max().item()
        assert (routed.gate_TP == 0).sum() == sum(max(0, n - 4) for n in torch.bincount(routed.probed_TP.flatten()))
        made.eval()
        assert made.router.route(h).loss is None and (made.router.route(h).gate_TP > 0).all()
    assert most[1.0] < 0.5 * most[0.0]


def test_the_second_stage_chooses_by_the_word_alone():
    model = MODELS["llama"]()
    surgery = Meft(**{**STABLE, "r": 64, "experts": 16, "first_stage": 0.75}).apply(model.train(), PLACE)
    first, start = next(iter(surgery.adapters.values())), {}
    for name, tensor in surgery.own_tensors().items():
        start[name] = tensor.clone()
    train(model, surgery, 4)
    half = {name: tensor.clone() for name, tensor in surgery.own_tensors().items()}
    assert first.router.frozen and not start["model.layers.0.mlp.frozen"]
    train(model, surgery, 4)
    own = surgery.own_tensors()
    for name, tensor in own.items():
        if name.endswith("words"):
            assert torch.equal(tensor, half[name]) and not torch.equal(tensor, start[name])
        if name.endswith("router"):
            assert not torch.equal(tensor, half[name]), "the gates still learn"
    seen, route = [], first.router.route
    first.router.route = lambda h: seen.append(route(h)) or seen[-1]
    ids = torch.tensor([[7, 8, 9, 7], [9, 7, 7, 8]])
    logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    probed = seen[-1].probed_TP.sort(1).values.view(2, 4, -1)
    for word in (7, 8, 9):
        assert len(probed[ids == word].unique(dim=0)) == 1


MISFITS = [
    ({"router": "switch"}, "Set probes: 1"),
    ({"router": "switch", "probes": 1, "capacity": -1.0}, "0 or more"),
    ({"router": "switch", "probes": 1, "first_stage": 0.1}, "only router: stable has it"),
    ({"capacity": 1.25}, "only router: switch has it"),
    ({"balance_loss": 0.1}, "only router: switch and stable has it"),
    ({"router": "stable", "first_stage": 0.0}, "a share of the steps"),
    ({"router": "stable", "first_stage": float("nan")}, "a share of the steps"),
    ({"router": "stable", "balance_loss": float("inf")}, "0 or more"),
    ({"router": "stable", "revive": 3}, "frozen"),
    ({"router": "stable", "semantics": "union"}, "no gate"),
    ({"router": "switch", "probes": 1, "semantics": "union"}, "no gate"),
]


@pytest.mark.parametrize(("fields", "said"), MISFITS, ids=str)
def test_fields_that_do_not_go_together_are_refused(fields, said):
    with pytest.raises(BadInput, match=said):
        Meft(**{"r": 64, **fields}).apply(MODELS["llama"](), PLACE)


def test_words_are_needed():
    model = MODELS["llama"]()
    Meft(**{**STABLE, "r": 64, "experts": 16}).apply(model, PLACE)
    with pytest.raises(BadInput, match="has 3 tokens, and the input embeddings made 0 vectors"):
        model(inputs_embeds=torch.zeros(1, 3, 64))


def test_checkpointing_that_would_drop_the_loss_is_refused():
    model = MODELS["llama"]().train()
    surgery = Meft(**{**SWITCH, "r": 64, "experts": 16}).apply(model, PLACE)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model(**tiny_batch(model))
    with pytest.raises(BadInput, match="use_reentrant"):
        surgery.penalty()
