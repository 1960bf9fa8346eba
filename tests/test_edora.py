"""EDoRA against the paper's equations under plain autograd, its norm without W', what it saves, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from architectures import build
from conftest import MODELS, logits, quantise, tiny_batch
from trimtab.artifacts.adapter import Base, load_adapter, save_adapter
from trimtab.contracts import Place
from trimtab.errors import BadInput
from trimtab.methods.edora import DecomposedLinear, EDoRA, truncated_svd
from trimtab.methods.pruning import Pruning
from trimtab.model import quant
from trimtab.model.load import base_hash
from world import same, snapshot, train, values

PLACE = Place(fast="cpu")
IN, OUT = 20, 14
Reference = dict[str, torch.Tensor]


def steep(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear whose singular values fall by half, so that a truncated SVD has only one answer."""
    linear = nn.Linear(IN, OUT, dtype=torch.float64)
    u_OO, _, v_OI = torch.linalg.svd(torch.randn(OUT, IN, dtype=torch.float64), full_matrices=False)
    linear.weight.data = (u_OO * 4 * 0.5 ** torch.arange(OUT)) @ v_OI
    return linear.to(dtype).requires_grad_(False)


def layer(linear: nn.Module, r: int = 3, alpha: float = 6.0, detach: bool = True, moved: bool = True):
    made = DecomposedLinear(linear, EDoRA(r=r, alpha=alpha, detach_norm=detach), "x")
    if moved:
        with torch.no_grad():
            made.core.normal_(0, 0.2)
            made.magnitude.mul_(1 + 0.2 * torch.randn(made.out_features))
    return made


def paper(made: DecomposedLinear, weight: torch.Tensor, x: torch.Tensor, detach: bool) -> Reference:
    """y and the gradients of sum(sin(y)), by the paper's equations on whole matrices, in fp64."""
    weight, r = weight.double(), made.patch.r
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    turn = u[:, :r].gather(0, u[:, :r].abs().argmax(0, keepdim=True)).sign()
    b, a = u[:, :r] * turn, (s[:r, None] * vh[:r]) * turn.t()
    core = made.core.detach().double().requires_grad_()
    m = made.magnitude.detach().double().requires_grad_()
    x = x.detach().double().requires_grad_()
    turned = weight + made.patch.alpha / r * b @ core @ a
    n = turned.norm(dim=1)
    whole = (m / (n.detach() if detach else n))[:, None] * turned
    y = F.linear(x, whole, None if made.bias is None else made.bias.double())
    y.sin().sum().backward()
    return {"y": y.detach(), "x": x.grad, "core": core.grad, "magnitude": m.grad, "whole": whole.detach()}


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 5, IN), (2, 3, 5, IN)])
def test_outputs_and_gradients_are_the_papers(shape, bias, detach):
    linear = steep()
    linear.bias = linear.bias if bias else None
    made, x = layer(linear, detach=detach), torch.randn(shape, requires_grad=True)
    wanted = paper(made, linear.weight, x, detach)
    y = made(x)
    y.sin().sum().backward()
    for key, got in {"y": y, "x": x.grad, "core": made.core.grad, "magnitude": made.magnitude.grad,
                     "whole": made.weight}.items():  # fmt: skip
        assert torch.allclose(got.double(), wanted[key], rtol=1e-4, atol=1e-5), key


def test_the_two_gradients_of_the_core_differ():
    found = []
    for detach in (True, False):
        torch.manual_seed(0)
        made = layer(steep(), detach=detach)
        made(torch.randn(5, IN)).sin().sum().backward()
        found.append(made.core.grad)
    assert (found[0] - found[1]).norm() > 1e-2 * found[0].norm()


