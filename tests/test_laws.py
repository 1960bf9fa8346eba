"""What holds for every trained patch in the table, on every family of models (DESIGN 7, promises 1, 2, 4, 6, 7 and 8).

A new patch adds one row to CASES (world.py), and all of this is asked of it.
"""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from conftest import MODELS, logits, quantise, tiny_batch
from trimtab import methods
from trimtab.artifacts.adapter import Base, load_adapter, save_adapter
from trimtab.contracts import When
from trimtab.errors import BadInput
from trimtab.model.load import base_hash
from world import CASES, EVERY, PLACE, STORED, gradients, make, same, snapshot, train, values

# fields under which a patch shares a model with others
PAIR = {
    "paca": {"targets": "q_proj,v_proj"}, "lora": {"targets": "up_proj,down_proj"}, "senszoq": {"targets": "o_proj"},
    "diff_pruning": {"targets": "k_proj", "candidates": 0.6},
    "edora": {"targets": "gate_proj"},
}  # fmt: skip
UNMERGED, UNPORTABLE = (
    {name for name, (patch, *_) in EVERY.items() if form not in methods.TABLE[patch].exports}
    for form in ("merged", "peft")
)
WHOLE = {"experts": 4, "probes": 4, "k": 64}  # no choice is made that a step along a gradient could change
SMOOTH = {**dict.fromkeys(["meft", *STORED], WHOLE), "edora": {"detach_norm": False}}
SMOOTH["meft switch"] = {**WHOLE, "experts": 1, "probes": 1}
QUANTISED = ("paca", "lora", "lora with fa", "edora", "parallel_adapter", "meft", "senszoq", "diff_pruning", "lst",
             *STORED)  # fmt: skip
DEQUANTISED = ("paca", "edora", "senszoq", "diff_pruning")  # bitsandbytes also rounds the input of an int8 product

patches = pytest.mark.parametrize("name", EVERY)
families = pytest.mark.parametrize("family", MODELS)


def put(name: str, model: nn.Module, **fields):
    """Apply it where its tables are to lie."""
    return make(name, **fields).apply(model, EVERY[name][2])


def trained(name: str, family: str, steps: int = 3, **fields):
    model = MODELS[family]()
    surgery = put(name, model, **fields)
    train(model, surgery, steps)
    return model, surgery


def test_every_patch_has_a_case():
    assert set(CASES) == set(methods.names("patch", "train"))
    assert all(methods.find(name).when is When.TRAIN for name in CASES)


@patches
def test_generation_and_the_cache(name):
    model, _ = trained(name, "llama", steps=4)
    prompt = tiny_batch(model)["input_ids"][:1]
    slow, fast = (
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, use_cache=cache
        )
        for cache in (False, True)
    )
    assert torch.equal(slow, fast)


@patches
@families
def test_apply_changes_nothing_and_revert_leaves_nothing(name, family):
    model = MODELS[family]()
    batch, before, weights = tiny_batch(model), snapshot(model), values(model)
    outputs = logits(model, batch)
    surgery = put(name, model)
    assert torch.allclose(logits(model, batch), outputs, atol=1e-5), "apply must not change the outputs"
    train(model, surgery, 2)
    assert not torch.allclose(logits(model, batch), outputs, atol=1e-5), "training must change them"
    surgery.revert()
    assert snapshot(model) == before
    assert same(model.state_dict(), weights)
    assert torch.equal(logits(model, batch), outputs)


@patches
def test_apply_again_after_a_revert(name):
    model = MODELS["llama"]()
    batch, before = tiny_batch(model), snapshot(model)
    ends = []
    for _ in range(2):
        surgery = put(name, model)
        train(model, surgery, 2)
        ends.append(logits(model, batch))
        surgery.revert()
    assert torch.equal(*ends) and snapshot(model) == before


@patches
@families
def test_frozen_weights_do_not_move_and_the_loss_falls(name, family):
    model = MODELS[family]()
    weights = values(model)
    surgery = put(name, model)
    own = {id(tensor) for tensor in surgery.own_tensors().values()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable and all(id(p) in own for p in trainable), "what is trained is what is saved"
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, surgery, 12)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(frozen[key], p) for key, p in model.named_parameters() if key in frozen)
    surgery.revert()
    assert same(model.state_dict(), weights)


@patches
@families
def test_own_tensors_carry_a_patch_to_a_fresh_model(name, family):
    model, surgery = trained(name, family)
    own = {key: tensor.detach().clone() for key, tensor in surgery.own_tensors().items()}
    fresh = MODELS[family]()
    again = put(name, fresh)
    again.load_tensors(own)
    batch = tiny_batch(model)
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    with pytest.raises(BadInput):
        again.load_tensors(dict(list(own.items())[1:]))
    with pytest.raises(BadInput):
        again.load_tensors({key: tensor[..., None] for key, tensor in own.items()})


