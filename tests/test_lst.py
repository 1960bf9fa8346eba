"""LST against the paper's equations written out, its start from the pruned model, and what it leaves to autograd."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from conftest import MIXTURES, MODELS, logits, quantise, tiny_batch
from helpers_run import films, make_world, metrics, tree
from trimtab import methods
from trimtab.errors import BadInput
from trimtab.inference.evaluate import evaluate
from trimtab.methods.lst import ATTRIBUTE, LST
from trimtab.model import anatomy
from trimtab.model.surgery import is_patch
from trimtab.recipe import Recipe
from trimtab.training.train import train
from world import PLACE, snapshot
from world import train as steps

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def filled(surgery) -> None:
    """Random values in every tensor, so that no term is zero."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in surgery.own_tensors().values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=random))


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("family,every", [("llama", 1), ("llama", 2), ("bert", 1), ("qwen2", 1)])
def test_the_outputs_are_the_papers(family, every):
    model, plain = MODELS[family](3), MODELS[family](3)
    surgery = LST(r=4, every=every).apply(model, PLACE)
    filled(surgery)
    own, batch = {key: t.detach() for key, t in surgery.own_tensors().items()}, tiny_batch(model)
    path, stack = anatomy.blocks(plain)
    read: list[torch.Tensor] = []
    stack[0].register_forward_pre_hook(lambda m, a, k: read.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
    for block in stack:
        block.register_forward_hook(lambda m, a, out: read.append(out[0] if isinstance(out, tuple) else out))
    logits(plain, batch)
    holder, act = path.rpartition(".")[0], nn.functional.silu if family != "bert" else nn.functional.gelu

    def part(name: str, key: str) -> torch.Tensor:
        return own[f"{name}.{ATTRIBUTE}.{key}"]

    side = read[0] @ part(holder, "first").T
    for i in [n for n in range(len(stack)) if (len(stack) - 1 - n) % every == 0]:
        name = f"{path}.{i}"
        mu = 1 / (1 + torch.exp(-part(name, "alpha") / 0.1))
        x = mu * (read[i + 1] @ part(name, "down").T) + (1 - mu) * side
        n = rms(x) * part(name, "norm")
        fired = n @ part(name, "first").T
        fired = act(n @ part(name, "gate").T) * fired if family != "bert" else act(fired)
        side = x + fired @ part(name, "second").T
    added = (rms(side) * part(holder, "norm")) @ part(holder, "last").T
    inner = plain.get_submodule(holder)

    def adds(module, args, out):
        out.last_hidden_state = out.last_hidden_state + added
        return out

    inner.register_forward_hook(adds)
    assert torch.allclose(logits(model, batch), logits(plain, batch), atol=1e-4)
    assert not torch.allclose(logits(plain, batch), logits(MODELS[family](3), batch), atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_no_graph_in_the_model(family):
    """Within the blocks autograd is off and their outputs carry no graph, also under checkpointing."""
    model = MODELS[family]()
    surgery = LST(r=4).apply(model, PLACE)
    model.train()
    seen: list[bool] = []
    for module in anatomy.blocks(model)[1].modules():
        if not isinstance(module, nn.ModuleList) and not is_patch(module):
            module.register_forward_hook(
                lambda m, a, out: seen.append(
                    torch.is_grad_enabled() or (out[0] if isinstance(out, tuple) else out).grad_fn is not None
                )
            )
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(**tiny_batch(model)).loss
        loss.backward()
        assert torch.is_grad_enabled()
    assert seen and not any(seen)
    filled(surgery)
    model.zero_grad()
    model(**tiny_batch(model)).loss.backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in surgery.own_tensors().values())


def test_what_is_kept_for_the_backward_pass_is_a_third_of_loras():
    def kept(patch) -> int:
        model = MODELS["llama"]()
        patch.apply(model, PLACE)
        model.train()
        batch, storages = tiny_batch(model, rows=8, tokens=32), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hidden = model.base_model(input_ids=batch["input_ids"]).last_hidden_state
        assert hidden.requires_grad
        return sum(storages.values())

    assert kept(LST(r=8)) < kept(methods.find("lora")(r=4)) / 3


@pytest.mark.parametrize("family", ["llama", "bert", "qwen2"])
def test_it_starts_as_the_pruned_model(family):
    model, plain = MODELS[family](2), MODELS[family](2)
    surgery = LST(r=4).apply(model, PLACE)
    ffns = anatomy.ffns(plain)
    found = {}
    for ffn in ffns:
        named = {n.rpartition(".")[2]: m for part in (ffn.reader, ffn.module) for n, m in part.named_modules()}
        found[ffn.name] = (
            (ffn.reader.dense.weight, ffn.module.dense.weight) if ffn.kind == "bert"
            else (named["up_proj"].weight, named["down_proj"].weight)
        )  # fmt: skip
    rows = sum(second.detach().abs().sum(1) for _, second in found.values())
    chosen = sorted(sorted(range(64), key=lambda j: -float(rows[j]))[:16])
    for number, (first, second) in enumerate(found.values()):
        rung = surgery.rungs[number]
        wide, narrow = first.detach()[:, chosen], second.detach()[chosen]
        sums = [float(wide[k].abs().sum() + narrow[:, k].abs().sum()) for k in range(len(wide))]
        units = sorted(sorted(range(len(sums)), key=lambda k: -sums[k])[: len(sums) // 4])
        assert torch.equal(rung.first, wide[units]) and torch.equal(rung.second, narrow[:, units])
        assert torch.equal(rung.down, torch.eye(64)[chosen]) and float(rung.alpha) == 0
    assert torch.equal(surgery.ends.first, torch.eye(64)[chosen]) and not surgery.ends.last.any()


def test_where_an_ffn_cannot_be_pruned_it_is_said():
    model = MIXTURES["mixtral"]()
    surgery = LST(r=4).apply(model, PLACE)
    assert any("start at random" in note for note in surgery.notes)
    losses = steps(model, surgery, 12)
    assert losses[-1] < losses[0]
    assert not LST(r=4).apply(quantise(MODELS["llama"]()), PLACE).notes


def test_side_layers_are_dropped():
    counts = {}
    for every in (1, 2):
        model = MODELS["llama"]()
        surgery = LST(r=4, every=every).apply(model, PLACE)
        assert [n for n, b in enumerate(model.model.layers) if hasattr(b, ATTRIBUTE)] == list(surgery.rungs)
        counts[every] = len(surgery.rungs)
    assert counts == {1: 2, 2: 1}


def test_a_pass_that_fails_leaves_autograd_on():
    model = MODELS["llama"]()
    surgery = LST(r=4).apply(model, PLACE)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[5000]]))
    assert torch.is_grad_enabled() and not surgery.graph
    assert steps(model, surgery, 2)
    with torch.no_grad():
        model(**tiny_batch(model))
        assert not torch.is_grad_enabled()


