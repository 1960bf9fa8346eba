"""PaCA against full fine-tuning restricted to columns I, what it saves for backward, and its two forms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import trimtab
from conftest import MODELS, logits, quantise, tiny_batch
from trimtab.errors import BadInput
from trimtab.methods.paca import PaCA, PartialLinear
from trimtab.model import quant
from world import same, train, values

PLACE = trimtab.Place(fast="cpu")
FORMS = pytest.mark.parametrize("form", ["side", "live"])
SELECTIONS = pytest.mark.parametrize("selection", ["block", "random"])


def layer(form="side", selection="block", bias=True, dtype=torch.float32, r=4, alpha=None, seed=0) -> PartialLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(12, 7, bias=bias, dtype=dtype).requires_grad_(False)
    made = PartialLinear(linear, PaCA(r=r, alpha=alpha, form=form, selection=selection), "x")
    made.draw(0)
    return made


def reference(made: PartialLinear, x: torch.Tensor):
    """Full fine-tuning of the whole weight: -> y, dx, and dW restricted to I, for the loss sum(sin(y))."""
    weight = made.base.weight.detach().clone() if made._original is None else None
    assert weight is not None, "take the reference before the live form writes"
    weight[:, made.indices] += made.scale * made.delta.detach()
    weight.requires_grad_()
    x = x.detach().clone().requires_grad_()
    y = nn.functional.linear(x, weight, made.base.bias)
    y.sin().sum().backward()
    return y.detach(), x.grad, weight.grad[:, made.indices]


@FORMS
@SELECTIONS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (2, 3, 5, 12)])
def test_gradients_are_those_of_full_tuning_on_the_columns(form, selection, bias, shape):
    made = layer(form, selection, bias, alpha=8)
    with torch.no_grad():
        made.delta.normal_()
    x = torch.randn(shape)
    wanted_y, wanted_dx, wanted_dw = reference(made, x)
    x.requires_grad_()
    y = made(x)
    y.sin().sum().backward()
    assert torch.allclose(y, wanted_y, atol=1e-5) and torch.allclose(x.grad, wanted_dx, atol=1e-5)
    assert torch.allclose(made.delta.grad, made.scale * wanted_dw, atol=1e-5)
    assert made.scale == 2.0 and made.base.weight.grad is None


def test_inputs_that_are_not_contiguous():
    made = layer()
    x = torch.randn(12, 5, 2).transpose(0, 2).requires_grad_()
    made(x).sum().backward()
    assert torch.allclose(made(x), made.base(x)) and made.delta.grad.abs().sum() > 0


@FORMS
def test_autocast(form):
    made = layer(form)
    x = torch.randn(2, 5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
        assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert made.delta.grad.dtype == torch.float32
    assert torch.allclose(made.delta.grad, x.sum((0, 1))[made.indices].expand(7, -1), atol=0.1)


def test_bf16_keeps_the_delta_in_fp32():
    made = layer(dtype=torch.bfloat16)
    made(torch.randn(3, 12, dtype=torch.bfloat16)).sum().backward()
    assert made.delta.dtype == made.delta.grad.dtype == torch.float32


def saved_bytes(work) -> dict[int, int]:
    """Storage -> bytes of what autograd keeps for backward, without parameters."""
    kept: dict[int, int] = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return kept


@FORMS
@SELECTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_chosen_activations_are_saved(form, selection, dtype):
    made = layer(form, selection, dtype=dtype)
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    outputs = []
    kept = saved_bytes(lambda: outputs.append(made(x)))
    assert sum(kept.values()) == 10 * 4 * x.element_size()
    assert x.untyped_storage().data_ptr() not in kept


def test_q_k_and_v_save_one_slice():
    model = MODELS["llama"]()
    surgery = PaCA(r=4).apply(model, PLACE)
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 5, 64, requires_grad=True)
    outputs = []
    kept = saved_bytes(lambda: outputs.extend(p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj)))
    assert sum(kept.values()) == 10 * 4 * 4
    assert torch.equal(attention.q_proj.indices, attention.v_proj.indices)
    assert len({int(made.indices[0]) for made in surgery.layers.values()}) > 3, "each group draws its own"
    with torch.no_grad():
        x.add_(1)  # the same object with other values must not be served the old slice
    gained = attention.k_proj(x)
    gained.sum().backward()
    assert torch.allclose(attention.k_proj.delta.grad[0], x.sum((0, 1))[attention.k_proj.indices], atol=1e-4)


def test_columns_of_their_own():
    model = MODELS["llama"]()
    PaCA(r=4, share_inputs=False).apply(model, PLACE)
    attention = model.model.layers[0].self_attn
    assert not torch.equal(attention.q_proj.indices, attention.k_proj.indices)


@SELECTIONS
def test_side_and_live_are_equal(selection):
    ends = []
    for form in ("side", "live"):
        model = MODELS["qwen2"]()
        weights = values(model)
        surgery = PaCA(r=4, form=form, selection=selection, reselect_every=3).apply(model, PLACE)
        train(model, surgery, 7)
        ends.append((logits(model, tiny_batch(model)), surgery.portable().tensors))
        surgery.revert()
        assert same(values(model), weights), "bit for bit"
    assert torch.allclose(ends[0][0], ends[1][0], atol=1e-4)
    assert all(torch.allclose(ends[0][1][k], ends[1][1][k], atol=1e-4) for k in ends[0][1])


class Raw(torch.optim.Optimizer):
    """An optimizer that writes behind autograd's back, as old ones and kernels of their own do."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.data, alpha=-group["lr"])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1), "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "loop": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1), "raw": lambda p: Raw(p, lr=0.1),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_no_forward_sees_stale_columns(optimizer, accumulate):
    models = {form: MODELS["llama"]() for form in ("side", "live")}
    batch, ends = tiny_batch(models["side"]), {}
    for form, model in models.items():
        PaCA(r=4, form=form).apply(model, PLACE)
        chosen = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
        losses = []
        for _ in range(3):
            for _ in range(accumulate):
                loss = model(**batch).loss
                losses.append(loss.item())
                (loss / accumulate).backward()
            chosen.step()
            losses.append(model(**batch).loss.item())  # a forward pass before the gradients are cleared
            with torch.no_grad():
                losses.append(model(**batch).loss.item())
            chosen.zero_grad()
        ends[form] = losses
    assert ends["side"] == pytest.approx(ends["live"], abs=2e-3)


