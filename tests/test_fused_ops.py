"""The fused operations against the modules they stand for, and what they must not touch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conftest import MODELS, logits, tiny_batch
from trimtab.model import fused_ops as module
from trimtab.model.fused_ops import ATTENTION, fuse_ops, fused_attention
from world import same, snapshot, values


def both(stock, ours, *inputs, leaves=()):
    """Outputs and gradients of the two, for the same weighted sum."""
    found = []
    for function in (stock, ours):
        given = [t.detach().clone().requires_grad_() for t in inputs]
        for leaf in leaves:
            leaf.grad = None
        out = function(*given)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        (out * weights).sum().backward()
        found.append([out.detach(), *(t.grad for t in given), *(leaf.grad for leaf in leaves)])
    return found


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("trained", [True, False])
def test_norms(kind, dtype, tolerance, trained):
    norm = kind(16, eps=1e-6)
    with torch.no_grad():
        norm.weight.normal_()
    norm = norm.to(dtype).requires_grad_(trained)
    name = module._which_norm(norm)
    assert name == ("plain" if kind is LlamaRMSNorm else "shifted")
    x = torch.randn(2, 5, 16, dtype=dtype) * 3
    leaves = [norm.weight] if trained else []
    one, two = both(norm, module._norm_forward(norm, name == "shifted"), x, leaves=leaves)
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype and torch.allclose(a.float(), b.float(), atol=tolerance, rtol=tolerance)


class Doubled(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def test_other_norms_are_left_alone():
    assert module._which_norm(Doubled(16)) is None
    assert not module._looks_like_norm(nn.LayerNorm(16)) and not module._looks_like_norm(nn.Linear(4, 4))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral"])
def test_a_block_gives_the_same(family):
    """The whole model, norms and gated FFNs fused (fp32: attention stays stock): logits and all gradients."""
    model = MODELS[family]()
    batch, grads, losses = tiny_batch(model), [], []
    weights, before, attention = values(model), snapshot(model), model.config._attn_implementation
    for fused in (False, True):
        swaps = fuse_ops(model) if fused else None
        if swaps:
            changed = [m for m in model.modules() if "forward" in vars(m)]
            norms = sum("Norm" in type(m).__name__ for m in changed)
            assert norms == sum("Norm" in type(m).__name__ for m in model.modules())
            assert sum("MLP" in type(m).__name__ for m in changed) == 2
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
        if swaps:
            swaps.undo()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert all(torch.allclose(grads[0][k], grads[1][k], atol=1e-5) for k in grads[0])
    assert snapshot(model) == before and same(values(model), weights)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral", "bert", "mpnet"])
@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_in_bf16_with_padding(family, padding):
    """Attention is ours here. What counts is as close to the fp32 truth as the stock modules are."""
    truth = MODELS[family]()
    batch = tiny_batch(truth)
    batch["attention_mask"][:] = 1
    if padding != "none":
        batch["attention_mask"][-1, slice(0, 3) if padding == "left" else slice(7, 10)] = 0
    if batch["labels"].dim() == 2:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    half, found = copy.deepcopy(truth).to(torch.bfloat16), []
    for model, fused in ((truth, False), (half, False), (half, True)):
        swaps = fuse_ops(model) if fused else None
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        keep = out.logits[batch["attention_mask"] == 1] if out.logits.dim() == 3 else out.logits
        grads = {k: p.grad.float().clone() for k, p in model.named_parameters() if p.grad is not None}
        found.append((keep.detach().float(), grads))
        if swaps:
            assert all(g.isfinite().all() for g in grads.values())
            swaps.undo()
    (exact, slopes), (stock, stocks), (ours, mine) = found
    assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max() + 2e-2
    for key, slope in slopes.items():
        assert (mine[key] - slope).norm() <= 2 * (stocks[key] - slope).norm() + 0.05 * slope.norm() + 1e-3, key


class Layer:
    is_causal = True
    training = True


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["causal", "left", "right", "packed", "shared", "additive"])
def test_attention(heads, kind):
    """Against SDPA in bf16: grouped heads and every kind of mask, outputs and gradients where they count."""
    B, H, T, D = 3, 4, 9, 8
    Layer.num_key_value_groups = H // heads
    shapes = ((B, H, T, D), (B, heads, T, D), (B, heads, T, D))
    query, key, value = (torch.randn(shape).to(torch.bfloat16) for shape in shapes)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    mask, count = None, torch.ones(B, T, dtype=torch.bool)
    if kind in ("left", "right"):
        count[-1, slice(0, 3) if kind == "left" else slice(6, 9)] = False
        mask = (causal & count[:, None, :])[:, None]
    elif kind == "packed":
        document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
        mask = (causal & (document[:, None] == document)).expand(B, 1, T, T)
    elif kind == "shared":
        mask = causal[None, None]
    elif kind == "additive":
        mask = torch.zeros(B, 1, T, T, dtype=torch.bfloat16).masked_fill_(~causal, torch.finfo(torch.bfloat16).min)
    weight = (torch.randn(B, T, H, D) * count[:, :, None, None]).to(torch.bfloat16)
    found, calls = [], []
    real = module._Attention.apply
    for function in (sdpa_attention_forward, fused_attention):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(module._Attention, "apply", lambda *a: (calls.append(1), real(*a))[1])
            out, _ = function(Layer, *leaves, mask, dropout=0.0, scaling=None)
        (out * weight).sum().backward()
        found.append([out * count[:, :, None, None], *(leaf.grad for leaf in leaves)])
    assert len(calls) == (kind != "left"), "ours, but for tokens that see nothing: SDPA gives those zeros"
    for one, two in zip(*found, strict=True):
        assert two.isfinite().all()
        assert torch.allclose(one.float(), two.float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_under_autocast(masked):
    """Of an fp32 base: rotated queries and keys are fp32, values 16-bit. Against SDPA, and against SDPA in fp32."""
    B, H, T, D = 3, 4, 9, 8
    Layer.num_key_value_groups = 1
    tensors = [torch.randn(B, H, T, D) for _ in range(3)]
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T) if masked else None
    weight, found, calls = torch.randn(B, T, H, D), [], []
    real = module._Attention.apply
    for function, on in ((sdpa_attention_forward, False), (sdpa_attention_forward, True), (fused_attention, True)):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        with pytest.MonkeyPatch.context() as patched, torch.autocast("cpu", torch.bfloat16, enabled=on):
            patched.setattr(module._Attention, "apply", lambda *a: (calls.append(a), real(*a))[1])
            query, key, value = leaves
            out, _ = function(Layer, query, key, value.bfloat16() if on else value, mask, dropout=0.0, scaling=None)
        (out.float() * weight).sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    assert len(calls) == 1 and all(tensor.dtype == torch.bfloat16 for tensor in calls[0][:4])
    for exact, stock, ours in zip(*found, strict=True):
        assert ours.dtype == stock.dtype
        assert (ours.float() - exact).norm() <= 2 * (stock.float() - exact).norm() + 1e-3


@pytest.mark.parametrize("why", ["no grad", "fp32", "dropout", "long", "window", "sink", "cache"])
def test_what_stays_with_sdpa(why, monkeypatch):
    monkeypatch.setattr(module._Attention, "apply", lambda *a: pytest.fail("ours must not be used"))
    Layer.num_key_value_groups = 1
    dtype = torch.float32 if why == "fp32" else torch.bfloat16
    if why == "long":
        monkeypatch.setattr(module, "SCORES_BYTES", 100)
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=dtype).requires_grad_(why != "no grad") for _ in range(3))
    if why == "cache":
        q = q[:, :, :1]
    mask = torch.ones(1, 1, q.shape[2], 6, dtype=torch.bool) if why == "cache" else None
    more = {"window": {"sliding_window": 3}, "sink": {"s_aux": torch.zeros(2)}}.get(why, {})
    fused_attention(Layer, q, k, v, mask, dropout=0.1 if why == "dropout" else 0.0, **more)


def test_masks_are_not_kept_after_their_pass():
    model = MODELS["llama"]().to(torch.bfloat16)
    swaps = fuse_ops(model)
    batch = tiny_batch(model)
    model(**batch).loss.backward()
    assert module._biases.mask is None and module._biases.bias is None
    swaps.undo()


def test_two_masks_in_turn():
    """A mask that takes the place of another must not be served the other's bias."""
    model = MODELS["llama"]().to(torch.bfloat16)
    batch = tiny_batch(model)
    swaps = fuse_ops(model)
    for rows in ([0, 1], [1, 2], [2], [0, 2]):
        part = {k: v[rows] for k, v in batch.items()}
        loss = model(**part).loss
        swaps.undo()
        assert loss.item() == pytest.approx(model(**part).loss.item(), rel=2e-2)
        swaps = fuse_ops(model)
    swaps.undo()


def test_other_attention_is_left_alone():
    model = MODELS["llama"]()
    model.set_attn_implementation("eager")
    batch, outputs = tiny_batch(model), logits(model, tiny_batch(model))
    swaps = fuse_ops(model)
    assert model.config._attn_implementation == "eager"
    assert torch.allclose(logits(model, batch), outputs, atol=1e-5)
    swaps.undo()
    assert model.config._attn_implementation == "eager"
    other = MODELS["llama"]()
    swaps = fuse_ops(other)
    assert other.config._attn_implementation == ATTENTION
    swaps.undo()


def test_ffns_of_another_form_are_left_alone():
    class OddMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    assert not module._is_gated(OddMLP())
    assert module._which_activation(nn.SiLU()) == "silu" and module._which_activation(nn.ReLU()) is None