READER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trimtab import methods
from trimtab.contracts import Place
torch.set_num_threads(1)
folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
batch, outputs = load_file(folder / "batch.safetensors"), {}
for name, (patch, fields, slow) in cases.items():
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    surgery = methods.find(patch)(**fields).apply(model, Place(fast="cpu", slow=slow))
    surgery.load_tensors(load_file(folder / f"{name}.safetensors"))
    with torch.no_grad():
        outputs[name] = model(**batch).logits[batch["attention_mask"] == 1]
save_file(outputs, folder / "outputs.safetensors")
"""


@pytest.fixture(scope="module")
def read_elsewhere(tmp_path_factory):
    """Each patch trained and saved here, loaded and run in one fresh process; name -> (outputs here, outputs there)."""
    folder = tmp_path_factory.mktemp("fresh")
    base = MODELS["llama"]()
    batch, here = tiny_batch(base), {}
    base.save_pretrained(folder / "base")
    save_file(batch, folder / "batch.safetensors")
    for name in EVERY:
        model, surgery = trained(name, "llama")
        own = {key: tensor.detach().contiguous() for key, tensor in surgery.own_tensors().items()}
        save_file(own, folder / f"{name}.safetensors")
        here[name] = logits(model, batch)
    told = {name: (patch, {**CASES[patch], **more}, place.slow) for name, (patch, more, place) in EVERY.items()}
    subprocess.run([sys.executable, "-c", READER, str(folder), json.dumps(told)], check=True)
    there = load_file(folder / "outputs.safetensors")
    return {name: (here[name], there[name]) for name in EVERY}


@patches
def test_a_fresh_process_loads_it(name, read_elsewhere):
    here, there = read_elsewhere[name]
    assert torch.equal(here, there)


@patches
@families
def test_merged_is_a_plain_model_with_the_same_outputs(name, family, tmp_path):
    model, surgery = trained(name, family)
    batch = tiny_batch(model)
    outputs = logits(model, batch)
    if name in UNMERGED:
        with pytest.raises(BadInput):
            surgery.merge()
        assert torch.equal(logits(model, batch), outputs), "a refusal must change nothing"
        return
    plain = MODELS[family]()
    surgery.merge()
    assert str(model) == str(plain) and list(model.state_dict()) == list(plain.state_dict())
    assert snapshot(model)["hooks"] == snapshot(plain)["hooks"]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert torch.allclose(logits(model, batch), outputs, atol=1e-4)
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if "CausalLM" in type(model).__name__ else AutoModelForSequenceClassification
    assert torch.equal(logits(auto.from_pretrained(tmp_path).eval(), batch), logits(model, batch))


@patches
@families
def test_portable_loads_in_stock_peft(name, family, tmp_path):
    model, surgery = trained(name, family)
    if name in UNPORTABLE:
        with pytest.raises(BadInput):
            surgery.portable()
        return
    from peft import PeftModel

    portable = surgery.portable()
    portable.config.save_pretrained(tmp_path)
    tensors = {key: tensor.contiguous() for key, tensor in portable.tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    stock = PeftModel.from_pretrained(MODELS[family](), tmp_path).eval()
    batch = tiny_batch(model)
    assert torch.allclose(logits(stock, batch), logits(model, batch), atol=1e-5)


@patches
def test_the_same_seed_gives_the_same_numbers_and_leaves_the_global_generator(name):
    state = torch.get_rng_state()
    model = MODELS["llama"]()
    torch.set_rng_state(state)
    first = {key: t.detach().clone() for key, t in put(name, model).own_tensors().items()}
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1234)
    second = put(name, MODELS["llama"]()).own_tensors()
    assert same(first, {key: t.detach() for key, t in second.items()})
    left, right = (trained(name, "qwen2", steps=4)[0] for _ in range(2))
    assert same(left.state_dict(), right.state_dict())


@pytest.mark.parametrize("first,second", itertools.permutations(CASES, 2))
def test_each_pair_composes_or_is_refused(first, second):
    model = MODELS["llama"]()
    batch, before, weights = tiny_batch(model), snapshot(model), values(model)
    outputs = logits(model, batch)
    one, two = (make(name, **PAIR.get(name, {})) for name in (first, second))
    below = one.apply(model, PLACE)
    if one.exclusive_reason or two.exclusive_reason:
        patched = snapshot(model)
        with pytest.raises(BadInput):
            two.apply(model, PLACE)
        assert snapshot(model) == patched, "a refusal must change nothing"
    else:
        above = two.apply(model, PLACE)
        assert torch.allclose(logits(model, batch), outputs, atol=1e-5)
        train(model, above, 2)
        for surgery in (below, above):
            own = [t for t in surgery.own_tensors().values() if t.requires_grad]
            reached = [t.grad is not None and bool(t.grad.any()) for t in own]
            reached += [bool(store.pending() or store.dirty_rows()) for store in surgery.stores]
            assert own and any(reached), type(surgery).__name__
        assert {id(p) for p in model.parameters() if p.requires_grad and p.numel()} == {
            id(t) for surgery in (below, above) for t in surgery.own_tensors().values() if t.requires_grad and t.numel()
        }
        above.revert()
    below.revert()
    assert snapshot(model) == before and same(model.state_dict(), weights)


@pytest.mark.parametrize("first,second", itertools.product(("paca", "lora", "edora"), repeat=2))
def test_one_linear_takes_one_patch(first, second):
    model = MODELS["llama"]()
    make(first, targets="q_proj").apply(model, PLACE)
    patched = snapshot(model)
    for targets in ("all-linear", "q_proj", "k_proj,q_proj", r"self_attn\.q"):
        with pytest.raises(BadInput):
            make(second, targets=targets).apply(model, PLACE)
    assert snapshot(model) == patched


@patches
@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name, family, reentrant):
    model, surgery = trained(name, family, steps=1)
    batch = tiny_batch(model)
    model.train()
    plain = gradients(model, surgery, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = gradients(model, surgery, batch)
    assert plain.keys() == again.keys() and plain
    assert all(torch.allclose(plain[key], again[key], atol=1e-6) for key in plain)


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"lora with fa"}))  # LoRA-FA's gradient is another on purpose
@pytest.mark.parametrize("family", ["llama", "qwen2", "bert"])
def test_gradients_equal_finite_differences(name, family):
    """Along each tensor's own gradient the loss must climb at the rate |gradient|, whatever the formula."""
    model, surgery = trained(name, family, steps=2, **SMOOTH.get(name, {}))
    model.double()
    batch = tiny_batch(model)
    own = surgery.own_tensors() | {store.name: store.whole() for store in surgery.stores}
    for key, gradient in gradients(model, surgery, batch).items():
        if (length := gradient.norm().double().item()) < 1e-3:
            continue
        climb = []
        for step in (1e-3, -1e-3):
            moved = copy.deepcopy(own[key].detach())
            with torch.no_grad():
                own[key].add_(gradient / length, alpha=step)
                for store in surgery.stores:
                    store.rewritten()
                climb.append(model(**batch).loss.item())
                own[key].copy_(moved)
        off = 5e-4 if name == "lst" else 2e-4  # its climbs are small, and two roundings of an fp32 loss are 5e-4
        assert (climb[0] - climb[1]) / 2e-3 == pytest.approx(length, rel=1e-2, abs=off), key


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_quantised_base(name, kind):
    model = quantise(MODELS["llama"](), kind)
    batch, before, weights = tiny_batch(model), snapshot(model), values(model)
    outputs = logits(model, batch)
    surgery = put(name, model)
    rounded = kind == "int8" and name in DEQUANTISED
    assert torch.allclose(logits(model, batch), outputs, atol=0.1 if rounded else 1e-4)
    losses = train(model, surgery, 8)
    assert losses[-1] < 0.9 * losses[0]
    surgery.revert()
    assert same(model.state_dict(), weights)
    assert snapshot(model) == before
    assert torch.equal(logits(model, batch), outputs)