def test_a_write_between_forward_and_backward_is_noticed():
    for form in ("side", "live"):
        made = layer(form)
        y = made(torch.randn(3, 12, requires_grad=True)).sum()
        with torch.no_grad():
            made.delta.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            y.backward()


def test_values_perturbed_without_a_backward_pass():
    """Zeroth-order steps write through .data and take no gradient."""
    made, x = layer("live"), torch.randn(3, 12)
    with torch.no_grad():
        made(x)
        made.delta.data.add_(1.0)
        assert torch.allclose(made(x) - x[:, made.indices].sum(1, keepdim=True), layer()(x), atol=1e-5)


@FORMS
@SELECTIONS
def test_a_state_dict_goes_into_another_patched_model(form, selection):
    """Also one that drew other columns; and the base's own columns are what a state dict holds."""
    one, two = MODELS["llama"](), MODELS["llama"]()
    base = values(one)
    surgery = PaCA(r=4, form=form, selection=selection, reselect_every=2).apply(one, PLACE)
    train(one, surgery, 5)
    state = {k: v.clone() for k, v in one.state_dict().items()}
    assert all(
        torch.equal(state[k.replace("proj.weight", "proj.base.weight")], v) for k, v in base.items() if "proj" in k
    )
    other = PaCA(r=4, form=form, selection=selection, seed=5).apply(two, PLACE)
    train(two, other, 2)
    two.load_state_dict(state)
    batch = tiny_batch(one)
    assert torch.allclose(logits(one, batch), logits(two, batch), atol=1e-6)
    other.revert()
    assert same(values(two), base)


