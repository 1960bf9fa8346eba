"""LoRA-FA and VeLoRA: what they keep, their gradients beside naive ones and peft's, and the way to and from files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from conftest import MODELS, logits, quantise, tiny_batch
from helpers_run import make_world, run, tree
from trimtab.artifacts.adapter import Base, load_adapter, save_adapter
from trimtab.errors import BadInput
from trimtab.methods.lora import LoRA
from trimtab.model.load import base_hash
from world import PLACE, same, snapshot, train, values

pytestmark = pytest.mark.filterwarnings("ignore")
FORMS = {
    "fa": {"fa": True},
    "velora": {"velora": True, "velora_groups": 8},
    "once": {"velora": True, "velora_groups": 12, "velora_init": "batch_average_once"},
    "random": {"velora": True, "velora_groups": 8, "velora_init": "random", "velora_scale": 2.0},
}
forms = pytest.mark.parametrize("form", FORMS)


def patched(form: str, family: str = "llama", **more):
    model = MODELS[family]()
    return model, LoRA(**{"r": 4, **FORMS.get(form, {}), **more}).apply(model, PLACE)


def kept_bytes(model, batch) -> int:
    """Bytes of all that autograd saves in a forward pass, but the parameters."""
    found, own = {}, {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            found[tensor.untyped_storage()._cdata] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(**batch).loss
        assert loss.requires_grad
    return sum(size for _, size in found.values())


# --- LoRA-FA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"rslora": True, "alpha": 3.0}, {"dropout": 1e-9}], ids=str)
def test_fa_steps_as_pefts_optimizer(more, monkeypatch):
    """Five steps of AdamW beside those of peft's LoRA-FA optimizer on its own model, in fp32."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    model, ours = patched("fa", **more)
    fields = {"lora_alpha": more.get("alpha", 8), "use_rslora": more.get("rslora", False)}
    stock = get_peft_model(MODELS["llama"](), LoraConfig(r=4, target_modules="all-linear", **fields))
    own, theirs = ours.own_tensors(), dict(stock.named_parameters())
    pairs = {key: theirs[f"base_model.model.{key.removesuffix('.weight')}.default.weight"] for key in own}
    with torch.no_grad():
        for key, tensor in own.items():
            pairs[key].copy_(tensor)
    start = {key: tensor.detach().clone() for key, tensor in own.items()}
    made = create_lorafa_optimizer(stock, r=4, lora_alpha=fields["lora_alpha"], lr=1e-2)
    made.param_groups[0]["eps"] = 1e-15
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, eps=1e-15, weight_decay=0)
    for step in range(5):
        for one, with_, of in ((model, optimizer, tiny_batch), (stock, made, tiny_batch)):
            with_.zero_grad()
            one(**of(model, seed=step)).loss.backward()
            with_.step()
    for key, tensor in own.items():
        if "lora_A" in key:
            assert torch.equal(tensor, start[key]), "A is as it was drawn"
        else:
            assert torch.allclose(tensor, pairs[key], atol=2e-4) and not torch.equal(tensor, start[key]), key


def test_fa_corrects_the_gradient_of_b_as_written():
    """(1 / s^2) g (A A^T)^-1, with g from the plain form with the same A and B."""
    model, surgery = patched("fa", alpha=6.0)
    plain, other = patched("", alpha=6.0)
    train(model, surgery, 2)
    other.load_tensors({key: tensor.detach() for key, tensor in surgery.own_tensors().items()})
    batch = tiny_batch(model)
    for one in (model, plain):
        one.zero_grad()
        (one(**batch).loss / 2).backward()
        (one(**batch).loss / 2).backward()  # two micro-batches
    raw = other.own_tensors()
    for key, tensor in surgery.own_tensors().items():
        if "lora_B" in key:
            a_RI = raw[key.replace("lora_B", "lora_A")].detach()
            expected = torch.linalg.solve(a_RI @ a_RI.T, raw[key].grad.T).T / (6.0 / 4) ** 2
            assert torch.allclose(tensor.grad, expected, rtol=1e-3, atol=1e-6), key
        else:
            assert tensor.grad is None and not tensor.requires_grad