def hostile(whole: bytes, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """What a stranger's adapter_model.safetensors may hold instead of what it should."""
    from safetensors.torch import save

    first = next(iter(tensors))
    return {
        "empty": b"",
        "cut short": whole[: len(whole) // 2],
        "a header longer than the file": (2**40).to_bytes(8, "little") + whole[8:],
        "a pickle": pickle.dumps({"weights": [1.0]}),
        "one tensor missing": save({k: t for k, t in tensors.items() if k != first}),
        "one tensor too many": save({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}),
        "another shape": save({**tensors, first: torch.zeros(1, 1, 1)}),
    }


@patches
def test_a_damaged_or_hostile_file_is_an_error_and_changes_nothing(name, tmp_path):
    model, surgery = trained(name, "llama", steps=1)
    surgery.revert()
    fresh = put(name, model)
    folder = save_adapter(tmp_path / "adapter", [fresh], Base("tiny", base_hash(model)))
    fresh.revert()
    path = folder / "adapter_model.safetensors"
    before, weights = snapshot(model), values(model)
    whole, tensors = path.read_bytes(), load_file(path)
    (folder / "checksums.json").unlink()  # a stranger's would fit
    for damage, content in hostile(whole, tensors).items():
        path.write_bytes(content)
        with pytest.raises(BadInput):
            load_adapter(model, folder, PLACE)
            pytest.fail(f"an adapter with {damage} was loaded")
        assert snapshot(model) == before, damage
    path.write_bytes(whole)
    for content in ("", "{", "[]", '{"patch": "paca"}', '{"patch": "os:system", "base": {}}'):
        (folder / "trimtab.json").write_text(content)
        with pytest.raises(BadInput):
            load_adapter(model, folder, PLACE)
    assert snapshot(model) == before and same(model.state_dict(), weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
