"""Diff pruning: many tasks over one base, and runs of whole recipes that are killed in either phase."""

from __future__ import annotations

import signal

import pytest
import torch

from conftest import MODELS, logits, quantise, tiny_batch
from helpers_run import die, films, forked, left, make_world, run, tree
from helpers_run import same as identical
from trimtab.artifacts.adapter import read_tensors
from trimtab.errors import BadInput
from trimtab.methods.diff_pruning import DiffPruning
from trimtab.model import anatomy, quant
from trimtab.model.load import base_hash, load_model
from trimtab.model.sparse_delta import SparseDelta, Tasks
from trimtab.recipe import Recipe
from world import PLACE, at_step, same, snapshot, train, values

KILLED = {"diff_pruning": {"density": 0.02, "candidates": 0.1, "rows": 4}}
SAVED = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_a_stream_of_tasks_keeps_earlier_ones():
    model = MODELS["bert"]()
    before, weights, batch = snapshot(model), values(model), tiny_batch(model)
    hash_of_base, deltas, outputs = base_hash(model), {}, {}
    for task in ("one", "two", "three"):
        surgery = DiffPruning(density=0.02, candidates=0.1, score="random", seed=len(task)).apply(model, PLACE)
        batch["labels"] = (batch["labels"] + 1) % 3
        train(model, surgery, 6)
        deltas[task], outputs[task] = surgery.delta(hash_of_base), logits(model, batch)
        surgery.revert()
        assert snapshot(model) == before and same(model.state_dict(), weights)
    tasks = Tasks(model, hash_of_base, deltas)
    for task in ("one", "three", "two", "one"):
        tasks.switch(task)
        assert torch.equal(logits(model, batch), outputs[task]), task
    tasks.switch(None)
    assert same(model.state_dict(), weights)


def test_tasks_need_a_dense_base():
    model = quantise(MODELS["llama"](), "nf4")
    patch = DiffPruning(density=0.02, candidates=0.1, score="random")
    surgery = patch.apply(model, PLACE)
    train(model, surgery, 4)
    delta, outputs, batch = surgery.delta("a hash"), logits(model, tiny_batch(model)), tiny_batch(model)
    surgery.revert()
    with pytest.raises(BadInput, match="its weights are stored as nf4"):
        Tasks(model, "a hash", {"one": delta}).switch("one")
    again = patch.apply(model, PLACE)
    again.load_tensors(delta.tensors())
    assert torch.equal(logits(model, batch), outputs), "as a patch it acts on such a base"


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.filterwarnings("ignore")
def test_a_run_ends_with_exactly_the_density(world, tmp_path):
    fields = {"density": 0.01, "candidates": 0.1, "rows": 4}
    for patch, keys in (("language model", tree), ("classifier", films)):
        recipe = Recipe.from_dict(keys(world, tmp_path / patch, {"diff_pruning": fields}, max_steps=6))
        recipe.train()
        task = recipe.load_objective().head
        model, _ = load_model(str(recipe.model.name), task=task, labels=2 if task == "classification" else None)
        folder = tmp_path / patch / "adapter"
        tensors = read_tensors(folder if task == "causal-lm" else folder / "0-diff_pruning")
        shapes = {n: tuple(anatomy.dense_view(m).shape) for n, m in anatomy.target_linears(model, "all-linear").items()}
        delta = SparseDelta.from_tensors(base_hash(model), tensors, shapes)
        assert delta.entries == round(0.01 * quant.parameters_of(model))
        assert all(len(part.values) == 0 or part.values.any() for part in delta.parts.values())


@pytest.fixture(scope="module")
def unkilled(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("unkilled") / "run"
    run(tree(world, output, KILLED, **SAVED))
    return left(output)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_run_killed_in_either_phase_is_resumed_bit_for_bit(step, world, tmp_path, unkilled):
    """The gates are trained for 4 steps: the last checkpoint has gates, has just lost them, or has none."""
    keys = tree(world, tmp_path / "run", KILLED, **SAVED)

    def child():
        with at_step(step, die):
            run(keys)

    assert forked(child) == -signal.SIGKILL
    last = tmp_path / "run" / f"checkpoint-{step - 1}"
    assert any(key.endswith(".alpha") for key in read_tensors(last)) == (step == 3)
    run(keys, resume=True)
    identical(left(tmp_path / "run"), unkilled)


def test_it_needs_gradients(world, tmp_path):
    keys = tree(world, tmp_path / "run", KILLED, max_steps=2)
    with pytest.raises(BadInput, match="DiffPruning with Mezo: its gates"):
        run({**keys, "stepper": "mezo"})
    assert not (tmp_path / "run").exists()
