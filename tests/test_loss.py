"""The chunked loss against the plain one, in fp32, values and gradients to 1e-5."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from conftest import MODELS, tiny_batch
from trimtab.errors import BadInput
from trimtab.memory.meter import LiveTensors
from trimtab.methods.causal_lm import CausalLM
from trimtab.model.loss import chunked_cross_entropy, next_token_loss

N, H, V = 11, 6, 37


def parts(bias: bool):
    random = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=random).requires_grad_()  # noqa: E731
    return make(N, H), make(V, H), make(V) if bias else None, torch.randint(0, V, (N,), generator=random)


@pytest.mark.parametrize("chunk", [1, 2, 5, 11, 64, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap,scale", [(None, 1.0), (3.0, 1.0), (None, 0.25), (2.0, 1.5)])
def test_any_chunk_gives_the_plain_loss(chunk, bias, softcap, scale):
    hidden, weight, offset, target = parts(bias)
    logits = F.linear(hidden, weight, offset) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    F.cross_entropy(logits, target, reduction="sum").mul(0.3).backward()
    leaves = [t for t in (hidden, weight, offset) if t is not None]
    wanted = [t.grad.clone() for t in leaves]
    for leaf in leaves:
        leaf.grad = None
    total, correct = chunked_cross_entropy(hidden, weight, target, offset, chunk=chunk, softcap=softcap, scale=scale)
    total.mul(0.3).backward()
    assert total.item() == pytest.approx(F.cross_entropy(logits, target, reduction="sum").item(), rel=1e-6)
    assert correct == (logits.argmax(-1) == target).sum()
    assert all(torch.allclose(leaf.grad, grad, atol=1e-5) for leaf, grad in zip(leaves, wanted, strict=True))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_what_is_trained_gets_a_gradient(wanted):
    hidden, weight, _, target = parts(False)
    hidden.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        total, _ = chunked_cross_entropy(hidden, weight, target, chunk=4)
    assert kept == [torch.Size((N, H)) if wanted[0] else torch.Size((V, H))], "no logits, no buffer for a frozen head"
    total.backward()
    assert (hidden.grad is not None, weight.grad is not None) == wanted


def test_extreme_logits():
    hidden = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0]], requires_grad=True)
    weight, target = torch.eye(2), torch.tensor([1, 0, 1])
    total, _ = chunked_cross_entropy(hidden, weight, target, chunk=1)
    total.backward()
    assert total.item() == pytest.approx(2e4 + 0.6931, rel=1e-5) and hidden.grad.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral"])
def test_a_models_loss(family):
    """Masked prompt, padding, tied or soft-capped heads: the model's own loss and gradients."""
    model, again = MODELS[family](), MODELS[family]()
    batch = tiny_batch(model)
    batch["labels"][0, :4] = -100
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    plain = model(**batch).loss
    plain.backward()
    for chunk in (3, None):
        again.zero_grad()
        loss, correct, seen = CausalLM(chunk).loss(again, batch)
        loss.backward()
        assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
        assert seen == (batch["labels"][:, 1:] != -100).sum() and 0 <= correct <= seen
        grads = dict(again.named_parameters())
        assert all(torch.allclose(p.grad, grads[k].grad, atol=1e-5) for k, p in model.named_parameters())
    half, _, _ = next_token_loss(again, inputs, batch["labels"], count=2 * seen)
    assert half.item() == pytest.approx(plain.item() / 2, abs=1e-5)


def test_rows_without_a_target():
    model = MODELS["llama"]()
    batch = tiny_batch(model)
    batch["labels"][:] = -100
    loss, correct, seen = CausalLM().loss(model, batch)
    loss.backward()
    assert loss.item() == 0 and correct == 0 and seen == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    one = tiny_batch(model)
    one["labels"][1:] = -100
    assert CausalLM().loss(model, one)[0].item() == pytest.approx(model(**one).loss.item(), abs=1e-5)


