"""`generate`, `chat` and `eval` of a 4-bit base: packed for decoding inside the plan, and not at all beyond it."""

from __future__ import annotations

import io

import pytest
import torch

from helpers_run import make_world, tree
from trimtab.errors import DoesNotFit
from trimtab.inference import session
from trimtab.inference.evaluate import evaluate
from trimtab.inference.generate import chat, generate
from trimtab.inference.session import Inference
from trimtab.memory.meter import LiveTensors
from trimtab.model import packed
from trimtab.model.quant import quantised_state
from trimtab.model.sampling import complete
from trimtab.planning.inference import Work, plan_inference, plan_recipe
from trimtab.recipe import Recipe
from trimtab.training.train import train

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not packed.available(), reason="this CPU has no AVX512-BF16"),
]
ASK = "which country is paris in ?"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe of a finished run of LoRA on nf4."""
    folder = tmp_path_factory.mktemp("runs")
    made = tree(make_world(folder, torch.bfloat16), folder / "lora", {"lora": {"r": 4}}, max_steps=2)
    made["model"] = {"name": made["model"], "precision": "nf4"}
    made["data"]["test"] = made["data"]["train"]
    train(Recipe.from_dict(made))
    return Recipe.from_dict(made)


def with_keys(recipe: Recipe, **keys) -> Recipe:
    return Recipe.from_dict({**recipe.to_dict(), **keys})


@pytest.fixture
def seen(monkeypatch):
    """Whether each reply's model was packed when it was generated."""
    found = []

    def watched(made, rows):
        found.append(packed.any_packed(made.model))
        return real(made, rows)

    real = Inference.on_token
    monkeypatch.setattr(Inference, "on_token", watched)
    return found


@pytest.mark.parametrize("work", [Work(1, 4, 3), Work(4, 40, 50), Work(4, 20, 100)], ids=str)
def test_the_plan_is_what_tensors_use(recipe, work):
    made = Inference(recipe)
    model, own = made.model, [t for surgery in made.surgeries for t in surgery.own_tensors().values()]
    ids = torch.randint(8, 60, (work.rows, work.tokens), generator=torch.Generator().manual_seed(0))
    peaks = {}
    for form in (False, True):
        planned = plan_inference(recipe, made.run.patches, Work(work.rows, work.tokens, work.new, packed=form))
        with LiveTensors([*model.parameters(), *model.buffers(), *own, *quantised_state(model)]) as live:
            if form:
                for linear in packed.packable(model):
                    packed.pack(linear)
            complete(
                model, made.tokenizer, ids, torch.ones_like(ids), max_new_tokens=work.new, min_new_tokens=work.new,
                eos_token_id=1,
            )  # fmt: skip
        packed.unpack_all(model)
        peaks[form] = planned
        assert planned.live_peak_bytes == pytest.approx(live.peak_bytes, rel=0.05)
    more = peaks[True].kinds["weights"] - peaks[False].kinds["weights"]
    assert more == packed.scales_bytes(model) > 0 or peaks[True].phase == "packing"


def test_it_is_packed_for_the_session_only(recipe, seen):
    made = Inference(recipe)
    with made:
        assert made.replies([7], 2) == 1 and not packed.any_packed(made.model), "too short to pay"
        assert made.replies([7, 9], 40) == 2 and packed.any_packed(made.model)
        assert made.replies([7], 2) == 1 and packed.any_packed(made.model), "it is packed already"
        made.pack(False)
        assert not packed.any_packed(made.model)
        made.pack(True)
    assert not packed.any_packed(made.model)
    replies = list(generate(recipe, [ASK, "paris ?"], max_new_tokens=8))
    assert len(replies) == 2 and all(seen) and seen


def test_an_interrupted_generation_restores(recipe, monkeypatch):
    kept = []

    def interrupted(made, rows):
        kept.append((made.model, packed.any_packed(made.model)))
        raise KeyboardInterrupt

    monkeypatch.setattr(Inference, "on_token", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(generate(recipe, [ASK], max_new_tokens=8))
    ((model, was),) = kept
    assert was and not packed.any_packed(model)


def test_beyond_the_budget_the_ordinary_form_is_used(recipe, monkeypatch, seen):
    real, said = session.plan_inference, []

    def larger(recipe, patches, work, *more):
        planned = real(recipe, patches, work, *more)
        planned.kinds["weights"] += 2**40 * (1 if work.packed else work.new == 77)
        return planned

    monkeypatch.setattr(session, "plan_inference", larger)
    inside = with_keys(recipe, budget={"fast": "20GiB"})
    list(generate(inside, [ASK], say=said.append, max_new_tokens=8))
    assert seen and not any(seen) and any("will be slow" in line for line in said)
    with pytest.raises(DoesNotFit):
        list(generate(inside, [ASK], max_new_tokens=77))


def test_evaluation_packs_for_its_replies_only(recipe, monkeypatch, seen):
    found = evaluate(recipe)
    assert seen and all(seen)
    monkeypatch.setattr(packed, "available", lambda: False)
    seen.clear()
    plain = evaluate(recipe)
    assert seen and not any(seen)
    assert found["metrics"]["loss"] == plain["metrics"]["loss"], "the loss comes from the ordinary form"


@pytest.mark.parametrize("budget", [{}, {"fast": "20GiB"}], ids=["no budget", "budget"])
def test_a_conversation_is_packed(recipe, monkeypatch, seen, budget):
    monkeypatch.setattr("sys.stdin", io.StringIO("paris ?\nlyon ?\n"))
    chat(with_keys(recipe, budget=budget), max_new_tokens=5)
    assert seen and all(seen)


def test_the_plan_of_a_recipe_that_trains_nothing(recipe):
    bare = with_keys(recipe, patches=[{"streaming_llm": {"window": 20}}])
    whole = plan_recipe(bare)
    less = plan_recipe(with_keys(bare, model={**recipe.to_dict()["model"], "precision": "bf16"}))
    assert whole.kinds["weights"] > less.kinds.get("weights", 0), "4-bit weights are copies"
