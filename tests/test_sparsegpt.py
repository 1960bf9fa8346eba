"""SparseGPT against exact column-by-column OBS, its memory, the masks that trained patches keep, and whole runs."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import MODELS, logits, tiny_batch
from helpers_run import make_world, tree, write_rows
from trimtab import methods
from trimtab.contracts import Place
from trimtab.errors import BadInput, DoesNotFit
from trimtab.inference.evaluate import evaluate
from trimtab.inference.export import export
from trimtab.memory.meter import file_ranges, is_mapped
from trimtab.methods import sparsegpt
from trimtab.methods.sparsegpt import SparseGPT, inverse_root, prune
from trimtab.model import anatomy
from trimtab.model.block_inputs import by_blocks
from trimtab.planning.plan import plan
from trimtab.recipe import Recipe
from trimtab.training.train import train
from world import CASES, PLACE, calibrated
from world import train as steps

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def correlated(inputs: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """(in, tokens) in fp64."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    return mixed @ torch.randn(inputs, tokens, generator=random, dtype=torch.float64)


def damped(x: torch.Tensor) -> torch.Tensor:
    hessian = 2 * x @ x.T / x.shape[1]
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(x), dtype=x.dtype)


def factor(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return inverse_root(hessian, torch.empty_like(hessian))


def obs(weight: torch.Tensor, x: torch.Tensor, share: float, group: int, bits: int, block: int) -> torch.Tensor:
    """Column by column, with the inverse of what is left of H each time; (out, in) in fp64."""
    w, h = weight.clone(), damped(x)
    left = [torch.linalg.inv(h[j:, j:]) for j in range(len(h))]  # [H_F^-1], F = {j, ..}
    gone = torch.zeros_like(w, dtype=torch.bool)
    grids: list[tuple[float, float]] = []
    for j in range(w.shape[1]):
        if j % block == 0:
            ends = w[:, j : j + block]
            grids = [(min(0.0, row.min().item()), max(0.0, row.max().item())) for row in ends]
        if j % (group or block) == 0:
            many = range(j, min(j + (group or block), w.shape[1]))
            scores = {(i, k): float(w[i, k] ** 2 / left[k][0, 0]) for i in range(len(w)) for k in many}
            for rows in [[i] for i in range(len(w))] if group else [range(len(w))]:
                order = sorted(((i, k) for i in rows for k in many), key=scores.__getitem__)
                for i, k in order[: group // 2 if group else int(share * len(order))]:
                    gone[i, k] = True
        for i in range(len(w)):
            value = w[i, j].item()
            if gone[i, j]:
                new = 0.0
            elif bits == 4:
                low, high = grids[i]
                size = (high - low) / 15
                zero = round(-low / size)
                new = size * (min(15, max(0, round(value / size) + zero)) - zero)
            else:
                new = value
            w[i, j:] -= (value - new) / left[j][0, 0] * left[j][0]
            w[i, j] = new
    return w


@pytest.mark.parametrize("share,group,bits", [(0.5, 0, 16), (0.3, 0, 16), (0.5, 4, 16), (0.5, 8, 4), (0.6, 0, 4)])
def test_it_is_exact_obs(share, group, bits, monkeypatch):
    monkeypatch.setattr(sparsegpt, "BLOCK", 8)
    x = correlated(20 if group != 8 else 24, 200)
    weight = torch.randn(6, len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    root, dead = factor(2 * x @ x.T / x.shape[1])
    ours = weight.T.clone()
    prune(ours, root, share, group, bits)
    assert not dead.any()
    assert torch.allclose(ours.T, obs(weight, x, share, group, bits, 8), atol=1e-9)
    assert torch.allclose(root.T @ root, torch.linalg.inv(damped(x)), atol=1e-9) and not root.tril(-1).any()


def test_what_stays_is_the_least_squares_fit():
    """Where the first columns go, the others must be those that fit the outputs best."""
    x, goes = correlated(16, 400, seed=3), 4
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weight[:, :goes] *= 1e-6
    weight[:, :goes] += 1e-7
    whole = weight.clone()
    whole[:, :goes] = torch.randn(5, goes, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    root, _ = factor(2 * x @ x.T / x.shape[1])
    small = weight.T.clone()
    prune(small, root, goes / 16, 0)
    assert not small[:goes].any() and small[goes:].all()
    h = damped(x)  # the fit is under the damped norm
    best = whole[:, goes:] + torch.linalg.solve(h[goes:, goes:], h[goes:, :goes] @ whole[:, :goes].T).T
    errors = whole[:, :goes].T.clone()  # the same columns pruned by hand, at a size that matters
    by_hand = torch.cat([errors, whole[:, goes:].T])
    for j in range(goes):
        by_hand[j + 1 :] -= torch.outer(root[j, j + 1 :], by_hand[j] / root[j, j])
        by_hand[j] = 0
    assert torch.allclose(by_hand[goes:].T, best, atol=1e-8)


def test_blocks_of_columns_change_nothing_but_the_mask(monkeypatch):
    """With a pattern, the mask does not depend on the block, and neither may the lazy updates."""
    x = correlated(32, 300)
    weight = torch.randn(7, 32, dtype=torch.float64)
    ends = []
    for block in (4, 16, 32, 128):
        monkeypatch.setattr(sparsegpt, "BLOCK", block)
        root, _ = factor(2 * x @ x.T)
        ends.append(weight.T.clone())
        prune(ends[-1], root, 0.5, 4)
    assert all(torch.allclose(ends[0], other, atol=1e-10) for other in ends)


def test_an_input_that_is_always_zero_is_dropped_and_no_token_means_magnitude():
    x = correlated(8, 100)
    x[3] = 0
    root, dead = factor(2 * x @ x.T)
    assert dead.tolist() == [False] * 3 + [True] + [False] * 4 and root.isfinite().all()
    root, dead = factor(torch.zeros(8, 8))
    assert torch.equal(root, torch.eye(8)) and not dead.any()
    weight = torch.randn(8, 6)
    pruned = weight.clone()
    prune(pruned, root, 0.5, 0)
    largest = weight.abs() > weight.abs().flatten().kthvalue(24).values
    assert torch.equal(pruned, weight * largest)


def test_a_hessian_without_an_inverse_is_refused():
    with pytest.raises(BadInput, match="positive definite"):
        factor(torch.full((4, 4), float("nan")))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_it_errs_less_than_pruning_alone(family, pattern):
    """On the calibration tokens the outputs of the first block's linears are nearer than with weights that are only
    set to zero, by magnitude or by Wanda's score."""
    batches = [tiny_batch(MODELS[family](), rows=8, tokens=24, seed=seed) for seed in range(6)]
    plain, model = MODELS[family](2), MODELS[family](2)
    surgery = SparseGPT(pattern=pattern).apply(model, PLACE)
    surgery.calibrate(batches)
    for name, linear in surgery.linears.items():
        share = float((linear.weight == 0).float().mean())
        assert share == pytest.approx(0.5, abs=0.002), name
        if pattern != "unstructured":
            m = int(pattern[-1])
            assert bool(((linear.weight.view(-1, m) != 0).sum(-1) <= m // 2).all()), name

    path = anatomy.blocks(plain)[0]
    first = {name: plain.get_submodule(name) for name in surgery.linears if name.startswith(f"{path}.0.")}
    read: dict[str, list[torch.Tensor]] = {name: [] for name in first}
    for name, linear in first.items():
        linear.register_forward_pre_hook(lambda m, args, name=name: read[name].append(args[0]))
    for batch in batches:
        logits(plain, batch)
    counts = torch.cat([batch["attention_mask"].flatten() for batch in batches]).bool()
    for name, linear in first.items():
        x, weight = torch.cat([x.flatten(0, 1) for x in read[name]])[counts], linear.weight.detach()

        def off(changed: torch.Tensor, x: torch.Tensor = x, weight: torch.Tensor = weight) -> float:
            return float((x @ (changed - weight).T).square().sum())

        for score in (weight.abs(), weight.abs() * x.norm(dim=0)):
            few = score.view(-1, 4).argsort() if pattern == "2:4" else score.view(-1, 8).argsort()
            if pattern == "unstructured":
                masked = weight * (score > score.quantile(0.5))
            else:
                masked = weight.view(few.shape).scatter(-1, few[:, : few.shape[1] // 2], 0).view_as(weight)
            assert off(model.get_submodule(name).weight.detach()) < off(masked), name


def test_each_block_reads_what_the_pruned_ones_before_it_return(monkeypatch):
    """The Hessian of the second block, by a naive pass through the model whose first block is pruned."""
    seen, whole = [], sparsegpt.inverse_root

    def spied(hessian, out):
        seen.append(hessian.clone())
        return whole(hessian, out)

    monkeypatch.setattr(sparsegpt, "inverse_root", spied)
    model, naive = MODELS["qwen2"](3), MODELS["qwen2"](3)
    batches = [tiny_batch(model, seed=seed) for seed in (1, 2)]
    surgery = SparseGPT().apply(model, PLACE)
    surgery.calibrate(batches)
    with torch.no_grad():
        for name, linear in surgery.linears.items():
            if ".0." in name:
                naive.get_submodule(name).weight.copy_(linear.weight)
    read = []
    hook = naive.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    for batch in batches:
        with torch.no_grad():
            naive(**batch)
    hook.remove()
    x = torch.cat([x[b["attention_mask"] == 1] for x, b in zip(read, batches, strict=True)])
    assert len(seen) == 8  # q/k/v and gate/up share one
    assert torch.allclose(seen[4], 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_in_four_bits_a_row_has_sixteen_values_at_most():
    surgery = calibrated(SparseGPT(bits=4), MODELS["llama"]())
    for linear in surgery.linears.values():
        assert all(len(row.unique()) <= 16 for row in linear.weight[:, :128])


def test_the_pruned_weights_lie_in_a_file_or_where_they_were(tmp_path):
    model = MODELS["llama"]()
    surgery = calibrated(SparseGPT(), model)
    maps = file_ranges()
    assert all(is_mapped(linear.weight, maps) for linear in surgery.linears.values())
    assert len(surgery.in_slow_tier) == len(surgery.linears)
    surgery.revert()
    surgery = SparseGPT().apply(model, Place(fast="cpu", slow="ram"))
    assert not surgery.in_slow_tier
    with pytest.raises(BadInput, match="there is no such folder"):
        SparseGPT().apply(MODELS["llama"](), Place(fast="cpu", folder=str(tmp_path / "none")))


def test_a_full_disk_is_said_before_the_start(monkeypatch):
    monkeypatch.setattr("trimtab.tiered.mapped_file.free_bytes", lambda where: 1000)
    with pytest.raises(DoesNotFit, match="pruned weights"):
        SparseGPT().apply(MODELS["llama"](), PLACE)


def test_hidden_states_are_in_files_and_masks_are_shared(tmp_path):
    model = MODELS["llama"]()
    batch = tiny_batch(model)
    for _, _, run in by_blocks(model, [batch, dict(batch)], str(tmp_path)):
        assert [os.listdir(folder) for folder in tmp_path.iterdir()][0]
        assert len(list(run())) == 2
        frame = run.__wrapped__.__closure__  # under no_grad
        recorded = next(cell.cell_contents for cell in frame if isinstance(cell.cell_contents, list))
        one, two = (r.calls[-1][1] for r in recorded)
        assert one.keys() == two.keys()
        assert all(one[key] is two[key] for key in one if isinstance(one[key], torch.Tensor))
        assert all(torch.equal(r.hidden, recorded[0].hidden) for r in recorded)
    assert not list(tmp_path.iterdir())


# --- with trained patches --------------------------------------------------------------------------------------------

KEEPS = {  # which trained patches keep the zeros when their change is in the weights
    **dict.fromkeys(CASES, False), "parallel_adapter": True, "meft": True, "lst": True,
    "senszoq by weight": True, "senszoq by gradient_weight": True,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in KEEPS if name.partition(" ")[0] in CASES])
def test_which_trained_patches_keep_the_mask(name):
    patch, _, score = name.partition(" by ")
    model = MODELS["llama"]()
    below = calibrated(SparseGPT(), model)
    gone = {path: linear.weight == 0 for path, linear in below.linears.items()}
    fields = {**CASES[patch], **({"score": score} if score else {})}
    above = calibrated(methods.find(patch)(**fields), model)
    steps(model, above, 3)
    if "merged" in methods.TABLE[patch].exports:
        above.merge()
    else:
        above.revert()
    kept = all(not model.get_submodule(path).weight[where].any() for path, where in gone.items())
    assert kept == KEEPS[name]


# --- whole runs ------------------------------------------------------------------------------------------------------

OURS = {"sparsegpt": {"rows": 8}}


def test_a_run_trains_on_it_within_its_plan(world, tmp_path):
    keys = tree(world, tmp_path / "run", OURS, max_steps=4)
    keys["data"]["test"] = keys["data"]["train"]
    keys["patches"] = [OURS, {"paca": {"r": 4}}]
    recipe = Recipe.from_dict(keys)
    made = train(recipe)
    assert made["predicted"]["live_peak_bytes"] == pytest.approx(made["measured"]["live_peak_bytes"], rel=0.005)
    predicted, measured = ({kind: made[side]["bytes"].get(kind, 0) for kind in ("weights", "adapter")}
                           for side in ("predicted", "measured"))  # fmt: skip
    assert predicted == measured, "the pruned weights use no fast memory"
    whole = plan(recipe).kinds["mapped weights"]
    bare = plan(Recipe.from_dict({**keys, "patches": [{"paca": {"r": 4}}]})).kinds["mapped weights"]
    linears = anatomy.target_linears(AutoModelForCausalLM.from_pretrained(world / "llama"), "all-linear")
    assert whole - bare == sum(linear.weight.nbytes for linear in linears.values())
    found = evaluate(recipe)
    assert found["metrics"]["loss"] == pytest.approx(made["final_loss"], abs=1.0)


def test_a_recipe_that_only_prunes_is_evaluated_and_exported(world, tmp_path):
    text = write_rows(tmp_path / "text.jsonl", [{"text": "the good film is in france and paris is good"}] * 12)
    keys = tree(world, tmp_path / "run", {"sparsegpt": {"rows": 8, "pattern": "2:4", "calibration": str(text)}})
    keys["data"]["test"] = keys["data"]["train"]
    recipe = Recipe.from_dict(keys)
    pruned, base = evaluate(recipe), evaluate(recipe, base_only=True)
    assert pruned["metrics"]["loss"] != base["metrics"]["loss"]
    export(recipe, "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    zeros = [float((m.weight == 0).float().mean()) for m in merged.model.layers.modules() if isinstance(m, nn.Linear)]
    assert zeros and all(share >= 0.5 for share in zeros)
    assert json.loads((tmp_path / "run" / "merged" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"sparsity": 0.0}, "above 0"), ({"sparsity": 1.0}, "below 1"), ({"pattern": "2:4", "sparsity": 0.6}, "half"),
        ({"pattern": "4:8", "sparsity": 0.4}, "half"), ({"rows": 0}, "Hessian"), ({"targets": "nothing"}, "nothing"),
    ],
)  # fmt: skip
def test_bad_fields(fields, message):
    with pytest.raises(BadInput, match=message):
        SparseGPT(**fields).apply(MODELS["llama"](), PLACE)


def test_a_pattern_that_does_not_divide_the_width_is_refused():
    model = MODELS["llama"]()
    model.model.layers[0].mlp.down_proj = nn.Linear(126, 64, bias=False)
    with pytest.raises(BadInput, match="not a multiple of 4"):
        SparseGPT(pattern="2:4").apply(model, PLACE)


def test_too_short_a_text_is_refused_and_few_rows_are_said(world, tmp_path):
    text = write_rows(tmp_path / "text.jsonl", [{"text": "the film"}] * 2)
    keys = tree(world, tmp_path / "run", {"sparsegpt": {"calibration": str(text)}})
    keys["data"]["test"] = keys["data"]["train"]
    with pytest.raises(BadInput, match="say nothing about a model"):
        evaluate(Recipe.from_dict(keys))
    surgery = calibrated(SparseGPT(), MODELS["llama"]())
    assert any("fewer tokens than they have inputs" in note for note in surgery.notes)