def test_generation_with_beams_and_padding_equals_generation_without_a_cache():
    model = MODELS["llama"]()
    surgery = LST(r=4).apply(model, PLACE)
    filled(surgery)
    batch = tiny_batch(model, rows=3, tokens=6)
    ids = {"input_ids": batch["input_ids"].flip(1), "attention_mask": batch["attention_mask"].flip(1)}
    for how in ({"num_beams": 3}, {}):
        slow, fast = (
            model.generate(**ids, max_new_tokens=6, do_sample=False, use_cache=cache, **how) for cache in (False, True)
        )
        assert torch.equal(slow, fast)


def test_a_model_without_a_plain_stack_is_refused():
    model = MODELS["llama"]()
    kept = model.model.layers[1].forward
    model.model.layers[1].forward = lambda hidden, **more: kept(kept(hidden, **more), **more)[:, :1]
    before = snapshot(model)
    with pytest.raises(BadInput, match="differ in shape"):
        LST(r=4).apply(model, PLACE)
    assert snapshot(model) == before and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "fields,message",
    [({"r": 0}, "columns"), ({"r": 65}, "columns"), ({"every": 0}, "one layer"), ({"every": 3}, "one layer")],
)
def test_bad_fields(fields, message):
    model = MODELS["llama"]()
    before = snapshot(model)
    with pytest.raises(BadInput, match=message):
        LST(**fields).apply(model, PLACE)
    assert snapshot(model) == before


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_run_is_planned_resumed_and_evaluated(world, tmp_path, kind):
    make = tree if kind == "llama" else films
    keys = make(world, tmp_path / "run", {"lst": {"r": 2}}, max_steps=4, save_strategy="steps", save_steps=2)
    keys["data"]["test"] = keys["data"]["train"]
    made = train(Recipe.from_dict(keys))
    assert made["predicted"]["live_peak_bytes"] == pytest.approx(made["measured"]["live_peak_bytes"], rel=0.005)
    part = {**keys, "output": str(tmp_path / "part"), "resume": True}
    shutil.copytree(tmp_path / "run", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    shutil.rmtree(tmp_path / "part" / "adapter")
    (tmp_path / "part" / "run.json").unlink(missing_ok=True)
    train(Recipe.from_dict(part))
    assert metrics(tmp_path / "part")[-1][:2] == metrics(tmp_path / "run")[-1][:2]
    found = evaluate(Recipe.from_dict(keys))["metrics"]
    assert found["loss"] < 7 if kind == "llama" else 0 <= found["accuracy"] <= 1
