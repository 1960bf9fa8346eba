"""Seconds by hand, from given rates; the cache of rates."""

from __future__ import annotations

import json

import pytest
import torch

from trimtab.cost import rates as rates_file
from trimtab.cost.rates import SMALL
from trimtab.cost.roofline import Clock, read_again, work
from trimtab.cost.trace import StepCost, extend
from trimtab.model import fused_experts as fused_experts  # makes an operation
from world import MACHINE, flat

ATEN = torch.ops.aten


def seconds(func, *args, **kwargs) -> float:
    return work(flat(), func, args, kwargs, func(*args, **kwargs))


def test_products_by_hand():
    a, b = torch.ones(256, 256), torch.ones(256, 512)
    flops = 2 * 256 * 256 * 512
    assert flops > SMALL
    assert seconds(ATEN.mm.default, a, b) == pytest.approx(flops / 1e9)
    assert seconds(ATEN.addmm.default, torch.ones(512), a, b) == pytest.approx(flops / 1e9)
    assert seconds(ATEN.addmm_.default, torch.ones(256, 512), a, b) == pytest.approx(flops / 1e9)
    assert seconds(ATEN.mm.default, a.bfloat16(), b.bfloat16()) == pytest.approx(flops / 2e9)
    experts = torch.ones(12, 256), b.expand(3, 256, 512), torch.tensor([4, 8, 12])
    assert seconds(torch.ops.trimtab.rows_by_expert.default, *experts) == pytest.approx(2 * 12 * 256 * 512 / 1e9)
    batches = a.expand(3, 256, 256), b.expand(3, 256, 512)
    assert seconds(ATEN.bmm.default, *batches) == pytest.approx(3 * flops / 1e9)


def test_small_products_are_slower_and_none_is_faster_than_its_operands():
    a, b = torch.ones(32, 32), torch.ones(32, 32)
    rates = flat(products={"float32": [1e8, 1e15]})
    assert work(rates, ATEN.mm.default, (a, b), {}, a @ b) == pytest.approx(2 * 32**3 / 1e8)
    thin, wide = torch.ones(4096, 1), torch.ones(1, 4096)
    moved = 4 * (4096 + 4096 + 4096**2)
    assert work(rates, ATEN.mm.default, (thin, wide), {}, thin @ wide) == pytest.approx(moved / 1e9)


def test_traffic_by_hand():
    x, wide = torch.ones(1024), torch.ones(32, 32)
    assert seconds(ATEN.add.Tensor, x, x) == pytest.approx(3 * 4096 / 1e9)
    assert seconds(ATEN.exp.default, x) == pytest.approx(2 * 4096 / 1e9)
    assert seconds(ATEN.bernoulli_.float, x.clone(), 0.9) == pytest.approx(1024 / 1e7), "drawn one by one"
    assert seconds(ATEN.copy_.default, x.clone(), x) == pytest.approx(2 * 4096 / 1e9), "what is overwritten is not read"
    assert seconds(ATEN.clone.default, wide.t(), memory_format=torch.contiguous_format) == pytest.approx(8192 / 1e9)
    picked = seconds(ATEN.embedding.default, torch.ones(9999, 4), torch.tensor([1, 2]))
    assert picked == pytest.approx((2 * 32 + 16) / 1e9), "two rows are read, not the table"
    bags = torch.ones(9999, 4), torch.tensor([1, 2, 3]), torch.tensor([0, 2])
    for bag in (ATEN._embedding_bag, ATEN._embedding_bag_forward_only):
        assert seconds(bag.default, *bags) == pytest.approx((3 * 16 + 2 * 16) / 1e9), "three rows for two sums"
    assert seconds(ATEN.t.default, wide) == 0.0, "a view costs its overhead only"
    assert seconds(ATEN.expand.default, x[:1], [1024]) == 0.0


def test_attention_and_update_by_hand():
    q = torch.ones(1, 2, 16, 8)
    flops = 4 * q.numel() * 16
    assert seconds(ATEN._scaled_dot_product_flash_attention_for_cpu.default, q, q, q) == pytest.approx(flops / 1e9)
    weight = torch.nn.Parameter(torch.ones(1000))
    weight.grad = torch.ones(1000)
    optimizer, clock = torch.optim.AdamW([weight], fused=True), Clock(flat())
    optimizer.step()
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.append(func._schema.name)
            clock.add("optimizer", func, args, kwargs or {}, out)
            return out

    with Watch():
        optimizer.step()
    assert "aten::_fused_adamw_" in seen
    assert clock.phases["optimizer"] == pytest.approx(28_000 / 7e8 + clock.operations * 1e-6, rel=0.02)


def test_a_deep_stack_lies_on_the_line_and_micro_batches_share_the_update():
    shallow, deep = (
        StepCost({}, seconds={"blocks": float(n), "backward": back, "optimizer": 0.5 * n, "evaluation": 9.0})
        for n, back in ((2, 3.0), (4, 5.0))
    )
    cost = extend(shallow, deep, (2, 4), 10)
    assert cost.step_seconds(1) == pytest.approx(10 + 11 + 5)
    assert cost.step_seconds(8) == pytest.approx(4 * (10 + 11) + 5), "two of them were traced"
    assert StepCost({}).step_seconds(1) is None and extend(shallow, StepCost({}), (2, 4), 10).seconds is None


def test_what_memory_cannot_keep_is_read_on_each_way():
    assert read_again(100, 100, 4) == 0
    assert read_again(100, 60, 1) == 80
    assert read_again(100, -5, 3) == 600


def test_rates_come_back_from_the_cache(tmp_path):
    rates = flat(disk={"read": 1e9, "write": 1e8})
    assert rates_file.load(MACHINE, tmp_path) is None
    assert rates_file.save(rates, tmp_path) and rates_file.load(MACHINE, tmp_path) == rates
    assert rates_file.load({**MACHINE, "threads": 1}, tmp_path) is None
    assert [p.name for p in (tmp_path / "rates").iterdir()] == [rates_file.path_of(MACHINE, tmp_path).name]


def _without(tree, key):
    return {name: value for name, value in tree.items() if name != key}


@pytest.mark.parametrize(
    "damage",
    [
        lambda tree: "", lambda tree: "[1, 2]", lambda tree: json.dumps(tree)[:200], lambda tree: "[" * 100_000,
        lambda tree: json.dumps({**tree, "form": 0}), lambda tree: json.dumps(_without(tree, "update")),
        lambda tree: json.dumps({**tree, "overhead": -1}), lambda tree: json.dumps({**tree, "products": {}}),
        lambda tree: json.dumps({**tree, "attention": {"bfloat16": 1.0}}),
        lambda tree: json.dumps({**tree, "new": 1}),
        lambda tree: json.dumps({**tree, "products": {"float32": ["a", 1]}}),
        lambda tree: json.dumps({**tree, "products": {"float32": [1.0]}}),
        lambda tree: json.dumps({**tree, "overhead": float("nan")}),
    ],
)  # fmt: skip
def test_a_damaged_cache_counts_as_none(tmp_path, damage):
    rates_file.save(flat(), tmp_path)
    path = rates_file.path_of(MACHINE, tmp_path)
    path.write_text(damage(json.loads(path.read_text())))
    assert rates_file.load(MACHINE, tmp_path) is None