@pytest.mark.parametrize("form", ["fa", "velora"])
def test_inputs_are_not_kept(form):
    """Of each block's four inputs autograd keeps none (fa), or 8 numbers a token and one v (velora). Attention keeps
    that of o_proj for itself."""
    batch = tiny_batch(MODELS["llama"]())
    (plain, _), (model, surgery) = patched(""), patched(form)
    tokens, blocks = batch["input_ids"].numel(), model.config.num_hidden_layers
    inputs = 4 * tokens * (2 * model.config.hidden_size + model.config.intermediate_size)
    widths = (64, 64, 64, model.config.intermediate_size)
    codes = sum(4 * (8 * tokens + width // 8) for width in widths) if form == "velora" else 0
    assert kept_bytes(plain, batch) - kept_bytes(model, batch) == blocks * (inputs - codes)
    layer = surgery.layers["model.layers.0.mlp.down_proj"]
    x = torch.randn(40, layer.in_features, requires_grad=True)
    saved = {tuple(t.shape) for t in layer.train()(x).grad_fn.saved_tensors if t is not None}
    assert (40, 4) in saved and (40, layer.in_features) not in saved
    assert ((40, 8) in saved) is (form == "velora")


# --- VeLoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["velora", "once", "random"])
@pytest.mark.parametrize("width", [64, 50])
def test_velora_is_pefts(form, width):
    """One layer beside peft's own VeLoRA, with an input that its groups do not divide."""
    from peft import LoraConfig, VeloraConfig, inject_adapter_in_model

    fields = FORMS[form]
    names = {"velora_groups": "num_groups", "velora_scale": "scale", "velora_init": "init_type"}
    config = VeloraConfig(**{names[key]: value for key, value in fields.items() if key in names})
    torch.manual_seed(width)
    host = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(width, 30)})
    stock = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], velora_config=config), host
    )
    theirs = stock["q_proj"].train()
    model = MODELS["llama"]()
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(width, 30)
    surgery = LoRA(r=4, targets=r"layers\.0\.self_attn\.q_proj", **fields).apply(model, PLACE)
    (ours,) = surgery.layers.values()
    ours.train().base_layer.load_state_dict(theirs.base_layer.state_dict())
    ours.lora_A["default"].weight.data.copy_(theirs.lora_A["default"].weight)
    for layer in (ours, theirs):
        torch.manual_seed(1)
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    if form == "random":
        theirs.lora_velora_embed["default"].copy_(ours.lora_velora_embed)
    for round_ in range(2):  # the second batch has another mean
        x = torch.randn(2, 7, width) + round_
        dy, found = torch.randn(2, 7, 30), []
        for layer in (ours, theirs):
            layer.zero_grad()
            mine = x.clone().requires_grad_()
            y = layer(mine)
            y.backward(dy)
            found.append((y, mine.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad))
        for one, two in zip(*found, strict=True):
            assert torch.allclose(one, two, atol=1e-4)


def test_velora_is_exact_where_each_group_is_one_direction():
    """x whose parts are all multiples of one v is rebuilt exactly, so that A's gradient is plain LoRA's."""
    v = torch.nn.functional.normalize(torch.rand(8), dim=0)
    x = (torch.rand(20, 8)[..., None] * v).flatten(1)  # (20, 64), a mean along v
    grads = []
    for form in ("velora", ""):
        _, surgery = patched(form, targets="q_proj")
        layer = surgery.layers["model.layers.0.self_attn.q_proj"].train()
        torch.nn.init.ones_(layer.lora_B["default"].weight)
        layer(x).square().sum().backward()
        grads.append(layer.lora_A["default"].weight.grad)
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-3)


def test_evaluation_uses_the_exact_gradient_and_sets_nothing():
    model, surgery = patched("once")
    model.eval()(**tiny_batch(model)).loss.backward()
    embeds = [tensor for key, tensor in surgery.own_tensors().items() if "embed" in key]
    assert len(embeds) == 2 * 4 and not any(tensor.any() for tensor in embeds), "q/k/v, o, gate/up, down"
    train(model.train(), surgery, 1)
    assert all(torch.isclose(tensor.norm(), torch.tensor(1.0), atol=1e-5) for tensor in embeds)


