"""What is particular to the Parallel Adapter: its formula, what it keeps for the pass back, shapes, precisions."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from conftest import MODELS, logits, quantise, tiny_batch
from trimtab.errors import BadInput
from trimtab.methods.parallel_adapter import Adapter, ParallelAdapter
from trimtab.model import anatomy
from world import PLACE, train


def adapter(width: int = 8, r: int = 12, scale: float = 1.5, values: bool = True) -> Adapter:
    random = torch.Generator().manual_seed(0)
    made = Adapter(width, r, scale, torch.device("cpu"), random)
    if values:
        torch.nn.init.normal_(made.values, std=0.5)
        torch.nn.init.normal_(made.keys, std=0.5)
    return made


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (2, 3, 5, 8)], ids=str)
@pytest.mark.parametrize("same", [False, True])
def test_equals_the_formula(shape, same):
    made = adapter().double()
    h = torch.randn(shape, dtype=torch.double, requires_grad=True)
    y = h if same else torch.randn(shape, dtype=torch.double, requires_grad=True)
    grad = torch.randn(shape, dtype=torch.double)
    inputs = (h, made.keys, made.values) if same else (h, y, made.keys, made.values)
    ours = made(h, y)
    plain = y + 1.5 * (h @ made.keys.T).relu() @ made.values
    assert ours.shape == plain.shape and torch.allclose(ours, plain)
    for left, right in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True
    ):
        assert torch.allclose(left, right)


def test_gradcheck():
    made = adapter(4, 6).double()
    h, y = (torch.randn(3, 4, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *inputs: made(*inputs[:2]), (h, y, made.keys, made.values))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradients_in_a_model_equal_a_naive_module(family):
    """In Llama the sum is the FFN's output; in BERT it is what enters the block's last norm."""
    model, plain = MODELS[family](), MODELS[family]()
    surgery = ParallelAdapter(r=16, scale=2.0).apply(model, PLACE)
    train(model, surgery, 2)
    own = {name: t.detach().clone().requires_grad_() for name, t in surgery.own_tensors().items()}
    for ffn in anatomy.ffns(plain):
        keys, values = own[f"{ffn.name}.keys"], own[f"{ffn.name}.values"]

        def naive(h, keys=keys, values=values):
            return 2.0 * torch.relu(torch.einsum("btd,rd->btr", h, keys)) @ values

        if family == "llama":
            ffn.host.register_forward_hook(lambda _, args, out, naive=naive: out + naive(args[0]))
        else:
            inner = ffn.host.forward
            ffn.host.forward = lambda x, h, inner=inner, naive=naive: inner(x, h + naive(h))
    batch = tiny_batch(model)
    model.zero_grad()
    ours, theirs = model(**batch).loss, plain(**batch).loss
    assert torch.allclose(ours, theirs, atol=1e-6)
    ours.backward()
    theirs.backward()
    for name, tensor in surgery.own_tensors().items():
        assert torch.allclose(tensor.grad, own[name].grad, atol=1e-6), name


def test_saved_for_backward_are_h_the_relu_and_the_weights():
    made = adapter(8, 12)
    h, y = torch.randn(5, 8, dtype=torch.bfloat16), torch.randn(5, 8, dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made(h, y)
    assert [(tuple(t.shape), t.dtype) for t in saved] == [
        ((5, 8), torch.bfloat16),
        ((5, 12), torch.bfloat16),
        ((12, 8), torch.float32),
        ((12, 8), torch.float32),
    ]
    pointers = {h.data_ptr(), made.keys.data_ptr(), made.values.data_ptr()}
    assert pointers < {t.data_ptr() for t in saved}, "by reference"


def test_nothing_outlives_the_forward_pass():
    model = MODELS["llama"]()
    ParallelAdapter(r=16).apply(model, PLACE)
    seen = []
    anatomy.ffns(model)[0].host.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    logits(model, tiny_batch(model))
    gc.collect()
    assert seen and all(reference() is None for reference in seen)


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("autocast", [False, True])
def test_precisions(base, family, autocast):
    model = MODELS[family]()
    model = quantise(model) if base == "nf4" else model.bfloat16() if base == "bf16" else model
    batch = tiny_batch(model)
    surgery = ParallelAdapter(r=16).apply(model, PLACE)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = train(model, surgery, 8)
        outputs = logits(model, batch)
    assert losses[-1] < losses[0] and outputs.isfinite().all()
    for tensor in surgery.own_tensors().values():
        assert tensor.dtype == torch.float32 and tensor.grad.dtype == torch.float32


def test_bf16_products_are_near_the_fp32_ones():
    made = adapter(64, 128, 1.0)
    h, y = torch.randn(40, 64), torch.randn(40, 64)
    exact = torch.autograd.grad(made(h, y).square().mean(), (made.keys, made.values))
    rough = torch.autograd.grad(made(h.bfloat16(), y.bfloat16()).float().square().mean(), (made.keys, made.values))
    for left, right in zip(exact, rough, strict=True):
        assert (left - right).norm() / left.norm() < 0.02


def test_no_gradient_is_computed_for_an_input_that_needs_none():
    made = adapter()
    h = torch.randn(5, 8)
    made(h, torch.randn(5, 8)).sum().backward()
    assert h.grad is None and made.keys.grad is not None
    made.keys.requires_grad_(False)
    made.zero_grad()
    made(h, torch.randn(5, 8)).sum().backward()
    assert made.keys.grad is None and made.values.grad is not None


@pytest.mark.parametrize("family", MODELS)
def test_start_names_and_places(family):
    model = MODELS[family]()
    own = ParallelAdapter(r=256, seed=3).apply(model, PLACE).own_tensors()
    for ffn in anatomy.ffns(model):
        keys, values = own[f"{ffn.name}.keys"].detach(), own[f"{ffn.name}.values"]
        assert keys.shape == values.shape == (256, 64)
        assert keys.std() == pytest.approx(0.02, rel=0.05) and not values.any()
        assert f"{ffn.name}.{ParallelAdapter.attribute}.keys" in model.state_dict()
    first, second = (own[f"{ffn.name}.keys"] for ffn in anatomy.ffns(model))
    assert not torch.equal(first, second), "each layer has its own keys"
    other = ParallelAdapter(r=256, seed=4).apply(MODELS[family](), PLACE).own_tensors()
    assert not any(torch.equal(own[name], other[name]) for name in own if name.endswith("keys"))


def test_misfits_are_refused():
    model = MODELS["llama"]()
    with pytest.raises(BadInput):
        ParallelAdapter(r=0).apply(model, PLACE)
    ParallelAdapter(r=8).apply(model, PLACE)
    with pytest.raises(BadInput, match="has one"):
        ParallelAdapter(r=8).apply(model, PLACE)
