"""What is particular to full fine-tuning: dtypes, ties, the originals kept aside, training a part."""

from __future__ import annotations

import pytest
import torch

from conftest import MODELS, logits, quantise, tiny_batch
from trimtab.errors import BadInput
from trimtab.methods.full import Full
from trimtab.methods.lora import LoRA
from world import PLACE, same, snapshot, train, values


@pytest.mark.parametrize("dtype,held", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("keep", torch.bfloat16)])
def test_dtype_while_trained_and_after(dtype, held):
    model = MODELS["llama"]().bfloat16()
    before, weights = snapshot(model), values(model)
    originals = {name: p.data_ptr() for name, p in model.named_parameters()}
    surgery = Full(dtype=dtype).apply(model, PLACE)
    assert {p.dtype for p in model.parameters()} == {held}
    assert all(p.data_ptr() != originals[name] for name, p in model.named_parameters()), "a copy is trained"
    losses = train(model, surgery, 8)
    assert losses[-1] < losses[0]
    surgery.revert()
    assert snapshot(model) == before and same(model.state_dict(), weights)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == originals, "the very tensors are back"


def test_merge_keeps_what_was_trained_in_the_base_dtype():
    model = MODELS["llama"]().bfloat16()
    surgery = Full().apply(model, PLACE)
    train(model, surgery, 4)
    tuned = values(model)
    surgery.merge()
    assert same(model.state_dict(), {name: tensor.bfloat16() for name, tensor in tuned.items()})
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_tied_weights_are_trained_once_and_stay_tied():
    model = MODELS["llama"]()
    surgery = Full().apply(model, PLACE)
    assert "lm_head.weight" not in surgery.own_tensors()
    assert len(surgery.own_tensors()) == len({id(t) for t in surgery.own_tensors().values()})
    train(model, surgery, 2)
    for _ in range(2):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        surgery.merge()


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("part", ["[nN]orm", r"layers?\.1\.", "embed|lm_head"])
def test_a_part_is_trained_in_fp32_beside_a_bf16_rest(family, part):
    model = MODELS[family]().bfloat16()
    batch, before, weights = tiny_batch(model), snapshot(model), values(model)
    outputs = logits(model, batch)
    surgery = Full(train=part).apply(model, PLACE)
    assert (logits(model, batch) - outputs).abs().max() < 0.1 and logits(model, batch).dtype == outputs.dtype
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and {p.dtype for p in surgery.own_tensors().values()} == {torch.float32}
    losses = train(model, surgery, 8)
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)
    surgery.revert()
    assert snapshot(model) == before and same(model.state_dict(), weights)


def test_gradients_are_those_of_plain_training():
    model, plain = MODELS["gemma2"](), MODELS["gemma2"]()
    Full().apply(model, PLACE)
    batch = tiny_batch(model)
    model(**batch).loss.backward()
    plain(**batch).loss.backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_originals_on_a_mapped_file_are_not_copied(tmp_path):
    from transformers import AutoModelForCausalLM

    MODELS["llama"]().bfloat16().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    pointers = {p.data_ptr() for p in model.parameters()}
    surgery = Full().apply(model, PLACE)
    assert {original.data_ptr() for original in surgery.originals.values()} == pointers


def test_misfits_are_refused_and_leave_nothing():
    for model, patch in (
        (quantise(MODELS["llama"]()), Full()),
        (quantise(MODELS["llama"](), "int8"), Full()),
        (MODELS["llama"](), Full(train="nothing_like_it")),
        (MODELS["llama"](), Full(train="(")),
        (MODELS["llama"](), Full(dtype="fp8")),
    ):
        before = snapshot(model)
        with pytest.raises(BadInput):
            patch.apply(model, PLACE)
        assert snapshot(model) == before


def test_the_dense_part_of_a_quantised_base_can_be_trained():
    model = quantise(MODELS["llama"]())
    surgery = Full(train="norm").apply(model, PLACE)
    losses = train(model, surgery, 6)
    assert losses[-1] < losses[0]


def test_it_stands_alone():
    model = MODELS["llama"]()
    surgery = Full().apply(model, PLACE)
    with pytest.raises(BadInput, match="changes the base"):
        LoRA(r=2).apply(model, PLACE)
    surgery.revert()
    LoRA(r=2).apply(model, PLACE).revert()
