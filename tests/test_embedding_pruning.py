"""Embedding pruning against references that hold the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import MODELS, logits, tiny_batch
from helpers_kept import SOME, V, batch_of, kept, put
from helpers_load import tiny_tokenizer
from trimtab.contracts import Place
from trimtab.errors import BadInput
from trimtab.methods.causal_lm import CausalLM
from trimtab.methods.full import Full
from trimtab.model import kept_rows
from trimtab.model.kept_rows import KEPT
from world import PLACE, same, snapshot, values

causal = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])  # tied; not tied; tied, scaled and capped


# --- logits ----------------------------------------------------------------------------------------------------------


@causal
@pytest.mark.parametrize("softmax", ["exact", "kept"])
@pytest.mark.parametrize("train", [False, True])
def test_logits_of_kept_ids_are_bit_equal(family, softmax, train):
    """With and without gradients, of frozen rows and of rows that may change, and for one row of one token too."""
    model, whole = MODELS[family](3), MODELS[family](3)
    put(model, softmax=softmax)
    for parameter in model.parameters():
        parameter.requires_grad_(train)
    ids = kept(model)
    assert len(ids) == 64 and model.get_input_embeddings().weight.shape == (64, 64)
    for batch in (batch_of(), batch_of(2, 1, 1)):
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                ours, theirs = (m(input_ids=batch["input_ids"]).logits for m in (model, whole))
                assert ours.shape == theirs.shape and torch.equal(ours[..., ids], theirs[..., ids])
                others = torch.ones(V, dtype=torch.bool).index_fill(0, ids, False)
                if softmax == "exact" or not torch.is_grad_enabled():
                    assert torch.equal(ours[..., others], theirs[..., others])
                else:
                    limit = -torch.inf if family != "gemma2" else -model.config.final_logit_softcapping
                    assert (ours[..., others] == limit).all()


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_an_encoder_without_a_head(family):
    model, whole = MODELS[family](3), MODELS[family](3)
    put(model)
    batch = {key: batch_of()[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(logits(model, batch), logits(whole, batch))
    assert torch.equal(logits(model, tiny_batch(model)), logits(whole, tiny_batch(whole))), "ids that were not counted"


@causal
@pytest.mark.parametrize("fields", [{}, {"smoothing": 0.2}, {"dft": True}])
@pytest.mark.parametrize("chunk", [5, None])
def test_the_exact_loss_is_the_whole_model_s(family, fields, chunk):
    """Loss, count, and the gradients of all weights; the table's, of the kept rows. Targets may lie outside them."""
    model, whole = MODELS[family](4), MODELS[family](4)
    put(model)
    batch = batch_of()
    batch["labels"][0, 3] = batch["input_ids"][0, 3] = 100  # not kept
    objective = CausalLM(chunk=chunk, **fields)
    assert 100 not in kept(model).tolist()
    (ours, correct, seen), (theirs, *counts) = objective.loss(model, batch), objective.loss(whole, batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6) and [int(correct), int(seen)] == list(map(int, counts))
    ours.backward()
    theirs.backward()
    wanted = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        grad = wanted[name].grad
        grad = grad[kept(model)] if grad.shape != parameter.shape else grad
        assert torch.allclose(parameter.grad, grad, atol=2e-6), name
        assert grad.any(), name


@causal
@pytest.mark.parametrize("frozen", [False, True])
def test_the_kept_loss_is_over_kept_ids(family, frozen):
    model, whole = MODELS[family](4), MODELS[family](4)
    put(model, softmax="kept")
    batch, ids = batch_of(), kept(model)
    if frozen:
        for each in (model, whole):
            each.get_input_embeddings().weight.requires_grad_(False)
            each.get_output_embeddings().weight.requires_grad_(False)
    place_of = {int(at): row for row, at in enumerate(ids)}
    scores = whole(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][..., ids]
    target = torch.tensor([[place_of.get(int(t), -100) for t in row] for row in batch["labels"][:, 1:]])
    wanted = F.cross_entropy(scores.flatten(0, 1), target.flatten(), ignore_index=-100)
    loss = CausalLM(chunk=4).loss(model, batch).value
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    loss.backward()
    wanted.backward()
    for ours, theirs in zip(model.model.layers.parameters(), whole.model.layers.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=2e-6)
    assert (model.get_input_embeddings().weight.grad is None) == frozen
    with torch.no_grad():  # evaluation is over all ids
        loss, plain = (CausalLM().loss(each, batch).value for each in (model, whole))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_a_head_with_a_bias():
    model, whole = MODELS["qwen2"](5), MODELS["qwen2"](5)
    offset = torch.randn(V)
    for each in (model, whole):
        each.lm_head.bias = nn.Parameter(offset.clone())
    put(model)
    batch = batch_of()
    ours, theirs = (CausalLM(chunk=4).loss(each, batch).value for each in (model, whole))
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert torch.allclose(model.lm_head.bias.grad, whole.lm_head.bias.grad, atol=2e-6)
    assert torch.equal(logits(model, batch), logits(whole, batch))


