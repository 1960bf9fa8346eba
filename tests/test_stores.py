"""What the engine does for tables: their rows count in the global norm, and clipping reaches them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from conftest import MODELS, tiny_batch
from trimtab.engine.tables import ClipsRows, reading, row_parameters, summary, traffic
from trimtab.methods.meft import Meft
from trimtab.tiered.store import GRADS
from world import PLACE, train


def after_a_backward_pass(limit: float):
    model = MODELS["llama"]()
    surgery = Meft(r=64).apply(model, PLACE)
    train(model, surgery, 2)
    model.zero_grad()
    (100 * model(**tiny_batch(model)).loss).backward()
    trainer = ClipsRows()
    trainer.job, trainer.args = SimpleNamespace(surgeries=[surgery]), SimpleNamespace(max_grad_norm=limit)
    trainer.accelerator = SimpleNamespace(unscale_gradients=lambda: None)
    return model, surgery, trainer


def grads(model, surgery) -> list[torch.Tensor]:
    rows = [store.grad_scale * store.part(GRADS, row) for store in surgery.stores for row in store.pending()]
    return [p.grad.clone() for p in model.parameters() if p.grad is not None] + rows


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_the_norm_is_over_parameters_and_rows_and_both_are_clipped(limit):
    model, surgery, trainer = after_a_backward_pass(limit)
    before = grads(model, surgery)
    norm = torch.stack([g.double().square().sum() for g in before]).sum().sqrt()
    assert float(trainer._clip_grad_norm(model)) == pytest.approx(float(norm), rel=1e-5)
    factor = min(1.0, limit / float(norm))
    assert (factor < 1) == (limit < 1)
    assert all(torch.allclose(a * factor, b, rtol=1e-4) for a, b in zip(before, grads(model, surgery), strict=True))


def test_without_clipping_the_norm_is_only_told():
    model, surgery, trainer = after_a_backward_pass(0.5)
    before = grads(model, surgery)
    assert float(trainer._get_grad_norm(model)) > 1
    assert all(torch.equal(a, b) for a, b in zip(before, grads(model, surgery), strict=True))


def test_numbers_and_traffic_are_counted():
    _, surgery, _ = after_a_backward_pass(1.0)
    rows = surgery.stores[0].rows
    assert row_parameters([surgery]) == 2 * (64 * 2 + rows) * 64  # layers, keys, values, router, hidden
    moved = traffic([surgery], 3)
    assert moved["store_up_bytes_per_step"] == sum(store.traffic.up for store in surgery.stores) // 3 > 0
    assert moved["store_slow_bytes"] == sum(store.nbytes["slow"] for store in surgery.stores) and traffic([], 3) == {}


def test_reads_are_told_by_token():
    model, surgery, _ = after_a_backward_pass(1.0)
    ids = tiny_batch(model)["input_ids"]
    hooks, before = len(model.get_input_embeddings()._forward_pre_hooks), [store.traffic.up for store in surgery.stores]
    with torch.no_grad(), reading(model, [surgery]) as reads:
        assert reads() == {}
        model.eval().generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    found = reads()
    up = sum(store.traffic.up - was for store, was in zip(surgery.stores, before, strict=True))
    assert found["tokens"] == ids.numel() + 3 * len(ids), "each later token passes alone, and the last one not at all"
    assert found["store_up_bytes_per_token"] == up // found["tokens"] > 0
    assert found["store_rows_per_token"] > 0 and found["store_hit_rate"] == 0 and "KiB read per token" in summary(found)
    assert len(model.get_input_embeddings()._forward_pre_hooks) == hooks
    with reading(model, []) as reads:
        model(input_ids=ids)
    assert reads() == {}