# --- all forms -------------------------------------------------------------------------------------------------------


@forms
def test_learns_is_saved_exported_and_leaves(form, tmp_path):
    from peft import PeftModel

    model, surgery = patched(form)
    batch = tiny_batch(model)
    surgery.revert()
    before, weights = snapshot(model), values(model)
    surgery = surgery.patch.apply(model, PLACE)
    model.train()
    losses = train(model, surgery, 12)
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    tuned = logits(model, batch)
    folder = save_adapter(tmp_path / "adapter", [surgery], Base("tiny", base_hash(MODELS["llama"]())))
    portable = surgery.portable()
    assert not any("embed" in key for key in portable.tensors) and portable.config.velora_config is None
    portable.config.save_pretrained(tmp_path / "peft")
    tensors = {key: tensor.contiguous() for key, tensor in portable.tensors.items()}
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors", metadata={"format": "pt"})
    for path in (folder, tmp_path / "peft"):  # a run's own folder is one of peft's too
        stock = PeftModel.from_pretrained(MODELS["llama"](), path).eval()
        assert torch.allclose(logits(stock, batch), tuned, atol=1e-5)
    surgery.revert()
    assert snapshot(model) == before and same(model.state_dict(), weights)
    fresh = MODELS["llama"]()
    load_adapter(fresh, folder, PLACE)
    assert torch.equal(logits(fresh, batch), tuned)


@forms
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_quantised_base(form, kind):
    model = quantise(MODELS["llama"](), kind)
    patch = LoRA(r=4, **FORMS[form])
    if kind == "int8" and form != "fa":
        with pytest.raises(BadInput, match="Use nf4 or bf16"):
            patch.apply(model, PLACE)
        return
    surgery = patch.apply(model, PLACE)
    losses = train(model.train(), surgery, 8)
    assert losses[-1] < 0.9 * losses[0]
    assert all(("lora_B" in key or form != "fa") for key, t in surgery.own_tensors().items() if t.requires_grad)


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"fa": True, "velora": True}, "A is frozen"),
        ({"fa": True, "dora": True}, "for B alone"),
        ({"velora": True, "dora": True}, "peft computes DoRA"),
        ({"velora": True, "dropout": 0.1}, "input of its own"),
        ({"velora_groups": 8}, "velora_groups.* without velora"),
        ({"velora": True, "velora_groups": 64}, "reads 64 numbers"),
        ({"velora": True, "velora_groups": 0}, "velora_groups: 0"),
        ({"velora": True, "velora_groups": 8, "velora_scale": 0.0}, "multiplies the gradient"),
    ],
    ids=str,
)
def test_bad_input(fields, words):
    model = MODELS["llama"]()
    before = snapshot(model)
    with pytest.raises(BadInput, match=words):
        LoRA(**fields).apply(model, PLACE)
    assert snapshot(model) == before


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("form", ["fa", "once"])
def test_a_run_is_planned_and_resumed_exactly(form, world, tmp_path):
    patch = {"lora": {"r": 4, **FORMS[form]}}
    whole = run(tree(world, tmp_path / "whole", patch, max_steps=4), budget={"fast": "4GiB"})
    predicted, measured = whole["predicted"]["live_peak_bytes"], whole["measured"]["live_peak_bytes"]
    assert abs(predicted - measured) <= 0.01 * measured
    keys = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    once = run(tree(world, tmp_path / "once", patch, max_steps=4, **keys))
    run(tree(world, tmp_path / "twice", patch, max_steps=2, **keys))
    again = run({**tree(world, tmp_path / "twice", patch, max_steps=4, **keys), "resume": True})
    assert again["final_loss"] == once["final_loss"]


def test_without_gradients_they_are_refused(world, tmp_path):
    for form in ("fa", "velora"):
        patch = {"lora": {"r": 4, **FORMS[form]}}
        with pytest.raises(BadInput, match="Set stepper: backprop"):
            run({**tree(world, tmp_path / form, patch, max_steps=1), "stepper": "mezo"})
