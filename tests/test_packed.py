"""4-bit weights in the form for decoding: the same numbers, and the ordinary form back, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import world
from conftest import MODELS, logits, quantise, tiny_batch
from trimtab.contracts import When
from trimtab.engine.patching import apply_patches
from trimtab.model import packed, quant
from trimtab.model.sampling import complete

kernel = pytest.mark.skipif(not packed.available(), reason="this CPU has no AVX512-BF16")
PATCHES = ["paca", "lora", "edora", "parallel_adapter", "meft", "senszoq"]


def tiny(family: str = "llama", seed: int = 0) -> nn.Module:
    return quantise(MODELS[family](seed).bfloat16(), dtype=torch.bfloat16)


def linear(rows: int, columns: int, bias: bool = False, **fields) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(columns, rows, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4", **fields)
    plain = nn.Linear(columns, rows, bias).state_dict()
    made.load_state_dict({key: tensor.normal_().bfloat16() for key, tensor in plain.items()})
    made.to("cpu").support_avx512bf16_for_cpu = False
    return made.eval().requires_grad_(False)


def exact(made: nn.Module) -> torch.Tensor:
    """Code by code, scale by scale: what the 4 bits mean, in fp64."""
    from bitsandbytes.functional import dequantize_blockwise

    state = made.weight.quant_state
    scales = (dequantize_blockwise(state.absmax, state.state2) + state.offset).double()
    codes = made.weight.data.view(-1)
    values = state.code.double()[torch.stack([codes >> 4, codes & 15], 1).view(-1).long()]
    return (values.view(-1, state.blocksize) * scales[:, None]).view(state.shape)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@kernel
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(32, 64), (96, 192), (192, 576), (576, 1536)], ids=str)
def test_the_kernel_is_about_as_exact_as_the_ordinary_form(shape, bias):
    made = linear(*shape, bias)
    weight_NK, worse = exact(made), 2 if bias else 1.3  # the kernel rounds before the bias is added
    for rows in (1, 5, 16, 33, packed.MOST, packed.MOST + 1):
        x = torch.randn(rows, shape[1], dtype=torch.bfloat16)
        wanted = x.double() @ weight_NK.t() + (made.bias.double() if bias else 0)
        ordinary = made(x)
        packed.pack(made)
        found = made(x)
        assert packed.is_packed(made) and found.dtype is torch.bfloat16
        if rows <= packed.MOST:
            assert torch.equal(found, made(x.t().contiguous().t())), "strides do not matter"
        assert torch.equal(found, ordinary) == (rows > packed.MOST), "many rows are dequantised"
        packed.unpack(made)
        assert off(found, wanted) < worse * off(ordinary, wanted)


@kernel
def test_shapes_of_inputs_and_scales_that_are_not_quantised():
    made = linear(64, 128, compress_statistics=False)
    assert not made.weight.quant_state.nested
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16)
    wanted = made(x)
    packed.pack(made)
    assert (
        off(made(x), wanted) < 0.005 and off(made(x.float()), wanted) < 0.005 and made(x.float()).dtype is torch.float
    )
    assert made(x[:0]).shape == (0, 3, 64) and torch.equal(made(x[0, 0]), made(x)[0, 0])


@kernel
def test_the_order_is_that_of_the_library():
    """Its own packing, which is ten times as slow and cannot be undone."""
    from bitsandbytes import functional

    made = linear(64, 192)
    codes, state = made.weight.data, made.weight.quant_state
    theirs, its_state = functional._convert_weight_packed_for_cpu(codes, copy.copy(state))
    packed.pack(made)
    assert torch.equal(made._parameters["weight"].data.view(theirs.shape), theirs)
    assert torch.equal(packed.scales(made), its_state.absmax)


@kernel
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_is_as_before_bit_for_bit(family):
    model = tiny(family)
    before, shown, inside = world.values(model), world.snapshot(model), len(packed.packable(model))
    with packed.hold(model):
        assert sum(map(packed.is_packed, model.modules())) == inside > 0
        assert str(model) == shown["text"] and not packed.packable(model)
        with packed.hold(model):
            pass
        assert not packed.any_packed(model), "an inner one undoes all"
    assert world.same(world.values(model), before) and world.snapshot(model) == shown


@kernel
def test_whoever_reads_a_packed_weight_sees_the_ordinary_one():
    model = tiny()
    before, dense = world.values(model), {}
    linears = packed.packable(model)
    dense = [quant.dense_weight(made) for made in linears]
    with packed.hold(model):
        assert all(quant.stored_as(made) == "nf4" for made in linears)
        assert all(torch.equal(quant.dense_weight(made), wanted) for made, wanted in zip(linears, dense, strict=True))
        assert all(map(packed.is_packed, linears)), "these two leave it packed"
        twin = copy.deepcopy(model)
        assert linears[0].weight.shape[1] == 1 and not packed.is_packed(linears[0])
        assert world.same(world.values(model), before) and not packed.any_packed(model)
        assert packed.any_packed(twin) and world.same(twin.state_dict(), before)
        linears[1].weight = linears[0].weight
    assert linears[1].weight is linears[0].weight


@kernel
@pytest.mark.parametrize("name", PATCHES)
def test_a_patched_model_decodes_on_it(name):
    model, place = tiny(), world.EVERY[name][2]
    (surgery,) = apply_patches(model, [world.make(name)], place, When.TRAIN)
    world.train(model, surgery, 3, 0.1)
    model.eval()
    batch, before, linears = tiny_batch(model), world.values(model), packed.packable(model)
    plain = logits(model, batch)
    assert off(plain, logits(tiny(), batch)) > 0.02, "the patch does something"
    with packed.hold(model):
        found = logits(model, batch)
        assert len(linears) == 14 and all(map(packed.is_packed, linears))
        one = logits(model, {key: tensor[:1] for key, tensor in batch.items()})
    assert 0 < off(found, plain) < 0.02 and off(one, plain[:10]) < 0.02
    assert torch.equal(logits(model, batch), plain) and world.same(world.values(model), before)


@kernel
def test_dora_reads_the_weight_and_stays_right():
    model = tiny()
    (surgery,) = apply_patches(model, [world.make("lora", dora=True)], world.PLACE, When.TRAIN)
    world.train(model, surgery, 2)
    batch, plain = tiny_batch(model), None
    plain = logits(model.eval(), batch)
    with packed.hold(model):
        assert off(logits(model, batch), plain) < 0.02
        assert torch.equal(logits(model, batch), plain), "each linear was read, and is in the ordinary form again"


@kernel
def test_training_after_and_within_it():
    def trained(held: bool) -> dict[str, torch.Tensor]:
        model = tiny()
        (surgery,) = apply_patches(model, [world.make("lora")], world.PLACE, When.TRAIN)
        world.train(model, surgery, 1)
        if held:
            with packed.hold(model.eval()):
                complete(model, Pads(), torch.randint(3, 99, (2, 5)), torch.ones(2, 5).long(), max_new_tokens=3)
        world.train(model, surgery, 2)
        return surgery.own_tensors()

    assert world.same(trained(True), trained(False))
    model = tiny()
    ids = model.get_input_embeddings()(torch.randint(3, 99, (2, 5))).detach()
    wanted, found = ids.clone().requires_grad_(), ids.clone().requires_grad_()
    model(inputs_embeds=wanted).logits.sum().backward()
    with packed.hold(model):
        model(inputs_embeds=found).logits.sum().backward()
        assert torch.equal(found.grad, wanted.grad), "a pass with gradients is in the ordinary form"


class Pads:
    pad_token_id = 0


@kernel
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=str)
def test_replies_of_padded_batches(settings):
    model = tiny()
    ids, mask = torch.randint(3, 99, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    ids[0, :4] = mask[0, :4] = 0
    with packed.hold(model):
        new = complete(model, Pads(), ids, mask, max_new_tokens=6, min_new_tokens=6, **settings)
        assert new.shape == (3, 6) and packed.any_packed(model)
        alone = complete(model, Pads(), ids[:1, 4:], mask[:1, 4:], max_new_tokens=6, min_new_tokens=6, **settings)
    if not settings:
        assert torch.equal(new[:1], alone)


@kernel
@pytest.mark.parametrize("at", range(5))
def test_an_interrupt_anywhere_leaves_the_ordinary_form(at, monkeypatch):
    model = tiny()
    before, shown = world.values(model), world.snapshot(model)
    steps = ["_for_kernel", "to_packed", "_decoding", "ordinary_codes", "product"]
    real, calls = getattr(packed, steps[at]), [0]

    def interrupted(*args):
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(packed, steps[at], interrupted)
    with pytest.raises(KeyboardInterrupt), packed.hold(model):
        complete(model, Pads(), torch.randint(3, 99, (1, 4)), torch.ones(1, 4).long(), max_new_tokens=3)
    monkeypatch.undo()
    if steps[at] == "ordinary_codes":  # interrupted while it was undone: what is left is undone when it is read
        assert packed.any_packed(model)
    assert world.same(world.values(model), before) and world.snapshot(model) == shown


@kernel
def test_a_half_written_weight_is_known():
    made, x = linear(64, 128), torch.randn(3, 128, dtype=torch.bfloat16)
    before, wanted = made.weight.data.clone(), made(x)
    packed.pack(made)
    vars(made)[packed.STATE].ordinary = before.clone()  # as while it is written
    made._parameters["weight"].data[:99] = 0
    assert torch.equal(made(x), wanted) and torch.equal(quant.product(made, x), wanted)
    packed.unpack(made)
    assert torch.equal(made.weight.data, before) and torch.equal(made(x), wanted)


def test_what_the_kernel_cannot_multiply_is_left(monkeypatch):
    odd = nn.ModuleList([linear(48, 64), linear(64, 96), linear(64, 128), nn.Linear(64, 64)])
    odd.append(quantise(MODELS["llama"]()).model.layers[0].mlp.up_proj)  # computes in fp32
    tied = linear(32, 64)
    tied_too = linear(32, 64)
    tied_too.weight = tied.weight
    odd.extend([tied, tied_too])
    assert packed.packable(odd) == [odd[2]]
    monkeypatch.setattr(packed, "available", lambda: False)
    with packed.hold(odd):
        assert not packed.any_packed(odd)


@kernel
def test_another_order_of_the_kernel_is_noticed(monkeypatch):
    real = packed.to_packed
    monkeypatch.setattr(packed, "to_packed", lambda codes, shape: real(codes, shape).flip(0).contiguous())
    assert not packed.available.__wrapped__()
