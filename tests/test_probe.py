"""Our loss, fused forms and patches against the model's own forward; and the probe that asks so at each start."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from byte_model import byte_folder, tiny
from conftest import MODELS
from helpers_run import make_world, tree
from trimtab import Recipe
from trimtab.contracts import Place
from trimtab.engine import probe as module
from trimtab.engine.probe import batch_of, head_read, loss_now, own_loss, probe, require_unchanged
from trimtab.engine.start import LossCompared
from trimtab.errors import BadInput
from trimtab.inference.evaluate import evaluate
from trimtab.memory.meter import LiveTensors
from trimtab.methods.causal_lm import CausalLM
from trimtab.methods.lora import LoRA
from trimtab.methods.meft import Meft
from trimtab.methods.paca import PaCA
from trimtab.methods.parallel_adapter import ParallelAdapter
from trimtab.methods.pruning import Pruning
from trimtab.model import fused_ops, head
from trimtab.planning.plan import plan
from trimtab.tiered.adam import Rates
from trimtab.training.train import train
from world import snapshot

RECIPE = Recipe(model="any")
MPT = {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "logit_scale": 0.5}
DECODER = {"is_decoder": True}
HEADS = {  # class -> (fields, scale, soft cap)
    "HyperCLOVAXForCausalLM": ({"logits_scaling": 4.0}, 4.0, None),
    "GraniteForCausalLM": ({"logits_scaling": 4.0}, 0.25, None),
    "CohereForCausalLM": ({"logit_scale": 0.3}, 0.3, None),
    "MptForCausalLM": (MPT, 1.0, None),
    "Gemma2ForCausalLM": ({"head_dim": 16, "final_logit_softcapping": 3.0}, 1.0, 3.0),
    "BertLMHeadModel": (DECODER, 1.0, None),
    "RobertaForCausalLM": (DECODER, 1.0, None),
    "ElectraForCausalLM": (DECODER, 1.0, None),
    "ModernBertDecoderForCausalLM": ({}, 1.0, None),
    "RecurrentGemmaForCausalLM": ({"logits_soft_cap": 2.0, "lru_width": 64, "num_hidden_layers": 3}, 1.0, 2.0),
    "MixtralForCausalLM": ({"num_local_experts": 4, "output_router_logits": True}, 1.0, None),
}


def build(name: str) -> nn.Module:
    return tiny(name, **HEADS[name][0])


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_are_more_than_a_weight(name):
    """The model's own loss and every gradient of it, without its logits."""
    model, again = build(name), build(name)
    batch = batch_of(model)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    if "Mixtral" in name:  # its own loss has the router's
        plain, wanted = wanted, model(**batch, use_cache=False).loss
        assert float(wanted) > float(plain) + 1e-3
    wanted.backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    before, widest = snapshot(again), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (widest.append(t.shape), t)[1], lambda t: t):
        found = CausalLM(chunk=5).loss(again, batch)
    assert widest and not any(len(shape) > 1 and shape[-1] == 272 for shape in widest), "no logits are kept"
    found.value.backward()
    assert float(found.value) == pytest.approx(float(wanted), rel=1e-5)
    for key, p in again.named_parameters():
        if grads[key] is not None:
            assert torch.allclose(p.grad, grads[key], atol=2e-5), key
    if "Mixtral" not in name:  # transformers hooks its routers at the first pass, and leaves the hooks there
        assert snapshot(again) == before
    read, (_, scale, cap) = head.read_head(model), HEADS[name]
    assert read.linear is model.get_output_embeddings() and (read.scale, read.softcap) == (scale, cap)
    with torch.device("meta"):
        planned = type(model)(model.config)
    assert dataclasses.replace(head.read_head(planned), linear=None) == dataclasses.replace(read, linear=None)


def test_the_routers_loss():
    """By its share in a step of several batches, and not in evaluation."""
    model = build("MixtralForCausalLM")
    batch = batch_of(model)
    whole, _, seen = CausalLM().loss(model, batch)
    half = CausalLM().loss(model, batch, count=2 * seen).value
    assert float(half) == pytest.approx(float(whole) / 2, rel=1e-6)
    with torch.no_grad():
        plain = float(CausalLM().loss(model, batch).value)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert plain == pytest.approx(float(wanted), rel=1e-6)
    model.config.output_router_logits = False
    assert float(CausalLM().loss(model, batch).value) == pytest.approx(plain, rel=1e-6)