def test_an_output_that_is_not_contiguous_in_its_gradient():
    made, x = layer(steep()), torch.randn(4, 5, IN)
    made(x).transpose(0, 1).cos().sum().backward()
    first = made.core.grad.clone()
    made.core.grad = None
    made(x.transpose(0, 1)).cos().sum().backward()
    assert torch.allclose(made.core.grad, first, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_it_is_the_base_bit_for_bit(bias, dtype):
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    made, x = layer(linear, moved=False), torch.randn(3, IN, dtype=dtype)
    assert torch.equal(made.weight, linear.weight) and torch.equal(made(x), linear(x))
    made(x).float().square().sum().backward()
    assert made.core.grad.abs().min() > 0 and made.core.grad.dtype == made.magnitude.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_the_whole_weight(dtype):
    """Also for a flat spectrum, of which a few sweeps find no exact singular vectors, and for rounded factors."""
    linear = nn.Linear(64, 48, dtype=dtype).requires_grad_(False)
    made = layer(linear, r=5)
    whole = linear.weight.double() + made.scale * made.b_OR.double() @ made.core.double() @ made.a_RI.double()
    assert torch.allclose(made.norm()[0].double(), whole.norm(dim=1), rtol=2e-6)
    assert made.norm()[0].dtype == torch.float32 and made.a_RI.dtype == dtype


class Largest(TorchDispatchMode):
    """The number of elements of the largest result."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, torch.Tensor) else ():
            self.numel = max(self.numel, tensor.numel())
        return result


def test_no_matrix_of_the_weights_size_is_made():
    linear = nn.Linear(300, 200).requires_grad_(False)
    made, x = layer(linear, r=4), torch.randn(2, 300, requires_grad=True)
    with Largest() as norm:
        made.norm()
    assert norm.numel == 200 * 4
    for patch in (EDoRA(r=4), EDoRA(r=4, detach_norm=False)):
        made.patch = patch
        assert largest_bytes(lambda: made(x).sum().backward()) < 200 * 300 * 4 / 2


def largest_bytes(work) -> int:
    """The bytes of the largest storage that `work` allocates."""
    with torch.profiler.profile(profile_memory=True) as found:
        work()
    return max(event.self_cpu_memory_usage for event in found.events())


def test_only_the_low_products_and_the_output_are_saved():
    made, x = layer(steep()), torch.randn(2, 5, IN, requires_grad=True)
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = made(x)
    assert sorted(t.numel() for t in kept.values()) == sorted([10 * 3, 10 * OUT, OUT])
    assert y.data_ptr() in kept and x.data_ptr() not in kept
    made.magnitude.requires_grad_(False)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = made(x)
    assert y.data_ptr() not in kept


def test_no_pass_uses_a_norm_of_earlier_values():
    """Also after an optimizer that writes behind autograd's back, and without a backward pass in between."""
    made, x = layer(steep()), torch.randn(3, IN)

    def right(gradients: bool) -> bool:
        with torch.set_grad_enabled(gradients):
            y = made(x)
        return torch.allclose(y.double(), paper(made, made.base.weight, x, True)["y"], atol=1e-4)

    for _ in range(2):
        assert right(False) and right(False)
        made.core.data.add_(0.1)
        assert right(False) and right(True)
        made.magnitude.data.mul_(2)
        assert right(False) and right(True)


def test_autocast():
    made, x = layer(steep()), torch.randn(2, 5, IN)
    wanted = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), wanted, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert made.core.grad.dtype == torch.float32


def test_a_row_of_zeros_stays_and_gives_no_nan():
    linear = steep()
    linear.weight[3] = 0
    made, x = layer(linear), torch.randn(5, IN, requires_grad=True)
    y = made(x)
    assert torch.allclose(y[:, 3], linear.bias[3].expand(5))
    y.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (made.core, made.magnitude, x)) and made.magnitude.grad[3] == 0


