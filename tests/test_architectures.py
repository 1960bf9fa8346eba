"""Every causal language model that transformers builds, tiny, under every trained patch: right, or refused in words.

Right means: the patch changes no logit at first; the run's own loss and every gradient of what is trained, with all
fused forms in, equal those of another way (dense weights, stock peft, plain autograd); and the way back leaves the
model as it was. `docs/architectures.json` says what is expected of each pair, and docs/architectures.md shows it:
`python tests/test_architectures.py; python docs/build.py` writes both anew.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from architectures import LEFT_OUT, NAMES, build, classes
from byte_model import byte_folder, tiny
from trimtab import Recipe, methods
from trimtab.contracts import Place
from trimtab.engine.prepare import apply_fused_ops
from trimtab.engine.probe import batch_of, head_read, own_loss, probe
from trimtab.errors import BadInput
from trimtab.model import anatomy
from trimtab.model.load import load_model
from trimtab.model.stock_peft import require_loadable
from trimtab.planning.plan import plan
from trimtab.tiered.store import GRADS
from trimtab.training.train import train
from world import same, snapshot, values

TABLE = Path(__file__).parents[1] / "docs/architectures.json"
FIELDS: dict[str, dict[str, Any]] = {
    "paca": {"r": 3, "alpha": 6.0},
    "lora": {"r": 3},
    "edora": {"r": 3, "alpha": 6.0},
    "senszoq": {"density": 0.05},
    "diff_pruning": {"density": 1e-4, "candidates": 0.05},
    "parallel_adapter": {"r": 6, "scale": 0.5},
    "meft": {"r": 12, "experts": 4, "probes": 4, "k": 12, "scale": 2.0},
    "lst": {"r": 4},
    "full": {},
}
WITHIN = 1e-5
# Where a change of each weight's last bit moves the model's own gradients by 2e-6 to 9e-6 (Llama's by 3e-7).
ROUGH = {"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "qwen3_5_moe_text"}

Gradients = dict[str, Tensor]


def model_of(name: str) -> nn.Module:
    torch.set_num_threads(1)
    return build(name)


def outcome(name: str) -> dict[str, str]:
    """Patch -> "right", or why it is refused. AssertionError where neither is true."""
    model = model_of(name)
    batch = batch_of(model)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        base = model(**inputs, use_cache=False).logits
    return {patch: cell(name, patch, model, batch, base) for patch in FIELDS}


def cell(name: str, patch: str, model: nn.Module, batch: dict[str, Tensor], base: Tensor) -> str:
    before, held = snapshot(model), values(model)
    try:
        surgery = methods.find(patch)(**FIELDS[patch]).apply(model, Place(fast="cpu"))
    except BadInput as refusal:
        assert snapshot(model) == before and same(values(model), held), f"{patch}: a refusal left something behind"
        return short(refusal)
    try:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            assert close(model(**inputs, use_cache=False).logits, base), f"{patch}: the logits changed at first"
        fill(patch, surgery)
        try:
            recipe = probe(model, Recipe(model="any")).recipe
        except BadInput as refusal:
            return short(refusal)
        ours, gradients = of_run(patch, model, surgery, recipe, batch)
        wanted, truth = WAYS[patch](name, surgery, batch)
        assert abs(ours - wanted) <= WITHIN * abs(wanted), f"{patch}: the loss is {ours}, not {wanted}"
        whole = torch.stack([grad.norm() for grad in truth.values()]).norm()
        assert gradients.keys() == truth.keys()
        for key, grad in truth.items():
            apart = float((gradients[key] - grad).norm() / (grad.norm() + whole))
            assert apart <= (5 * WITHIN if name in ROUGH else WITHIN), (
                f"{patch}: the gradient of {key} is {apart:.1e} off"
            )
    finally:
        surgery.revert()
    for parameter in model.parameters():
        parameter.grad = None
    assert snapshot(model) == before and same(values(model), held), f"{patch}: the way back is not exact"
    return "right"


def short(refusal: BadInput) -> str:
    return textwrap.shorten(refusal.have, 110, placeholder=" ...")


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= WITHIN * b.norm())


def fill(patch: str, surgery: Any) -> None:
    """Values at which every part of the patch acts."""
    random = torch.Generator().manual_seed(3)
    if patch == "full":
        return
    for key, tensor in surgery.own_tensors().items():
        if tensor.is_floating_point() and tensor.numel():
            noise = torch.empty_like(tensor).normal_(0, 0.1, generator=random)
            tensor.data.copy_(tensor * (1 + noise) if key.endswith(".magnitude") else noise)
    for adapter in surgery.adapters.values() if patch == "meft" else ():
        adapter.router.refresh()


def of_run(
    patch: str, model: nn.Module, surgery: Any, recipe: Recipe, batch: dict[str, Tensor]
) -> tuple[float, Gradients]:
    """The loss and gradients that a step of training would have."""
    with head_read(model):
        swaps = apply_fused_ops(model, recipe)
        try:
            loss = recipe.load_objective().loss(model, batch).value
            loss.backward()
        finally:
            swaps.undo()
    if patch != "meft":
        found = of({key: p for key, p in surgery.own_tensors().items() if p.requires_grad})
    else:
        found = {}
        for key, adapter in surgery.adapters.items():
            for kind, store in zip(("rows", "router"), adapter.stores, strict=True):
                found[f"{key}.{kind}"] = grads = torch.zeros_like(store.whole(GRADS))
                for row in store.pending():
                    grads[row] = store.part(GRADS, row)
    return float(loss.detach()), found


# --- the other ways --------------------------------------------------------------------------------------------------


def dense(name: str, surgery: Any, batch: dict[str, Tensor]) -> tuple[float, Gradients]:
    """Patches of linears: whole weights, made of the patch's tensors, in the place of the model's own."""
    model = model_of(name)
    own = {key: p.detach().clone().requires_grad_() for key, p in surgery.own_tensors().items() if p.requires_grad}
    for key, layer in surgery.layers.items():
        module = model.get_submodule(key)
        old = module.weight.detach()
        if hasattr(layer, "indices"):
            a_RI = torch.eye(layer.in_features)[layer.indices]
            change = 2.0 * own[f"{key}.delta"] @ a_RI
        elif hasattr(layer, "counts"):
            values = own[f"{key}.values"]
            if hasattr(layer, "alpha"):
                gates = (torch.sigmoid(layer.alpha + own[f"{key}.shift"]) * 3 - 1.5).clamp(0, 1)
                values = values * gates[:-1] * gates[-1]
            change = torch.zeros(layer.shape).view(-1).index_add(0, layer.pattern.flat, values).view(layer.shape)
        elif hasattr(layer, "core"):
            old_OI = old if isinstance(module, nn.Linear) else old.T
            turned_OI = old_OI + 2.0 * layer.b_OR @ own[f"{key}.core"] @ layer.a_RI
            gain_O = own[f"{key}.magnitude"] / turned_OI.detach().norm(dim=1)
            change = gain_O[:, None] * turned_OI - old_OI
        else:
            change = 2.0 * own[f"{key}.lora_B.weight"] @ own[f"{key}.lora_A.weight"]
        del module.weight
        module.weight = old + (change if change.shape == old.shape and isinstance(module, nn.Linear) else change.T)
    loss = own_loss(model, batch)
    loss.backward()
    return float(loss.detach()), of(own)


def same_values(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1).detach())


def of(tensors: dict[str, Tensor]) -> Gradients:
    return {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in tensors.items()}


def beside(name: str, surgery: Any, batch: dict[str, Tensor]) -> tuple[float, Gradients]:
    """Parallel Adapter: its formula under plain autograd."""
    model = model_of(name)
    own = {key: tensor.detach().clone().requires_grad_() for key, tensor in surgery.own_tensors().items()}
    read: dict[str, list[Tensor]] = {key.rpartition(".")[0]: [] for key in own}
    inner: dict[str, list[Tensor]] = {key: [] for key in read}
    handles: list[Any] = []  # some models share an activation with all others
    for ffn in anatomy.ffns(model):
        block = model.get_submodule(ffn.name.rpartition(".")[0])
        for module in (block.fc1 if ffn.kind == "pair" else ffn.reader).modules():
            seen = lambda module, args, at=ffn.name: inner[at].extend(args[:1])  # noqa: E731
            handles.append(module.register_forward_pre_hook(seen))

        def add(h: Tensor, y: Tensor, at: str = ffn.name) -> Tensor:
            read[at].append(h.detach())
            return y + 0.5 * (h @ own[f"{at}.keys"].T).relu() @ own[f"{at}.values"]

        ffn.beside(add)
    loss = own_loss(model, batch)
    loss.backward()
    for handle in handles:
        handle.remove()
    for key, given in read.items():
        assert all(any(same_values(h, x) for x in inner[key]) for h in given), f"{key} reads something else than h"
    return float(loss.detach()), of(own)


def gated(name: str, surgery: Any, batch: dict[str, Tensor]) -> tuple[float, Gradients]:
    """MEFT, where all experts are probed and all pairs count: its formula under plain autograd."""
    model, own = model_of(name), {}
    for ffn in anatomy.ffns(model):
        adapter = surgery.adapters[ffn.name]
        width = adapter.width
        rows_NBX = adapter.store.whole().clone().requires_grad_()
        router_ND = adapter.router.table.whole().clone().requires_grad_()
        own |= {f"{ffn.name}.rows": rows_NBX, f"{ffn.name}.router": router_ND}

        def add(h: Tensor, y: Tensor, rows: Tensor = rows_NBX, router: Tensor = router_ND, D: int = width) -> Tensor:
            gates = torch.softmax(h @ router.T, -1) * len(router)
            fired = (torch.einsum("...d,nbd->...nb", h, rows[..., :D]) * gates[..., None]).relu()
            return y + 2.0 * torch.einsum("...nb,nbd->...d", fired, rows[..., D:])

        ffn.beside(add)
    loss = own_loss(model, batch)
    loss.backward()
    return float(loss.detach()), of(own)


def ladder(name: str, surgery: Any, batch: dict[str, Tensor]) -> tuple[float, Gradients]:
    """LST: its equations after a pass of the plain model, under plain autograd, with the frozen model in between."""
    model = model_of(name)
    own = {key: tensor.detach().clone().requires_grad_() for key, tensor in surgery.own_tensors().items()}
    path, stack = anatomy.blocks(model)
    holder, read = path.rpartition(".")[0], []

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def adds(module: nn.Module, args: tuple, out: Any) -> Any:
        side = read[0] @ own[f"{holder}.trimtab_lst.first"].T
        for number, hidden in enumerate(read[1:]):
            p = {key.rpartition(".")[2]: t for key, t in own.items() if key.startswith(f"{path}.{number}.")}
            mu = torch.sigmoid(10 * p["alpha"])
            x = mu * hidden @ p["down"].T + (1 - mu) * side
            n, act = normed(x, p["norm"]), surgery.rungs[number].act
            units = n @ p["first"].T
            side = x + (act(n @ p["gate"].T) * units if "gate" in p else act(units)) @ p["second"].T
        tops = f"{holder}.trimtab_lst"
        added = normed(side, own[f"{tops}.norm"]) @ own[f"{tops}.last"].T
        if isinstance(out, tuple):
            return (out[0].detach() + added, *out[1:])
        out.last_hidden_state = out.last_hidden_state.detach() + added
        return out

    def first(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        read[:] = [(args[0] if args else kwargs["hidden_states"]).detach()]

    stack[0].register_forward_pre_hook(first, with_kwargs=True)
    for block in stack:
        block.register_forward_hook(lambda m, a, o: read.append((o[0] if isinstance(o, tuple | list) else o).detach()))
    model.get_submodule(holder).register_forward_hook(adds)
    loss = own_loss(model, batch)
    loss.backward()
    return float(loss.detach()), of(own)


def plain(name: str, surgery: Any, batch: dict[str, Tensor]) -> tuple[float, Gradients]:
    """Full: the model alone."""
    model = model_of(name)
    loss = own_loss(model, batch)
    loss.backward()
    return float(loss.detach()), of(dict(model.named_parameters()))


WAYS: dict[str, Callable[..., tuple[float, Gradients]]] = {
    **dict.fromkeys(("paca", "lora", "edora", "senszoq", "diff_pruning"), dense), "parallel_adapter": beside,
    "meft": gated, "lst": ladder, "full": plain,
}  # fmt: skip


SAID = json.loads(TABLE.read_text()) if TABLE.is_file() else {"outcomes": {}}


@pytest.mark.parametrize("name", [name for name in NAMES if name in SAID["outcomes"]])
def test_right_or_refused(name):
    assert outcome(name) == SAID["outcomes"][name]


@pytest.mark.skipif(SAID.get("transformers") != transformers.__version__, reason="the table is of another transformers")
def test_the_table_leaves_nothing_out():
    assert list(SAID["outcomes"]) == NAMES and SAID["left_out"] == LEFT_OUT and SAID["classes"] == classes()
    assert all(list(row) == list(FIELDS) == methods.names("patch", "train") for row in SAID["outcomes"].values())


@pytest.mark.parametrize("name", ["bamba", "granitemoehybrid", "mamba2", "jetmoe", "falcon", "falcon_h1", "nemotron_h"])
def test_fused_forms_in_half_precision(name):
    """Norms that take a gate as well are left alone; an attention whose output is viewed gets a contiguous one."""
    model = build(name).to(torch.bfloat16)
    methods.find("lora")(r=2).apply(model, Place(fast="cpu"))
    assert not probe(model, Recipe(model="any")).notes


EXPERTS = {"num_local_experts": 4, "intermediate_size": 512}
REACH = "4 stacked expert tensors (3.0 MiB) are not linears: all-linear does not include them"


@pytest.mark.parametrize("patch", ["paca", "lora", "edora"])
def test_what_all_linear_does_not_reach_is_said(patch):
    model = tiny("MixtralForCausalLM", **EXPERTS)
    row = methods.find(patch)
    assert row(r=2).apply(model, Place(fast="cpu")).notes == (REACH,)
    assert row(r=2, targets="q_proj").apply(tiny("MixtralForCausalLM", **EXPERTS), Place(fast="cpu")).notes == ()
    assert row(r=2).apply(tiny("LlamaForCausalLM"), Place(fast="cpu")).notes == ()


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_experts_that_stay_dense_are_said_in_plan_and_train(tmp_path, precision):
    folder = byte_folder(tmp_path / "m", "MixtralForCausalLM", dtype="bfloat16", **EXPERTS)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "sky", "completion": "blue"}\n' * 4)
    recipe = Recipe(
        model={"name": folder, "precision": precision}, data={"train": str(tmp_path / "rows.jsonl")},
        patches=[{"paca": {"r": 2}}], training={"max_steps": 1, "max_length": 16}, output=str(tmp_path / "run"),
    )  # fmt: skip
    heard: list[str] = []
    load_model(recipe.model, say=heard.append)
    (said,) = heard
    assert said.startswith("the experts (1.5 MiB of 1.")
    assert said.endswith("MiB) stay in bf16: bitsandbytes quantises plain linears only")
    planned = plan(recipe).notes
    assert said in planned and REACH.replace("3.0", "1.5") in planned
    told: list[str] = []
    train(recipe, say=told.append)
    assert any(said in line for line in told) and any(REACH.replace("3.0", "1.5") in line for line in told)


def test_a_peft_export_that_peft_would_put_elsewhere_is_refused(tmp_path):
    """peft takes the gate_proj of a dense FFN or a shared expert for stacked experts in some models."""
    for patch in ("paca", "lora"):
        surgery = methods.find(patch)(r=2).apply(model := build("deepseek_v3"), Place(fast="cpu"))
        portable = surgery.portable()
        with pytest.raises(BadInput, match="peft"):
            require_loadable(model, portable.config, portable.tensors)
        surgery.revert()
        portable = methods.find(patch)(r=2, targets="q_b_proj,o_proj").apply(model, Place(fast="cpu")).portable()
        require_loadable(model, portable.config, portable.tensors)


@pytest.mark.parametrize("patch", ["paca", "lora"])
@pytest.mark.parametrize("name", ["gpt2", "mamba", "falcon"])
def test_merged_and_in_stock_peft_the_same(name, patch):
    """Weights that lie transposed (GPT-2), that the model reads itself (Mamba), of a subclass (Falcon)."""
    model = build(name)
    ids = batch_of(model)["input_ids"]
    surgery = methods.find(patch)(r=2).apply(model, Place(fast="cpu"))
    fill(patch, surgery)
    with torch.no_grad():
        ours = model(input_ids=ids, use_cache=False).logits
        if name != "mamba":  # peft refuses it
            portable = surgery.portable()
            stock = get_peft_model(build(name), portable.config).eval()
            state = {k.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"): t
                     for k, t in portable.tensors.items()}  # fmt: skip
            assert not stock.load_state_dict(state, strict=False).unexpected_keys
            assert close(stock(input_ids=ids, use_cache=False).logits, ours)
        surgery.merge()
        assert close(model(input_ids=ids, use_cache=False).logits, ours)
        assert not close(build(name)(input_ids=ids, use_cache=False).logits, ours)


@pytest.mark.parametrize("linears", ["paca", "lora", "edora"])
@pytest.mark.parametrize("beside", ["parallel_adapter", "meft"])
@pytest.mark.parametrize("first", [True, False])
def test_a_pair_of_linears_is_found_also_where_another_patch_replaces_them(linears, beside, first):
    """fc1 and fc2 of OPT: both patches act, in either order, and leave no tensor behind."""
    model = build("opt")
    ids = batch_of(model)["input_ids"]
    names = [linears, beside] if first else [beside, linears]
    surgeries = {name: methods.find(name)(**FIELDS[name]).apply(model, Place(fast="cpu")) for name in names}
    for name, surgery in surgeries.items():
        fill(name, surgery)
    seen = []
    with torch.no_grad():
        seen.append(model(input_ids=ids, use_cache=False).logits)
        for name in names:
            surgeries[name].revert()
            seen.append(model(input_ids=ids, use_cache=False).logits)
    alone = methods.find(names[1])(**FIELDS[names[1]]).apply(other := build("opt"), Place(fast="cpu"))
    fill(names[1], alone)
    with torch.no_grad():
        assert close(seen[1], other(input_ids=ids, use_cache=False).logits)
        assert close(seen[2], build("opt")(input_ids=ids, use_cache=False).logits)
    assert not close(seen[0], seen[1]) and not close(seen[1], seen[2])


@pytest.mark.parametrize("patch", ["parallel_adapter", "meft"])
@pytest.mark.parametrize("name", ["opt", "bert", "ctrl", "llama"])
def test_ffn_adapters_under_activation_checkpointing(name, patch):
    """Each way that an FFN is found: what is computed again has the adapter in it, too."""
    model = build(name)
    batch, found = batch_of(model), []
    surgery = methods.find(patch)(**FIELDS[patch]).apply(model, Place(fast="cpu"))
    fill(patch, surgery)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    for again in (False, True):
        if again and name != "ctrl":  # it has no checkpointing
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        found.append(of_run(patch, model, surgery, Recipe(model="any"), batch))
        for parameter in model.parameters():
            parameter.grad = None
        for store in surgery.stores:
            store.forget()
    (loss, first), (again_loss, second) = found
    assert again_loss == pytest.approx(loss, rel=1e-6)
    assert all(close(second[key], grad) for key, grad in first.items())


def write() -> None:
    transformers.logging.set_verbosity_error()
    said = {"transformers": transformers.__version__, "outcomes": {name: outcome(name) for name in NAMES}}
    TABLE.write_text(json.dumps({**said, "classes": classes(), "left_out": LEFT_OUT}, indent=1) + "\n")


if __name__ == "__main__":
    write()
