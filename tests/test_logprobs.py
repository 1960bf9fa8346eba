"""Log-probabilities of selected tokens against plain logits and against TRL's own, in fp32."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from trl.trainer.utils import add_fused_lm_head

from conftest import MODELS, tiny_batch
from trimtab.model.logprobs import log_probs, score_tokens
from trimtab.model.prefix_trie import pack

N, H, V = 11, 6, 37


@pytest.mark.parametrize("chunk", [1, 5, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "softcap,scale,temperature", [(None, 1.0, 1.0), (3.0, 1.0, 0.7), (None, 0.25, 2.0), (2.0, 1.5, 1)]
)
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients_are_those_of_plain_logits(chunk, bias, softcap, scale, temperature, entropy):
    random = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=random).requires_grad_() for shape in ((N, H), (V, H), (V,))]
    hidden, weight, offset = leaves[0], leaves[1], leaves[2] if bias else None
    target, up, down = torch.randint(0, V, (N,), generator=random), torch.randn(N), torch.randn(N)
    logits = F.linear(hidden, weight, offset) * scale
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    plain = logits.log_softmax(-1)
    logp, spread = plain.gather(1, target[:, None]).squeeze(1), -(plain.exp() * plain).sum(1)
    wanted = torch.autograd.grad((up * logp + (down * spread if entropy else 0)).sum(), leaves[: 2 + bias])
    found, spread_found = log_probs(
        hidden, weight, target, offset, chunk=chunk, softcap=softcap, scale=scale, temperature=temperature,
        entropy_gradient=entropy,
    )  # fmt: skip
    assert torch.allclose(found, logp, atol=1e-5) and torch.allclose(spread_found, spread, atol=1e-5)
    assert spread_found.requires_grad == entropy
    value = (up * found + (down * spread_found if entropy else 0)).sum()
    for ours, theirs in zip(torch.autograd.grad(value, leaves[: 2 + bias]), wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_frozen_head_gets_no_buffer_and_no_logits_are_kept():
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        found, _ = log_probs(hidden, weight, torch.zeros(N, dtype=torch.int64), chunk=4)
    assert kept == [torch.Size((N, H))]
    found.sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not log_probs(hidden, weight, torch.zeros(N, dtype=torch.int64))[0].requires_grad


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_with_all_tokens_equal_trls(family, temperature):
    model, theirs = MODELS[family](), MODELS[family]()
    batch = tiny_batch(model)
    batch["labels"][:, :4] = -100  # a prompt
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    add_fused_lm_head(theirs, temperature=temperature, outputs=("log_probs", "entropy"))
    output = theirs(**inputs, labels=batch["labels"], fused_lm_head=True)
    slope = torch.randn(output.log_probs.shape, generator=torch.Generator().manual_seed(3))
    slope = slope * (batch["labels"][:, 1:] != -100)
    (output.log_probs * slope).sum().backward()
    for whole in (False, True):
        model.zero_grad()
        found = score_tokens(model, inputs, batch["labels"], temperature=temperature, whole=whole)
        at = (found.rows, found.columns - 1)
        assert torch.allclose(found.logp, output.log_probs[at], atol=1e-5)
        assert torch.allclose(found.entropy, output.entropy[at], atol=1e-5)
        (found.logp * slope[at]).sum().backward()
        for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
            assert (ours.grad - other.grad).abs().max() <= 1e-4 * other.grad.abs().max() + 1e-6, name


def test_nothing_after_the_last_selected_token_is_computed():
    model = MODELS["llama"]()
    batch = tiny_batch(model, tokens=40)
    labels = torch.full_like(batch["labels"], -100)
    labels[0, 3], labels[1, 6] = batch["input_ids"][0, 3], batch["input_ids"][1, 6]
    widths = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: widths.append(args[0].shape[1]))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    found = score_tokens(model, inputs, labels)
    assert widths[-1] == 16 and found.logp.shape == (2,)
    logp = model(**inputs).logits.log_softmax(-1)
    assert found.logp[1].item() == pytest.approx(logp[1, 5, labels[1, 6]].item(), abs=1e-5)
    labels[:] = -100
    nothing = score_tokens(model, inputs, labels)
    assert nothing.logp.shape == (0,)
    nothing.logp.sum().backward()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_packed_tree_has_the_log_probabilities_of_its_rows(family):
    """Two prompts, completions that part: each token's log-probability, and the gradients, as of rows of their own."""
    model, again = MODELS[family](), MODELS[family]()
    rows = [[5, 6, 7, 8, 9], [5, 6, 7, 11, 12, 13], [5, 6, 14, 8], [30, 31, 32], [30, 31, 33, 34, 35]]
    weights = [[0, 0, 1.0, 2.0, 0], [0, 0, 0.5, -1.0, 3.0, 0], [0, 0, -2.0, 1.0], [0, 0, 0.0], [0, 0, 0, 1.0, -0.5]]
    total = torch.zeros(())
    for row, weight in zip(rows, weights, strict=True):
        ids = torch.tensor([row])
        logp = model(input_ids=ids).logits.log_softmax(-1)
        total = total + sum(w * logp[0, at - 1, row[at]] for at, w in enumerate(weight) if w)
    total.backward()
    packed = pack(rows, weights, [0, 0, 0, 1, 1])
    assert packed.ids.shape == (2, 8), "5 6 7 8 11 12 14 8, not 13 tokens"
    low = torch.finfo(torch.float32).min
    mask = torch.zeros(packed.sees.shape).masked_fill(~packed.sees, low)[:, None]
    inputs = {"input_ids": packed.ids, "position_ids": packed.positions, "attention_mask": mask}
    labels = packed.ids.masked_fill(packed.weights == 0, -100)
    found = score_tokens(again, inputs, labels, packed.parents)
    value = (found.logp * packed.weights[found.rows, found.columns]).sum()
    assert float(value) == pytest.approx(float(total), abs=1e-4)
    value.backward()
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)


def test_fp32_weights_under_autocast():
    model = MODELS["llama"]()
    batch = tiny_batch(model)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.autocast("cpu", torch.bfloat16):
        found = score_tokens(model, inputs, batch["labels"])
    found.logp.sum().backward()
    exact = score_tokens(model, inputs, batch["labels"])
    assert torch.allclose(found.logp, exact.logp, atol=0.1)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