def test_a_state_dict_taken_between_forward_and_backward():
    gradients = []
    for peek in (False, True):
        made = layer("live")
        with torch.no_grad():
            made.delta.normal_(generator=torch.Generator().manual_seed(1))
        x = torch.ones(3, 12, requires_grad=True)
        y = made(x).sin().sum()
        if peek:
            made.state_dict()
        y.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_live_refuses_what_it_would_damage():
    model = MODELS["llama"]()
    mlp = [block.mlp for block in model.model.layers]
    mlp[1].up_proj.weight = mlp[0].up_proj.weight
    with pytest.raises(BadInput, match="tied"):
        PaCA(form="live").apply(model, PLACE)
    PaCA(form="side").apply(model, PLACE).revert()
    with pytest.raises(BadInput, match="quantised"):
        PaCA(form="live").apply(quantise(MODELS["llama"]()), PLACE)


@FORMS
def test_reselection_keeps_what_was_learned(form):
    model = MODELS["llama"]()
    surgery = PaCA(r=4, form=form, alpha=8, reselect_every=100).apply(model, PLACE)
    train(model, surgery, 3)
    batch, before = tiny_batch(model), logits(model, tiny_batch(model))
    first = {name: made.indices.clone() for name, made in surgery.layers.items()}
    for round_ in (1, 2):
        for made in surgery.layers.values():
            made.reselect(round_)
        assert torch.allclose(logits(model, batch), before, atol=1e-5)
    assert any(not torch.equal(first[name], made.indices) for name, made in surgery.layers.items())
    merged = copy.deepcopy(model)
    train(model, surgery, 2)
    assert not torch.allclose(logits(model, batch), before, atol=1e-3)
    del merged


def test_adam_starts_anew_with_the_columns():
    model = MODELS["llama"]()
    surgery = PaCA(r=4, reselect_every=2).apply(model, PLACE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        model(**tiny_batch(model)).loss.backward()
        optimizer.step()
        surgery.after_step(step, optimizer)
    for made in surgery.layers.values():
        assert not made.delta.any() and made.held_indices.numel() == 4
        assert all(not moment.any() for moment in optimizer.state[made.delta].values())


def test_the_reselection_log_is_a_lora():
    from peft import get_peft_model
    from peft.utils import set_peft_model_state_dict

    model = MODELS["llama"]()
    surgery = PaCA(r=4, alpha=2, selection="random", reselect_every=2).apply(model, PLACE)
    train(model, surgery, 7)
    portable = surgery.portable()
    assert portable.config.r == 16
    stock = get_peft_model(MODELS["llama"](), portable.config)
    set_peft_model_state_dict(stock, portable.tensors)
    batch = tiny_batch(model)
    assert torch.allclose(logits(stock.eval(), batch), logits(model, batch), atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_gives_the_gradients_of_its_dense_twin(kind):
    model = quantise(MODELS["llama"](), kind)
    name = "model.layers.0.mlp.up_proj"
    dense = quant.dense_weight(model.get_submodule(name), torch.float32).clone()
    surgery = PaCA(r=4, reselect_every=3).apply(model, PLACE)
    train(model, surgery, 4)
    made = surgery.layers[name]
    for indices, delta in ((made.held_indices, made.held_delta), (made.indices, made.delta.detach())):
        dense[:, indices] += delta
    x = torch.randn(3, 64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    weight = dense.requires_grad_()
    made.delta.grad = None
    y, wanted = made(x), twin @ weight.t()
    assert torch.allclose(y, wanted, atol=1e-2 if kind == "int8" else 1e-5)
    y.sum().backward()
    wanted.sum().backward()
    assert torch.allclose(x.grad, twin.grad, atol=1e-2 if kind == "int8" else 1e-5)
    assert torch.allclose(made.delta.grad, weight.grad[:, made.indices], atol=1e-5)


def test_more_columns_than_there_are():
    made = layer(r=100)
    assert made.r == 12 and made.delta.shape == (7, 12)
    made(torch.randn(3, 12)).sum().backward()
    assert made.delta.grad.shape == (7, 12)