class Odd(nn.Linear):
    """A head that no form of ours fits."""


def test_whole_logits():
    model, batch = MODELS["llama"](), batch_of(MODELS["llama"]())
    chunked = CausalLM().loss(model, batch)
    whole = CausalLM(whole=True).loss(model, batch)
    assert float(chunked.value) == pytest.approx(float(whole.value), rel=1e-6)
    assert (chunked.correct, chunked.seen) == (whole.correct, whole.seen)
    odd = Odd(64, 128, bias=False)
    odd.weight = model.lm_head.weight
    model.lm_head = odd
    assert head.read_head(model).linear is None
    assert float(CausalLM().loss(model, batch).value) == pytest.approx(float(whole.value), rel=1e-6)


# --- the probe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_what_is_right_is_left_alone(name, dtype):
    model = build(name).to(dtype)
    for gradients in (True, False):
        assert probe(model, RECIPE, gradients=gradients) == module.Found(RECIPE)


def wrong_norm(monkeypatch):
    real = fused_ops._RMSNorm.backward
    monkeypatch.setattr(fused_ops._RMSNorm, "backward", lambda ctx, dy: (real(ctx, dy)[0] * 1.5, *real(ctx, dy)[1:]))


def wrong_ffn(monkeypatch):
    monkeypatch.setitem(fused_ops.ACTIVATIONS, "silu", (F.silu, lambda dy, gate: dy))


def wrong_attention(monkeypatch):
    real = fused_ops._probabilities
    monkeypatch.setattr(fused_ops, "_probabilities", lambda q, k, bias, scale, b: real(q, k, bias, 4 * scale, b))


@pytest.mark.parametrize("plant,form,words", [
    (wrong_norm, "norm", "fused norms"), (wrong_ffn, "ffn", "fused gated FFNs"),
    (wrong_attention, "attention", "fused attention"),
])  # fmt: skip
def test_a_wrong_fused_form_is_taken_out(monkeypatch, plant, form, words):
    model = tiny("LlamaForCausalLM", initializer_range=0.3)
    model = model.to(torch.bfloat16) if form == "attention" else model  # fused in 16 bits only
    plant(monkeypatch)
    found = probe(model, RECIPE)
    assert found.recipe.engine.fused_ops == [f for f in fused_ops.FUSED_OPS if f != form]
    assert len(found.notes) == 1 and words in found.notes[0] and "LlamaForCausalLM" in found.notes[0]
    assert found.recipe.objective == "causal_lm"
    assert probe(model, found.recipe) == module.Found(found.recipe)


def test_a_fused_form_that_fails_is_taken_out(monkeypatch):
    monkeypatch.setattr(fused_ops._Gated, "forward", staticmethod(lambda *_: 1 / 0))
    found = probe(tiny("LlamaForCausalLM"), RECIPE)
    assert found.recipe.engine.fused_ops == ["norm", "attention", "experts"] and "ZeroDivisionError" in found.notes[0]


@pytest.mark.parametrize("gradients", [True, False])
def test_a_wrong_head_is_not_used(monkeypatch, gradients):
    """`logits_scaling` read upside down: the loss is then of the model's own logits."""
    real = head._form
    upside_down = lambda *given: (1 / real(*given)[0], *real(*given)[1:])  # noqa: E731
    monkeypatch.setattr(head, "_form", upside_down)
    model = build("GraniteForCausalLM")
    found = probe(model, RECIPE, gradients=gradients)
    assert found.objective == CausalLM(whole=True) and "all logits are in memory" in found.notes[0]
    assert set(found.recipe.engine.fused_ops) == set(fused_ops.FUSED_OPS)
    batch = batch_of(model)
    assert float(found.objective.loss(model, batch).value) == pytest.approx(float(own_loss(model, batch)), rel=1e-6)


