"""What is particular to LoRA: peft's variants and starts, dropout, dtypes, and the way back from each."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import MODELS, logits, quantise, tiny_batch
from trimtab.errors import BadInput
from trimtab.methods.lora import LoRA
from world import PLACE, same, snapshot, train, values


@pytest.mark.parametrize(
    "fields",
    [
        {"dora": True},
        {"rslora": True, "r": 16},
        {"init": "gaussian"},
        {"init": "orthogonal"},
        {"init": "pissa"},
        {"init": "pissa_niter_4"},
        {"init": "olora"},
        {"dropout": 0.1},
        {"alpha": 3.5},
        {"targets": "q_proj,down_proj"},
        {"targets": r"layers\.1\..*_proj"},
    ],
    ids=str,
)
def test_variants_start_as_the_base_learn_merge_and_leave(fields, tmp_path):
    from peft import PeftModel
    from safetensors.torch import save_file

    model = MODELS["llama"]()
    batch, before, weights = tiny_batch(model), snapshot(model), values(model)
    outputs = logits(model, batch)
    patch = LoRA(**{"r": 4, **fields})
    surgery = patch.apply(model, PLACE)
    assert torch.allclose(logits(model, batch), outputs, atol=1e-4)
    losses = train(model, surgery, 6)
    assert losses[-1] < losses[0]
    tuned = logits(model, batch)
    if patch.init.startswith("pissa_niter"):
        with pytest.raises(BadInput, match="cannot repeat"):
            surgery.portable()
    else:
        portable = surgery.portable()
        portable.config.save_pretrained(tmp_path)
        tensors = {name: tensor.contiguous() for name, tensor in portable.tensors.items()}
        save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        stock = PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()
        assert torch.allclose(logits(stock, batch), tuned, atol=1e-4)
    own = {name: tensor.detach().clone() for name, tensor in surgery.own_tensors().items()}
    surgery.revert()
    assert snapshot(model) == before and same(model.state_dict(), weights)
    again = patch.apply(model, PLACE)
    again.load_tensors(own)
    assert torch.equal(logits(model, batch), tuned)
    again.merge()
    assert str(model) == before["text"]
    assert torch.allclose(logits(model, batch), tuned, atol=1e-4)


def test_equals_the_formula():
    """W_0 + (alpha / r) B A, written out; its gradients by plain autograd."""
    model, plain = MODELS["qwen2"](), MODELS["qwen2"]()
    surgery = LoRA(r=4, alpha=12.0).apply(model, PLACE)
    train(model, surgery, 2)
    own = {name: tensor.detach().clone().requires_grad_() for name, tensor in surgery.own_tensors().items()}
    paths = {name.removesuffix(".lora_A.weight") for name in own if name.endswith("lora_A.weight")}
    weights = dict(plain.named_parameters())
    for path in paths:
        delta = own[f"{path}.lora_B.weight"] @ own[f"{path}.lora_A.weight"]
        weights[f"{path}.weight"] = weights[f"{path}.weight"].detach() + 12.0 / 4 * delta
    batch = tiny_batch(model)
    expected = torch.func.functional_call(plain, weights, kwargs=batch).loss
    model.zero_grad()
    loss = model(**batch).loss
    assert torch.allclose(loss, expected, atol=1e-6)
    loss.backward()
    expected.backward()
    for name, tensor in surgery.own_tensors().items():
        assert torch.allclose(tensor.grad, own[name].grad, atol=1e-6), name


def test_names_and_shapes_are_those_of_peft():
    model = MODELS["llama"]()
    own = LoRA(r=4, dora=True, targets="k_proj").apply(model, PLACE).own_tensors()
    path = "model.layers.0.self_attn.k_proj"
    assert {name: tuple(t.shape) for name, t in own.items() if name.startswith(path)} == {
        f"{path}.lora_A.weight": (4, 64),
        f"{path}.lora_B.weight": (32, 4),
        f"{path}.lora_magnitude_vector": (32,),
    }


def test_the_adapter_config_is_json_that_peft_reads(tmp_path):
    from peft import LoraConfig, PeftConfig

    surgery = LoRA(r=4, dora=True, targets="q_proj").apply(MODELS["llama"](), PLACE)
    (tmp_path / "adapter_config.json").write_text(json.dumps(surgery.adapter_config()))
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, LoraConfig) and config.r == 4 and config.use_dora
    assert config.target_modules == {f"model.layers.{index}.self_attn.q_proj" for index in range(2)}


def test_alpha_defaults_to_twice_the_rank_and_rslora_divides_by_its_root():
    for patch, scale in ((LoRA(r=4), 2.0), (LoRA(r=16, rslora=True), 8.0), (LoRA(r=4, alpha=2.0), 0.5)):
        surgery = patch.apply(MODELS["llama"](), PLACE)
        assert {layer.scaling["default"] for layer in surgery.layers.values()} == {scale}


def test_dropout_follows_the_model_mode():
    model = MODELS["llama"]()
    surgery = LoRA(r=4, dropout=0.5).apply(model, PLACE)
    train(model, surgery, 3)
    batch = tiny_batch(model)
    assert torch.equal(logits(model, batch), logits(model, batch)), "an eval model stays one"
    model.train()
    assert not torch.equal(logits(model, batch), logits(model, batch))


def test_adapters_are_fp32_on_a_bf16_base():
    model = MODELS["llama"]().bfloat16()
    surgery = LoRA(r=4, dora=True).apply(model, PLACE)
    assert {tensor.dtype for tensor in surgery.own_tensors().values()} == {torch.float32}
    assert train(model, surgery, 6)[-1] < 5.5
    surgery.revert()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind,dora", [("nf4", False), ("nf4", True), ("int8", False)])
def test_merges_into_a_quantised_base(kind, dora):
    model = quantise(MODELS["llama"](), kind)
    batch, text = tiny_batch(model), str(MODELS["llama"]())
    surgery = LoRA(r=4, dora=dora).apply(model, PLACE)
    train(model, surgery, 4)
    tuned = logits(model, batch)
    surgery.merge()
    assert str(model) == text, "plain linears stand where the quantised ones stood"
    off = (logits(model, batch) - tuned).norm() / tuned.norm()
    assert off < (1e-4 if kind == "nf4" else 0.05), "int8 rounds its inputs too, a plain linear does not"


def test_training_after_an_evaluation_on_nf4_has_its_gradients():
    """bitsandbytes packs 4-bit weights when it first runs in eval mode; no gradient passes through that layout."""
    grads = []
    for evaluated in (False, True):
        model = quantise(MODELS["llama"]())
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = type(module)(32, 32).support_avx512bf16_for_cpu
        batch = tiny_batch(model)
        if evaluated:
            logits(model, batch)
        surgery = LoRA(r=4).apply(model, PLACE)
        if evaluated:
            logits(model, batch)
        model(**batch).loss.backward()
        grads.append(torch.cat([t.grad.flatten() for n, t in surgery.own_tensors().items() if "lora_B" in n]))
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.99


@pytest.mark.parametrize(
    "fields",
    [{"r": 0}, {"init": "eva"}, {"r": 3, "init": "orthogonal"}, {"targets": "nope"}, {"dropout": 7.0}],
    ids=str,
)
def test_misfits_are_refused_and_leave_nothing(fields):
    model = MODELS["llama"]()
    before, weights = snapshot(model), values(model)
    with pytest.raises(BadInput):
        LoRA(**fields).apply(model, PLACE)
    assert snapshot(model) == before and same(model.state_dict(), weights)


def test_quantised_bases_that_peft_cannot_read_are_refused():
    with pytest.raises(BadInput, match="scales"):
        LoRA(dora=True).apply(quantise(MODELS["llama"](), "int8"), PLACE)
    with pytest.raises(BadInput, match="quantised"):
        LoRA(init="pissa").apply(quantise(MODELS["llama"]()), PLACE)


def test_nan_is_not_merged():
    model = MODELS["llama"]()
    surgery = LoRA(r=4).apply(model, PLACE)
    with torch.no_grad():
        next(iter(surgery.own_tensors().values())).fill_(float("nan"))
    with pytest.raises(BadInput, match="NaN"):
        surgery.merge()
    surgery.revert()
    assert same(model.state_dict(), values(MODELS["llama"]()))