# --- the factors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(14, 20), (20, 14), (6, 40)])
def test_the_truncated_svd(shape):
    torch.manual_seed(3)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    wanted = 0.5 ** torch.arange(min(shape), dtype=torch.float64)
    weight = (u * wanted) @ v
    state = torch.get_rng_state()
    u_OR, s_R, v_RI = truncated_svd(weight, 5, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(s_R, wanted[:5], rtol=1e-6)
    best = (u[:, :5] * wanted[:5]) @ v[:5]
    assert torch.allclose((u_OR * s_R) @ v_RI, best, atol=1e-6)
    assert (u_OR.gather(0, u_OR.abs().argmax(0, keepdim=True)) > 0).all()
    for other in (truncated_svd(weight, 5, seed=1), truncated_svd(weight + 1e-12, 5, seed=0)):
        assert torch.allclose(other[0], u_OR, atol=1e-6) and torch.allclose(other[2], v_RI, atol=1e-6)


def test_a_rank_as_wide_as_the_layer():
    made = layer(steep(), r=OUT)
    x = torch.randn(5, IN)
    assert torch.allclose(made(x).double(), paper(made, made.base.weight, x, True)["y"], atol=1e-4)


def test_a_plan_needs_only_shapes():
    with torch.device("meta"):
        made = DecomposedLinear(nn.Linear(IN, OUT), EDoRA(r=3), "x")
    assert {key: tuple(t.shape) for key, t in made.named_buffers()} == {
        "check": (3,), "a_RI": (3, IN), "b_OR": (OUT, 3), "g_OR": (OUT, 3), "k_RR": (3, 3), "c_O": (OUT,),
    }  # fmt: skip
    assert made.core.is_meta and made.magnitude.is_meta


# --- quantised bases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_its_dense_twin(kind):
    model = quantise(MODELS["llama"](), kind)
    name = "model.layers.0.mlp.up_proj"
    twin = nn.Linear(64, 128, bias=False)
    twin.weight.data = quant.dense_weight(model.get_submodule(name), torch.float32).clone()
    twin.requires_grad_(False)
    surgery = EDoRA(r=4).apply(model, PLACE)
    train(model, surgery, 3)
    made, dense = surgery.layers[name], layer(twin, r=4, alpha=16.0, moved=False)
    assert torch.allclose(dense.a_RI, made.a_RI.float(), atol=2e-2)
    for key in ("a_RI", "b_OR", "g_OR", "k_RR"):
        getattr(dense, key).copy_(getattr(made, key))
    dense.load_state_dict({key: getattr(made, key).detach() for key in ("core", "magnitude", "check")}, strict=False)
    found = []
    x = torch.randn(3, 64)
    for one in (made, dense):
        one.core.grad = one.magnitude.grad = None
        y = one(given := x.clone().requires_grad_())
        y.sin().sum().backward()
        found.append((y, given.grad, one.core.grad, one.magnitude.grad))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))
    merged = made.merge_into_base()
    assert type(merged) is nn.Linear
    assert torch.allclose(
        F.linear(x, merged.weight.float()), found[1][0], atol=0.02 * float(found[1][0].detach().abs().max())
    )


# --- the adapter ------------------------------------------------------------------------------------------------------


def test_the_adapter_holds_cores_magnitudes_and_check_numbers(tmp_path):
    model = MODELS["llama"]()
    surgery = EDoRA(r=4).apply(model, PLACE)
    train(model, surgery, 2)
    hash_ = base_hash(MODELS["llama"]())
    folder = save_adapter(tmp_path / "adapter", [surgery], Base("tiny", hash_))
    held = load_file(folder / "adapter_model.safetensors")
    sizes = sum(4 * 4 + layer.out_features + 4 for layer in surgery.layers.values())
    assert {key.rpartition(".")[2] for key in held} == {"core", "magnitude", "check"}
    assert sum(t.numel() for t in held.values()) == sizes
    fresh = MODELS["llama"]()
    load_adapter(fresh, folder, PLACE, hash_)
    assert torch.equal(logits(fresh, tiny_batch(model)), logits(model, tiny_batch(model)))


