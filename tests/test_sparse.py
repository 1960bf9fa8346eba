"""Sparse changes of a model: the container, the linear and its gradients, scores and the exact best entries."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from byte_model import tiny
from conftest import MODELS as FAMILIES
from conftest import logits, quantise, tiny_batch
from trimtab.errors import BadInput
from trimtab.methods.senszoq import SensZOQ
from trimtab.model import anatomy, block_gradients, scores, sparse_linear
from trimtab.model.scores import best_entries
from trimtab.model.sparse_delta import Part, Pattern, SparseDelta, Tasks
from trimtab.model.sparse_linear import SparseLinear, sampled_product
from world import PLACE, same, snapshot, train, values

HASH = "abc"
MODELS = {**FAMILIES, "gpt2": lambda: tiny("GPT2LMHeadModel")}


def random_part(shape: tuple[int, int], entries: int, seed: int = 0) -> Part:
    rng = torch.Generator().manual_seed(seed)
    flat = torch.randperm(shape[0] * shape[1], generator=rng)[:entries].sort().values
    return Part(Pattern.of(flat, shape), torch.randn(entries, generator=rng))


def dense(part: Part) -> torch.Tensor:
    made = torch.zeros(part.pattern.shape)
    made.view(-1)[part.pattern.flat] = part.values
    return made


def delta_of(model: nn.Module, seed: int = 0, share: float = 0.05) -> SparseDelta:
    parts = {}
    for name, linear in anatomy.target_linears(model, "all-linear").items():
        shape = tuple(anatomy.dense_view(linear).shape)
        parts[name] = random_part(shape, round(share * shape[0] * shape[1]), seed)
    return SparseDelta(HASH, parts)


# --- the container ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape,entries", [((7, 11), 0), ((7, 11), 1), ((7, 11), 77), ((3, 70000), 500)])
def test_a_pattern_is_saved_and_read(shape, entries):
    part = random_part(shape, entries)
    delta = SparseDelta(HASH, {"a.b": part})
    tensors = delta.tensors()
    assert tensors["a.b.columns"].dtype == (torch.uint16 if shape[1] < 2**16 else torch.int32)
    again = SparseDelta.from_tensors(HASH, tensors, {"a.b": shape}).parts["a.b"]
    assert torch.equal(again.pattern.flat, part.pattern.flat) and torch.equal(again.values, part.values)
    assert torch.equal(part.pattern.rows * shape[1] + part.pattern.columns, part.pattern.flat)


@pytest.mark.parametrize(
    "columns,counts",
    [([3, 1], [2, 0]), ([0, 9], [1, 1]), ([0, 1], [1, 2]), ([1, 1], [2, 0]), ([0, 1], [2]), ([0, -1], [1, 1])],
)
def test_a_damaged_pattern_is_refused(columns, counts):
    with pytest.raises(BadInput, match="not those of a 2 x 9"):
        Pattern.decoded(torch.tensor(columns), torch.tensor(counts), (2, 9), "x")


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_added_to_weights_and_removed_bit_for_bit(family, dtype):
    model = MODELS[family]().to(dtype)
    before, delta = values(model), delta_of(model)
    added = delta.add_to(model, HASH)
    for name, part in delta.parts.items():
        weight = anatomy.dense_view(model.get_submodule(name))
        start = before[f"{name}.weight"]
        start = start.t() if isinstance(model.get_submodule(name), anatomy.Conv1D) else start
        assert torch.equal(weight, torch.where(dense(part) != 0, start + dense(part).to(dtype), start))
    added.undo()
    assert same(model.state_dict(), before)


def test_tasks_are_switched_and_leave_the_base():
    model = MODELS["llama"]()
    before, batch = values(model), tiny_batch(model)
    tasks = Tasks(model, HASH, {str(seed): delta_of(model, seed) for seed in range(3)})
    first = {}
    for name in ("0", "1", "2", "1", "0", None, "2"):
        tasks.switch(name)
        assert torch.equal(first.setdefault(name, logits(model, batch)), logits(model, batch))
    assert len({str(output.flatten()[:4]) for output in first.values()}) == 4
    with pytest.raises(BadInput, match="Name one of these"):
        tasks.switch("none")
    tasks.switch(None)
    assert same(model.state_dict(), before)


def test_union_scale_and_negation():
    shape = (5, 8)
    one, two = (SparseDelta(HASH, {"a": random_part(shape, 9, seed)}) for seed in (0, 1))
    both = one.union(two.scaled(-2.0), SparseDelta(HASH, {"b": random_part(shape, 3)}))
    assert torch.allclose(dense(both.parts["a"]), dense(one.parts["a"]) - 2 * dense(two.parts["a"]))
    assert both.parts.keys() == {"a", "b"} and (both.parts["a"].pattern.flat.diff() > 0).all()
    with pytest.raises(BadInput, match="different bases"):
        one.union(SparseDelta("other", {}))


def test_what_it_cannot_be_added_to_is_refused():
    model = MODELS["llama"]()
    delta, before = delta_of(model), values(model)
    with pytest.raises(BadInput, match="hash abc"):
        delta.add_to(model, "another")
    with pytest.raises(BadInput, match="no such linear"):
        SparseDelta(HASH, {"model.layers.9.x": random_part((4, 4), 2)}).add_to(model, HASH)
    with pytest.raises(BadInput, match="is \\(64, 64\\)"):
        name = "model.layers.0.self_attn.q_proj"
        SparseDelta(HASH, {name: random_part((4, 4), 2)}).add_to(model, HASH)
    with pytest.raises(BadInput, match="stored as nf4"):
        delta.add_to(quantise(MODELS["llama"](), "nf4"), HASH)
    assert same(model.state_dict(), before)


def test_shira_there_and_back(tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    model = MODELS["llama"]()
    delta, batch = delta_of(model), tiny_batch(model)
    config, tensors = delta.to_shira()
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    stock = PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()
    delta.add_to(model, HASH)
    assert torch.allclose(logits(stock, batch), logits(model, batch), atol=1e-5)
    shapes = {name: part.pattern.shape for name, part in delta.parts.items()}
    again = SparseDelta.from_shira(HASH, load_file(tmp_path / "adapter_model.safetensors"), shapes)
    for name, part in delta.parts.items():
        assert torch.equal(dense(again.parts[name]), dense(part))


# --- the linear ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.004, 0.3])
@pytest.mark.parametrize("tokens", [(3,), (2, 40)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_linear_is_that_of_the_dense_sum(share, tokens, bias):
    linear, part = nn.Linear(48, 32, bias=bias), random_part((32, 48), max(2, round(share * 32 * 48)))
    linear.requires_grad_(False)
    layer = SparseLinear(linear, 0)
    layer.set_pattern(part.pattern)
    layer.values.data.copy_(part.values)
    x = torch.randn(*tokens, 48, requires_grad=True)
    reference = (linear.weight + dense(part)).requires_grad_()
    wanted, dy = F.linear(x, reference, linear.bias), torch.randn(*tokens, 32)
    dx, dw = torch.autograd.grad(wanted, [x, reference], dy)
    got = layer(x)
    found = torch.autograd.grad(got, [x, layer.values], dy)
    assert torch.allclose(got, wanted, atol=1e-5) and torch.allclose(found[0], dx, atol=1e-5)
    assert torch.allclose(found[1], dw.view(-1)[part.pattern.flat], atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(layer(x), wanted, atol=1e-5)
        layer.variants = [layer.values, -layer.values]
        if tokens[0] == 2:
            both = torch.cat([wanted[:1], F.linear(x[1:], linear.weight - dense(part), linear.bias)])
            assert torch.allclose(layer(x), both, atol=1e-5)


def test_sampled_products_in_parts_are_those_at_once(monkeypatch):
    part = random_part((32, 48), 12)
    dy, x = torch.randn(20, 32), torch.randn(20, 48)
    whole = sampled_product(dy, x, part.pattern)
    monkeypatch.setattr(sparse_linear, "CHUNK", 50)
    assert torch.equal(sampled_product(dy, x, part.pattern), whole)
    assert torch.allclose(whole, (dy.t() @ x).view(-1)[part.pattern.flat], atol=1e-5)


# --- scores ----------------------------------------------------------------------------------------------------------


def reference_scores(model: nn.Module, linears, batches, score: str) -> dict[str, torch.Tensor]:
    """By autograd on whole rows, all weights at once."""
    sums = {name: torch.zeros_like(anatomy.dense_view(m)) for name, m in linears.items()}
    count = 0
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            for linear in linears.values():
                linear.weight.requires_grad_(True)
            loss = model(**{k: v[row : row + 1] for k, v in batch.items()}).loss
            grads = torch.autograd.grad(loss, [m.weight for m in linears.values()])
            for (name, linear), grad in zip(linears.items(), grads, strict=True):
                grad = grad.t() if isinstance(linear, anatomy.Conv1D) else grad
                sums[name] += grad.square() if score == "fisher" else grad
            count += 1
    if score == "fisher":
        return {name: total / count for name, total in sums.items()}
    return {n: (t / count).abs() * anatomy.dense_view(linears[n]).detach().abs() for n, t in sums.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "gpt2"])
@pytest.mark.parametrize("score", ["fisher", "gradient_weight"])
def test_scores_of_data_are_those_of_autograd(family, score, monkeypatch):
    model = MODELS[family]()
    linears, batches = anatomy.target_linears(model, "all-linear"), [tiny_batch(model, seed=s) for s in (1, 2)]
    seen = {}
    monkeypatch.setattr(scores._Best, "add", lambda self, number, flat: seen.setdefault(number, flat.clone()))
    before = snapshot(model)
    best_entries(model, linears, 0.1, score, "global", batches=batches)
    assert snapshot(model) == before
    wanted = reference_scores(model, linears, batches, score)
    for number, name in enumerate(linears):
        largest = float(wanted[name].max())
        assert torch.allclose(seen[number], wanted[name].flatten(), atol=1e-4 * largest, rtol=1e-4), name


@pytest.mark.parametrize("scope", ["global", "linear"])
def test_the_best_entries_are_exactly_the_best(scope):
    model = MODELS["llama"]()
    linears = anatomy.target_linears(model, "all-linear")
    found = best_entries(model, linears, 0.03, "weight", scope)
    weights = {name: m.weight.detach().abs() for name, m in linears.items()}
    total = sum(len(pattern) for pattern in found.values())
    if scope == "global":
        assert total == sum(scores.entries_of(0.03, tuple(w.shape)) for w in weights.values())
        least = torch.cat([w.flatten() for w in weights.values()]).topk(total).values[-1]
        for name, pattern in found.items():
            assert torch.equal(pattern.flat, (weights[name].flatten() >= least).nonzero().squeeze(1))
    else:
        for name, pattern in found.items():
            top = weights[name].flatten().topk(scores.entries_of(0.03, tuple(weights[name].shape))).indices
            assert torch.equal(pattern.flat, top.sort().values)


def test_ties_go_to_the_first():
    best = scores._Best(5)
    best.add(1, torch.tensor([1.0, 2.0, 1.0, 1.0]))
    best.add(0, torch.tensor([1.0, 1.0, 3.0]))
    assert best.flat(0).tolist() == [0, 1, 2] and best.flat(1).tolist() == [0, 1]


def test_no_more_than_a_block_is_held(monkeypatch):
    """Scores of a block are dropped before the block below is computed."""
    model = MODELS["llama"]()
    linears, alive = anatomy.target_linears(model, "all-linear"), []
    real = block_gradients._back

    def counted(model, block, row, number):
        alive.append(number)
        return real(model, block, row, number)

    monkeypatch.setattr(block_gradients, "_back", counted)
    best_entries(model, linears, 0.1, "fisher", "global", batches=[tiny_batch(model)])
    assert alive == sorted(alive, reverse=True)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_scored_too(kind):
    model = quantise(MODELS["llama"](), kind)
    surgery = SensZOQ(density=0.02).apply(model, PLACE)
    provisional = {name: layer.pattern.flat for name, layer in surgery.layers.items()}
    surgery.calibrate([tiny_batch(model)])
    assert any(not torch.equal(layer.pattern.flat, provisional[name]) for name, layer in surgery.layers.items())
    losses = train(model, surgery, 8)
    assert losses[-1] < losses[0]


def test_what_cannot_be_chosen_is_refused():
    model = MODELS["llama"]()
    for fields, match in (
        ({"density": 0.0}, "share of the weights"),
        ({"density": 1.5}, "share"),
        ({"rows": 0}, "data"),
    ):
        with pytest.raises(BadInput, match=match):
            SensZOQ(**fields).apply(model, PLACE)
    surgery = SensZOQ().apply(model, PLACE)
    one_token = {key: value[:, :1] for key, value in tiny_batch(model).items()}
    for batches in ([], [one_token]):
        with pytest.raises(BadInput, match="no row of the calibration data has a token"):
            surgery.calibrate(batches)