def test_fp32_weights_under_autocast():
    """Full fine-tuning with `training: {bf16: true}`."""
    model = MODELS["llama"]()
    batch = tiny_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = CausalLM().loss(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=2e-2)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_model_without_a_head_is_refused():
    with pytest.raises(BadInput):
        CausalLM().loss(MODELS["bert"](), tiny_batch(MODELS["bert"]()))


def variant(logits, target, smoothing: float, dft: bool):
    """By the definitions, from whole logits: transformers' LabelSmoother, and equation 8 of arXiv 2508.05629."""
    log_p = logits.float().log_softmax(-1)
    nll = -log_p.gather(1, target[:, None]).squeeze(1)
    if dft:
        nll = nll * (-nll).exp().detach()
    return ((1 - smoothing) * nll + smoothing * -log_p.mean(-1)).sum() if smoothing else nll.sum()


@pytest.mark.parametrize("smoothing,dft", [(0.1, False), (0.5, False), (0.0, True)])
@pytest.mark.parametrize("softcap,scale,bias", [(None, 1.0, False), (2.0, 1.5, True)])
def test_smoothed_labels_and_dft(smoothing, dft, softcap, scale, bias):
    hidden, weight, offset, target = parts(bias)
    logits = F.linear(hidden, weight, offset) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = variant(logits, target, smoothing, dft)
    plain.backward()
    leaves = [t for t in (hidden, weight, offset) if t is not None]
    wanted = [t.grad.clone() for t in leaves]
    for leaf in leaves:
        leaf.grad = None
    total, _ = chunked_cross_entropy(
        hidden, weight, target, offset, chunk=4, softcap=softcap, scale=scale, smoothing=smoothing, dft=dft
    )
    total.backward()
    assert total.item() == pytest.approx(plain.item(), rel=1e-6)
    assert all(torch.allclose(leaf.grad, grad, atol=1e-5) for leaf, grad in zip(leaves, wanted, strict=True))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("fields", [{"smoothing": 0.3}, {"dft": True}])
def test_a_models_loss_in_these_forms(whole, fields):
    model = MODELS["gemma2"]()
    batch = tiny_batch(model)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].flatten(0, 1)
    target = batch["labels"][:, 1:].flatten()
    keep = target != -100
    wanted = variant(logits[keep], target[keep], fields.get("smoothing", 0.0), fields.get("dft", False)) / keep.sum()
    assert CausalLM(whole=whole, **fields).loss(model, batch).value.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_rows_that_fill_a_product_up_count_nowhere():
    """In 16 bits on a CPU the rows are rounded up to a multiple of 64."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 16, generator=random).bfloat16().requires_grad_()
    weight = torch.randn(40, 16, generator=random).bfloat16().requires_grad_()
    target = torch.randint(0, 40, (70,), generator=random)
    seen = set()

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
                seen.add(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    with Shapes():
        total, correct = chunked_cross_entropy(hidden, weight, target, chunk=64)
    total.backward()
    grads = [hidden.grad.float(), weight.grad.float()]
    hidden.grad = weight.grad = None
    logits = (hidden @ weight.t()).float()
    plain = F.cross_entropy(logits, target, reduction="sum")
    plain.backward()
    assert 70 not in seen and 6 not in seen and 64 in seen
    assert total.item() == pytest.approx(plain.item(), rel=1e-2) and correct == (logits.argmax(-1) == target).sum()
    for ours, own in zip(grads, (hidden.grad.float(), weight.grad.float()), strict=True):
        assert (ours - own).norm() < 2e-2 * own.norm()


def test_without_gradients_none_are_computed():
    hidden, weight = torch.randn(12, 64, requires_grad=True), torch.randn(4000, 64, requires_grad=True)
    target, peaks = torch.randint(4000, (12,)), []
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), LiveTensors([hidden, weight, target]) as live:
            chunked_cross_entropy(hidden, weight, target)
        peaks.append(live.peak_bytes)
    assert peaks[0] < 1.5 * weight.nbytes and peaks[1] > 2 * weight.nbytes, "a gradient is as large as the weight"