def altered(kind: str) -> nn.Module:
    """Bases that differ where the hash, a sample, may not see it, or that are stored in another precision."""
    model = MODELS["llama"]()
    if kind == "nf4":
        return quantise(model)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.neg_() if kind == "turned" else weight.add_(0.3 * weight.std() * torch.randn(weight.shape))
    return model


@pytest.mark.parametrize("kind", ["nf4", "turned", "noisy"])
def test_a_base_with_other_factors_is_refused(kind, tmp_path):
    model = MODELS["llama"]()
    surgery = EDoRA(r=4).apply(model, PLACE)
    train(model, surgery, 2)
    folder = save_adapter(tmp_path / "adapter", [surgery], Base("tiny", "the hash"))
    other = altered(kind)
    before, weights = snapshot(other), values(other)
    with pytest.raises(BadInput, match="singular vectors.*others.*Load the base"):
        load_adapter(other, folder, PLACE, "the hash")
    assert snapshot(other) == before and same(values(other), weights)
    with pytest.raises(BadInput, match="this model is another one"):
        load_adapter(other, folder, PLACE, "another hash")


def test_another_seed_or_rank_is_refused():
    surgery = EDoRA(r=4).apply(MODELS["llama"](), PLACE)
    own = {key: t.detach().clone() for key, t in surgery.own_tensors().items()}
    with pytest.raises(BadInput):
        EDoRA(r=5).apply(MODELS["llama"](), PLACE).load_tensors(own)
    with pytest.raises(BadInput, match="only in one of the two"):
        EDoRA(r=4, targets="q_proj").apply(MODELS["llama"](), PLACE).load_tensors(own)


# --- exports ----------------------------------------------------------------------------------------------------------

PEFT_ONLY = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
batch = load_file(folder + "/batch.safetensors")
outputs = {}
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(folder + "/base").eval()
    outputs["peft"] = PeftModel.from_pretrained(model, folder + "/peft").eval()(**batch).logits
    outputs["merged"] = AutoModelForCausalLM.from_pretrained(folder + "/merged").eval()(**batch).logits