def test_rows_of_another_dtype_are_converted_by_blocks(monkeypatch):
    """A 16-bit base whose kept rows are trained in fp32 without autocast; as rows are copied to a device."""
    monkeypatch.setattr(kept_rows, "BLOCK", 24)
    model, whole = (MODELS["gemma2"](4).to(torch.bfloat16) for _ in range(2))
    put(model)
    for each in (model, whole):
        Full(dtype="fp32").apply(each, PLACE)
    assert model.get_input_embeddings().weight.dtype == torch.float32 == whole.get_input_embeddings().weight.dtype
    batch, rows = batch_of(), getattr(model.get_output_embeddings(), KEPT)
    assert [start for start, _ in rows.blocks(torch.zeros(1))] == [0, 24, 48, 72, 96, 120]
    (ours, *_), (theirs, *_) = (CausalLM(chunk=4).loss(each, batch) for each in (model, whole))
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    wanted = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        grad = wanted[name].grad
        grad = grad[kept(model)] if grad.shape != parameter.shape else grad
        assert torch.allclose(parameter.grad, grad, atol=2e-6), name
    assert torch.allclose(logits(model, batch), logits(whole, batch), atol=1e-5)


# --- rows ------------------------------------------------------------------------------------------------------------


@causal
def test_a_tied_head_stays_tied_and_is_one_parameter(family):
    model = MODELS[family]()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    surgery = put(model)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied == (family != "qwen2")
    assert len(surgery.tables) == 1 + (not tied)
    assert getattr(model.get_output_embeddings(), KEPT) is surgery.tables[-1]


@pytest.mark.parametrize("slow", ["disk", "ram"])
@causal
def test_the_whole_table_leaves_fast_memory_and_comes_back(family, slow, tmp_path):
    model = MODELS[family]()
    before, weights = snapshot(model), values(model)
    place = Place(fast="cpu", slow=slow, folder=str(tmp_path))
    surgery = put(model, place)
    assert not list(tmp_path.iterdir()), "the file has no name"
    assert len(surgery.in_slow_tier) == (len(surgery.tables) if slow == "disk" else 0)
    size = 64 * 64 * 4 * (1 if slow == "disk" else -1)
    model.requires_grad_(False)
    assert list(surgery.saves().values()) == [size] * len(surgery.tables)
    model.requires_grad_(True)
    surgery.revert()
    assert snapshot(model) == before and same(model.state_dict(), weights)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_full_trains_kept_rows_only_and_others_stay(family):
    """Six steps of AdamW: the merged model is the one that plain training of all weights gives, for kept ids."""
    model, whole = MODELS[family](6), MODELS[family](6)
    below = put(model)
    above = Full(dtype="fp32").apply(model, PLACE)
    ids, original = kept(model).clone(), whole.get_input_embeddings().weight.detach().clone()
    for each in (model, whole):
        trained = [p for p in each.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        for step in range(6):
            batch = batch_of(step)
            if family == "bert":
                batch["labels"] = torch.tensor([0, 1, 2])
            each(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        table = each.get_input_embeddings().weight
        assert len(optimizer.state[table]["exp_avg"]) == len(table) == (len(ids) if each is model else V)
    others = torch.ones(V, dtype=torch.bool).index_fill(0, ids, False)
    above.merge()
    below.merge()
    ours, theirs = model.get_input_embeddings().weight, whole.get_input_embeddings().weight
    assert ours.shape == theirs.shape and torch.equal(ours[others], original[others])
    if family == "bert":  # no head, and so no gradient for rows that do not occur
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours[SOME], original[SOME], atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_ids_without_a_row(family):
    model, whole = MODELS[family](), MODELS[family]()
    batch = {"input_ids": torch.tensor([[20, 21, 100, 101, 100, 22]])}
    surgery = put(model, unseen="fetch")
    ids = batch["input_ids"][0]
    assert torch.equal(model.get_input_embeddings()(ids), whole.get_input_embeddings()(ids))
    surgery.revert()
    put(model, unseen="error")
    with pytest.raises(BadInput, match="embed the token 100"):
        model(**batch)


def test_an_unknown_id_is_read_as_unk():
    model = MODELS["llama"]()
    with pytest.raises(BadInput, match="no unknown token"):
        put(model, unseen="unk")
    model.trimtab_tokenizer = tiny_tokenizer()
    surgery = put(model, unseen="unk")
    table = model.get_input_embeddings()
    assert 0 in kept(model).tolist() and torch.equal(table(torch.tensor([101])), table(torch.tensor([0])))
    surgery.revert()


def test_gradients_reach_known_rows_beside_fetched_ones():
    model, whole = MODELS["llama"](), MODELS["llama"]()
    put(model)
    ids = torch.tensor([[20, 100, 21, 20]])
    for each in (model, whole):
        each.get_input_embeddings()(ids).square().sum().backward()
    grad = whole.get_input_embeddings().weight.grad[kept(model)]
    assert torch.allclose(model.get_input_embeddings().weight.grad, grad)


def test_the_padding_row_gets_no_gradient():
    model = MODELS["bert"]()
    put(model)
    table = model.get_input_embeddings()
    assert kept(model)[table.padding_idx] == 0
    table(torch.tensor([[0, 20]])).sum().backward()
    assert not table.weight.grad[table.padding_idx].any() and table.weight.grad.any()