def test_what_nothing_mends_is_refused(monkeypatch):
    model = tiny("LlamaForCausalLM")
    monkeypatch.setattr(module, "own_loss", lambda model, batch: 3 * own_loss(model, batch))
    with pytest.raises(BadInput, match="LlamaForCausalLM"):
        probe(model, RECIPE)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(BadInput):
        probe(model, RECIPE)


PATCHES = [LoRA(r=4), PaCA(r=4), ParallelAdapter(r=8), Meft(r=64, probes=2)]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: type(patch).__name__)
def test_patches_start_at_zero_and_the_probe_leaves_no_trace(patch):
    model = MODELS["llama"]()
    before = loss_now(model)
    surgery = patch.apply(model, Place(fast="cpu", slow="ram"))
    model.train()
    stores = surgery.stores
    state = snapshot(model), [copy.copy(store.traffic) for store in stores], torch.get_rng_state()
    rows = [store.whole().clone() for store in stores]
    require_unchanged(model, before, [surgery])
    assert probe(model, RECIPE) == module.Found(RECIPE)
    assert (snapshot(model), [store.traffic for store in stores]) == state[:2]
    assert torch.equal(torch.get_rng_state(), state[2])
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(store.pending() or store.dirty_rows() or store.touched or store._slot_of for store in stores)
    assert all(torch.equal(store.whole(), old) for store, old in zip(stores, rows, strict=True))
    with torch.no_grad():
        for tensor in surgery.own_tensors().values():
            if tensor.is_floating_point():
                tensor.add_(0.1)
    with pytest.raises(BadInput, match="should not change before training"):
        require_unchanged(model, before, [surgery])


def test_the_probe_holds_less_than_a_step():
    model = tiny("LlamaForCausalLM", num_hidden_layers=4)
    for p in model.parameters():
        p.requires_grad_(True)
    held = list(model.parameters())
    with LiveTensors(held, []) as live:
        loss_now(model)
        probe(model, RECIPE)
    peak = live.peak_bytes
    optimizer = torch.optim.AdamW(model.parameters())
    with LiveTensors(held, []) as live:
        CausalLM().loss(model, batch_of(model)).value.backward()  # a batch of the same size, by the chunked head
        optimizer.step()
    assert peak < live.peak_bytes


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_and_its_plan_decide_alike(tmp_path, monkeypatch):
    """A run whose head is wrong falls back, says so, and plans for whole logits; its loss is the model's own."""
    world = make_world(tmp_path)
    recipe = Recipe(**tree(world, tmp_path / "right", {"lora": {"r": 2}}, max_steps=2))
    right = train(recipe)
    real = head._form
    monkeypatch.setattr(head, "_form", lambda *given: (2 * real(*given)[0], *real(*given)[1:]))
    said: list[str] = []
    fell = train(dataclasses.replace(recipe, output=str(tmp_path / "fell")), say=said.append)
    assert any("all logits are in memory at once" in line for line in said)
    assert fell["final_loss"] == pytest.approx(right["final_loss"], rel=1e-5)
    whole = plan(dataclasses.replace(recipe, objective={"causal_lm": {"whole": True}}), **fell["predicted"]["batch"])
    assert fell["predicted"]["live_peak_bytes"] == whole.live_peak_bytes


def test_a_run_of_a_bert(tmp_path):
    """Trains and evaluates a model with a transform before its decoder; the plan reads the same head."""
    folder = byte_folder(tmp_path / "bert", "BertLMHeadModel", is_decoder=True, architectures=["BertLMHeadModel"])
    (tmp_path / "n.jsonl").write_text('{"prompt": "a b", "completion": " c d"}\n' * 8, encoding="utf-8")
    data = {"train": str(tmp_path / "n.jsonl"), "test": str(tmp_path / "n.jsonl"), "metrics": []}
    recipe = Recipe(
        model=folder, data=data, patches=[{"lora": {"r": 2}}], output=str(tmp_path / "run"),
        training={"max_steps": 3, "learning_rate": 1e-2}, engine={"allocator": "none"},
    )  # fmt: skip
    start = evaluate(recipe, base_only=True)["metrics"]["loss"]
    made = train(recipe)
    assert made["steps"] == 3 and evaluate(recipe)["metrics"]["loss"] < start
    assert made["predicted"]["live_peak_bytes"] == pytest.approx(made["measured"]["live_peak_bytes"], rel=0.05)