assert not [name for name in sys.modules if name.startswith("trimtab")]
save_file(outputs, folder + "/outputs.safetensors")
"""


def test_stock_peft_and_transformers_give_the_same_logits(tmp_path):
    """In a process that never imports trimtab; with alpha other than r, which peft would scale by."""
    model = MODELS["qwen2"]()
    model.save_pretrained(tmp_path / "base")
    surgery = EDoRA(r=4, alpha=10.0).apply(model, PLACE)
    train(model, surgery, 4)
    batch = {"input_ids": tiny_batch(model)["input_ids"]}
    with torch.no_grad():
        ours = model(**batch).logits
    portable = surgery.portable()
    assert portable.config.use_dora and portable.config.lora_alpha == portable.config.r == 4
    portable.config.save_pretrained(tmp_path / "peft")
    save_file({k: t.contiguous() for k, t in portable.tensors.items()}, tmp_path / "peft/adapter_model.safetensors")
    surgery.merge()
    model.save_pretrained(tmp_path / "merged")
    save_file(batch, tmp_path / "batch.safetensors")
    subprocess.run([sys.executable, "-c", PEFT_ONLY, str(tmp_path)], check=True)
    theirs = load_file(tmp_path / "outputs.safetensors")
    plain = MODELS["qwen2"]()
    with torch.no_grad():
        assert (plain(**batch).logits - ours).abs().max() > 0.1
    for form in ("peft", "merged"):
        assert torch.allclose(theirs[form], ours, atol=1e-4), form


def in_stock_peft(surgery, base: nn.Module) -> nn.Module:
    """`base` with the exported adapter, by peft."""
    from peft import get_peft_model
    from peft.utils import set_peft_model_state_dict

    portable = surgery.portable()
    stock = get_peft_model(base, portable.config)
    set_peft_model_state_dict(stock, portable.tensors)
    return stock.eval()


def test_stock_peft_on_a_4_bit_base():
    model = quantise(MODELS["llama"]())
    base, batch = logits(model, tiny_batch(model)), tiny_batch(model)
    surgery = EDoRA(r=4).apply(model, PLACE)
    train(model, surgery, 3)
    ours, theirs = logits(model, batch), logits(in_stock_peft(surgery, quantise(MODELS["llama"]())), batch)
    assert (ours - base).abs().max() > 0.1 and torch.allclose(theirs, ours, atol=1e-4)


def test_on_a_pruned_base_the_factors_are_those_of_the_pruned_weights(tmp_path):
    model = MODELS["llama"]()
    hash_ = base_hash(model)
    pruned = Pruning(sparsity=0.5).apply(model, PLACE)
    surgery = EDoRA(r=4).apply(model, PLACE)
    train(model, surgery, 2)
    folder = save_adapter(tmp_path / "adapter", [pruned, surgery], Base("tiny", hash_))
    fresh = MODELS["llama"]()
    load_adapter(fresh, folder, PLACE, hash_)
    assert torch.equal(logits(fresh, tiny_batch(model)), logits(model, tiny_batch(model)))
    own = {key: t.detach().clone() for key, t in surgery.own_tensors().items()}
    with pytest.raises(BadInput, match="the same pruning"):
        EDoRA(r=4).apply(MODELS["llama"](), PLACE).load_tensors(own)


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_transposed_weights_and_weights_that_a_model_reads_itself(name):
    model = build(name)
    ids = tiny_batch(model)["input_ids"] % 32
    surgery = EDoRA(r=2).apply(model, PLACE)
    with torch.no_grad():
        base = build(name)(input_ids=ids, use_cache=False).logits
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, base, atol=1e-5)
        for made in surgery.layers.values():
            made.core.normal_(0, 0.05)
            made.magnitude.mul_(1.1)
        ours = model(input_ids=ids, use_cache=False).logits
        if name == "gpt2":  # peft refuses Mamba
            stock = in_stock_peft(surgery, build(name))
            assert torch.allclose(stock(input_ids=ids, use_cache=False).logits, ours, atol=1e-4)
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert all(made.core.grad.any() and made.magnitude.grad.any() for made in surgery.layers.values())
    surgery.merge()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, ours, atol=1e-4)
    assert not torch.allclose(base, ours, atol=1e-2)


# --- bad input --------------------------------------------------------------------------------------------------------


def spoilt(what: str) -> nn.Module:
    model = MODELS["llama"]()
    weight = model.model.layers[1].mlp.down_proj.weight.data
    if what == "nan":
        weight[0, 0] = torch.nan
    elif what == "thin":
        weight.copy_(weight[:, :2] @ weight[:2])
    elif what == "zero":
        weight.zero_()
    return model


@pytest.mark.parametrize(
    "fields,what,words",
    [
        ({"r": 0}, "", "r: 0: a rank is at least 1. Set r to 16"),
        ({"r": 33}, "", r"r: 33: \S+k_proj is 32 x 64, so its rank is at most 32. Set r to 32 or less"),
        ({"alpha": 0.0}, "", "alpha: 0.0: alpha / r scales"),
        ({"alpha": float("nan")}, "", "alpha: nan: alpha / r scales"),
        ({"targets": "nose"}, "", "no linear of LlamaForCausalLM has such a name"),
        ({}, "nan", r"1\.mlp\.down_proj: its weight has NaN or infinity. Use an intact model"),
        ({}, "thin", r"r: 4: only 2 singular values of \S+1\.mlp\.down_proj are above zero. Set a smaller r"),
        ({}, "zero", r"r: 4: only 0 singular values of \S+1\.mlp\.down_proj are above zero. Set a smaller r"),
    ],
    ids=str,
)
def test_what_is_refused_leaves_the_model_as_it_was(fields, what, words):
    model = spoilt(what)
    before = snapshot(model)
    with pytest.raises(BadInput, match=words):
        EDoRA(**{"r": 4, **fields}).apply(model, PLACE)
    assert snapshot(model) == before