# --- faults that no test saw -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["softcap", "position_bias", "s_aux", "cache"])
def test_fused_attention_leaves_what_it_does_not_know(monkeypatch, kind):
    """A soft cap, a position bias, sinks or a cache: transformers' own function gets it, ours is not used."""

    class Layer(nn.Module):
        is_causal, num_key_value_groups = True, 1

    query, key, value = (torch.randn(2, 4, 6, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    passed = []
    monkeypatch.setattr(fused_ops, "sdpa_attention_forward", lambda *a, **k: (passed.append(k), (a[1], None))[1])
    fused_ops.fused_attention(Layer(), query, key, value, None)
    assert not passed, "without them it is ours"
    fused_ops.fused_attention(Layer(), query, key, value, None, **{kind: torch.ones(4)})
    assert len(passed) == 1 and passed[0][kind] is not None


def test_rows_step_at_the_rate_of_their_own_group():
    model = MODELS["llama"]()
    surgery = (
        Meft(r=64, probes=2, weight_decay=0.0) if "weight_decay" in Meft.__dataclass_fields__ else Meft(r=64, probes=2)
    )
    surgery = surgery.apply(model, Place(fast="cpu", slow="ram"))
    anchors = [p for p in model.parameters() if p.requires_grad]
    other = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW(
        [{"params": [other], "lr": 0.5, "betas": (0.1, 0.2)}, {"params": anchors, "lr": 1e-3}], weight_decay=0.0
    )
    assert all(Rates.of(optimizer, p) == Rates(1e-3, weight_decay=0.0) for p in anchors)
    before = [store.whole().clone() for store in surgery.stores]
    CausalLM().loss(model, batch_of(model)).value.backward()
    optimizer.step()
    moved = max(float((store.whole() - old).abs().max()) for store, old in zip(surgery.stores, before, strict=True))
    assert moved == pytest.approx(1e-3, rel=1e-2), "Adam's first step is as long as the rate"
    surgery.revert()


def test_the_head_is_read_once():
    model = MODELS["llama"]()
    with head_read(model):
        assert head.head_of(model) is head.head_of(model)
    assert head.READ not in vars(model)


@pytest.mark.real
@pytest.mark.parametrize("precision", ["auto", "nf4", "int8", "fp16"])
def test_nothing_is_taken_from_a_real_model_in_16_bits(precision, users_cache):
    """Deep, in bf16, on random tokens: the first tokens' gradients are rounding alone."""
    from trimtab.engine.packing_probe import leak
    from trimtab.engine.trainers import PackedRows
    from trimtab.model.load import load_model
    from trimtab.model.spec import ModelSpec

    model, _ = load_model(ModelSpec("smollm2-135m", precision=precision))
    assert leak(model, PackedRows(pad_token_id=0)) == ""
    surgery = PaCA(r=8).apply(model, Place("cpu"))
    found = probe(model.train(), Recipe(model="smollm2-135m", patches=["paca"]))
    assert not found.notes
    surgery.revert()


def test_the_patch_after_one_that_prunes_must_not_change_the_pruned_models_loss():
    model = MODELS["llama"]()
    with LossCompared(model, CausalLM()) as compared:
        before = compared.before
        surgeries = [Pruning().apply(model, Place(fast="cpu"))]
        compared.applied(surgeries[0])
        assert compared.before != before
        surgeries.append(LoRA(r=4).apply(model, Place(fast="cpu")))
        compared.applied(surgeries[1])
        compared.require_unchanged(surgeries, None)
        with torch.no_grad():
            for tensor in surgeries[1].own_tensors().values():
                tensor.add_(0.1)
        with pytest.raises(BadInput, match="with LoRA: .*should not change before training"):
            compared.require_unchanged(surgeries, None)
    for surgery in reversed(surgeries):
        surgery.revert()
