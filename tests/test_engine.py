"""Training through a recipe: exact resume, kills, interrupts, full disks, and what the trainers promise."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import trimtab
from conftest import MODELS, logits, tiny_batch
from helpers_run import PATCHES, films, interrupt, left, make_world, metrics, run, same, tree, write_rows
from trimtab.artifacts import adapter
from trimtab.engine import trainers as engine
from trimtab.errors import BadInput, Interrupted
from trimtab.model.load import load_model
from trimtab.training import session
from world import at_step, snapshot, values

STEPS = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10}
ELSEWHERE = {"meft in ram": {"place": {"slow": "ram"}}}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


class At(TrainerCallback):
    """Does something once, after step `step`."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


# --- exact resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATCHES)
def test_twenty_steps_are_ten_and_ten(name, world, tmp_path):
    keys = tree(world, tmp_path / "whole", PATCHES[name], **STEPS) | ELSEWHERE.get(name, {})
    whole = run(keys)
    parts = {**keys, "output": str(tmp_path / "parts")}
    with at_step(10, interrupt), pytest.raises(Interrupted) as stopped:
        run(parts)
    assert stopped.value.exit_code == 130 and "checkpoint-10" in str(stopped.value)
    assert not (tmp_path / "parts" / "adapter").exists() and not (tmp_path / "parts" / "run.json").exists()
    resumed = run(parts, resume=True)
    same(left(tmp_path / "whole"), left(tmp_path / "parts"))
    assert whole["final_loss"] == resumed["final_loss"] and whole["tokens"] == resumed["tokens"]
    assert resumed["steps"] == 20


def test_without_checkpoints_an_interrupt_still_writes_one(world, tmp_path):
    keys = tree(world, tmp_path / "whole", PATCHES["lora dropout"], max_steps=6, gradient_accumulation_steps=2)
    run(keys)
    parts = {**keys, "output": str(tmp_path / "parts")}
    with at_step(3, interrupt), pytest.raises(Interrupted):
        run(parts)
    assert [p.name for p in engine.checkpoints(tmp_path / "parts")] == ["checkpoint-3"]
    run(parts, resume=True)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    mine, theirs = (adapter.read_tensors(tmp_path / name / "adapter") for name in ("whole", "parts"))
    same(mine, theirs)


def test_an_interrupt_at_the_last_step_finishes_the_run(world, tmp_path):
    with at_step(3, interrupt):
        assert run(tree(world, tmp_path / "run", PATCHES["paca"], max_steps=3))["steps"] == 3
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_run_in_a_thread(world, tmp_path):
    """Signals belong to the main thread; a notebook or a server trains in another."""
    done: list = []
    keys = tree(world, tmp_path / "run", PATCHES["paca"], max_steps=2)
    thread = threading.Thread(target=lambda: done.append(run(keys)))
    thread.start()
    thread.join()
    assert done and done[0]["steps"] == 2


def test_two_runs_give_the_same_numbers(world, tmp_path):
    for name in ("one", "two"):
        run(tree(world, tmp_path / name, PATCHES["lora dropout"], max_steps=5))
        torch.rand(7)  # the global generator is elsewhere by now
    same(left(tmp_path / "one"), left(tmp_path / "two"))
    run(tree(world, tmp_path / "three", PATCHES["lora dropout"], max_steps=5, seed=1))
    assert metrics(tmp_path / "three") != metrics(tmp_path / "one")


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_what_is_trained_on_a_quantised_base_keeps_its_precision(world, tmp_path, precision):
    """TRL would make it bf16; and what is planned is what is held."""
    keys = tree(world, tmp_path / precision, PATCHES["paca"], max_steps=3)
    trained = run({**keys, "model": {"name": keys["model"], "precision": precision}})
    kept = adapter.read_tensors(tmp_path / precision / "adapter")
    assert {t.dtype for t in kept.values() if t.is_floating_point()} == {torch.float32}
    assert trained["predicted"]["bytes"]["adapter"] == trained["measured"]["bytes"]["adapter"]


def test_what_a_patch_keeps_aside_is_metered(world, tmp_path):
    """`full` trains copies; the weights that were loaded stay for the way back."""
    keys = tree(world, tmp_path / "full", PATCHES["full"], max_steps=3)
    trained = run({**keys, "model": {"name": keys["model"], "precision": "bf16"}})  # no longer mapped
    assert trained["measured"]["bytes"]["weights"] == trained["predicted"]["bytes"]["weights"] > 0


def test_classification_resumes_too(world, tmp_path):
    keys = films(world, tmp_path / "whole", PATCHES["paca"], max_steps=8)
    run(keys)
    parts = {**keys, "output": str(tmp_path / "parts")}
    with at_step(4, interrupt), pytest.raises(Interrupted):
        run(parts)
    run(parts, resume=True)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    for part in ("0-paca", "1-head"):
        same(*(adapter.read_tensors(tmp_path / name / "adapter" / part) for name in ("whole", "parts")))


# --- what the trainers promise ---------------------------------------------------------------------------------------


def test_evaluation_on_the_way_is_a_mean_over_tokens(world, tmp_path):
    keys = tree(world, tmp_path / "run", PATCHES["paca"], max_steps=4, eval_strategy="steps", eval_steps=2,
                per_device_eval_batch_size=4)  # fmt: skip
    keys["data"]["test"] = str(write_rows(tmp_path / "test.jsonl", [
        {"question": "paris is in ?", "answer": "france"},
        {"question": "which is a good film ?", "answer": "the good film of lyon in france is a bad film of madrid"},
        {"question": "spain ?", "answer": "madrid"}]))  # fmt: skip
    found = run(keys)["evaluation"]
    assert {"eval_loss", "eval_accuracy"} <= found.keys()
    ones = {**keys, "training": {**keys["training"], "per_device_eval_batch_size": 1}, "output": str(tmp_path / "one")}
    assert run(ones)["evaluation"]["eval_loss"] == pytest.approx(found["eval_loss"], abs=1e-5)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "one")
    verb = trimtab.Recipe.from_dict(keys).evaluate()["metrics"]
    assert verb["loss"] == pytest.approx(found["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("name", ["paca reselect", "meft"])
def test_the_best_checkpoint_is_kept_and_loaded(name, world, tmp_path):
    keys = tree(world, tmp_path / "run", PATCHES[name], max_steps=8, eval_strategy="steps", eval_steps=2,
                save_strategy="steps", save_steps=2, save_total_limit=1, load_best_model_at_end=True,
                metric_for_best_model="eval_loss", greater_is_better=True)  # fmt: skip
    keys["data"]["test"] = keys["data"]["train"]  # the worst is the first
    run(keys)
    assert [p.name for p in engine.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    model, _ = load_model(str(keys["model"]))
    (best,) = adapter.load_adapter(model, tmp_path / "run" / "checkpoint-2")
    same({k: t.detach() for k, t in best.own_tensors().items()}, adapter.read_tensors(tmp_path / "run" / "adapter"))


@pytest.mark.parametrize("name", ["paca", "paca live", "lora dropout", "edora", "parallel_adapter"])
def test_accumulated_gradients_are_those_of_the_larger_batch(name, world, tmp_path):
    patch = {"lora": {"r": 4}} if name.startswith("lora") else PATCHES[name]
    wide = dict(max_steps=3, per_device_train_batch_size=4, optim="sgd", learning_rate=0.1)
    run(tree(world, tmp_path / "one", patch, **wide))
    narrow = {**wide, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    run(tree(world, tmp_path / "two", patch, **narrow))
    one, two = (adapter.read_tensors(tmp_path / n / "adapter") for n in ("one", "two"))
    assert all(torch.allclose(one[k].float(), two[k].float(), atol=1e-5) for k in one)
    for (_, a, *_), (_, b, *_) in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("name", ["paca", "paca live", "lora dropout", "edora", "parallel_adapter", "meft", "full"])
def test_recomputed_activations_give_the_same_run(name, world, tmp_path):
    for kind in (False, True):
        keys = tree(world, tmp_path / str(kind), PATCHES[name], max_steps=3, gradient_checkpointing=kind)
        run(keys)
    for (_, a, *_), (_, b, *_) in zip(metrics(tmp_path / "False"), metrics(tmp_path / "True"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("name", ["full", "lora dropout", "paca", "edora", "parallel_adapter", "meft"])
def test_bf16_autocast(name, world, tmp_path):
    keys = tree(world, tmp_path / "run", PATCHES[name], max_steps=12, bf16=True)
    run(keys)
    losses = [row[1] for row in metrics(tmp_path / "run")]
    assert losses[-1] < 0.95 * losses[0]


def test_fused_ops_change_nothing_but_rounding(world, tmp_path):
    for fused in (True, False):
        run(tree(world, tmp_path / str(fused), PATCHES["paca"], max_steps=6) | {"engine": {"fused_ops": fused}})
    one, two = (metrics(tmp_path / str(fused)) for fused in (True, False))
    assert [row[1] for row in one] == pytest.approx([row[1] for row in two], abs=1e-4)


def test_packed_documents_do_not_see_each_other(world, tmp_path):
    """One packed row holds all documents: its loss is the token mean of theirs."""
    documents = [{"text": t} for t in ("paris is in france .", "a good film", "madrid is in spain ?")]
    keys = tree(world, tmp_path / "plain", PATCHES["paca"], max_steps=2, per_device_train_batch_size=3, optim="sgd",
                learning_rate=0.1)  # fmt: skip
    keys["data"] = {"train": str(write_rows(tmp_path / "text.jsonl", documents))}
    run(keys)
    run({**keys, "training": {**keys["training"], "packing": True}, "output": str(tmp_path / "packed")})
    one, two = (metrics(tmp_path / name) for name in ("plain", "packed"))
    assert [row[1] for row in one] == pytest.approx([row[1] for row in two], abs=1e-5)


def test_only_the_assistant_is_learned(world, tmp_path):
    """A template that marks generations: the loss falls on every assistant turn and on nothing else."""
    from helpers_load import tiny_llama, tiny_tokenizer

    tiny_llama(tmp_path / "llama", dtype=torch.float32)
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant> {% generation %}{{ m['content'] }} </s>"
        "{% endgeneration %}{% else %}<user> {{ m['content'] }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    tiny_tokenizer(chat=template).save_pretrained(tmp_path / "llama")
    turns = [("user", "which country is paris in ?"), ("assistant", "france"), ("user", "a good film ?"),
             ("assistant", "the bad film")]  # fmt: skip
    chat = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 4
    keys = tree(world, tmp_path / "run", PATCHES["paca"], max_steps=1)
    keys |= {"model": str(tmp_path / "llama"), "data": {"train": str(write_rows(tmp_path / "chat.jsonl", chat))}}
    seen = []
    with pytest.MonkeyPatch.context() as patched:
        real = engine.CausalTrainer.compute_loss
        patched.setattr(engine.CausalTrainer, "compute_loss",
                        lambda self, model, inputs, *a, **k: (seen.append(inputs["labels"].clone()),
                                                              real(self, model, inputs, *a, **k))[1])  # fmt: skip
        run(keys)
    words = tiny_tokenizer().decode(seen[0][0][seen[0][0] != -100])
    assert words.split() == ["france", "</s>", "the", "bad", "film", "</s>"]


@pytest.mark.parametrize("name,fields,rate", [("paca", {"r": 16}, 2e-2), ("lora", {}, 5e-3), ("edora", {}, 2e-2),
                                              ("full", {}, 2e-3)])  # fmt: skip
def test_a_classifier_is_trained_saved_and_read_again(name, fields, rate, world, tmp_path):
    keys = films(world, tmp_path / "run", {name: fields}, max_steps=60, per_device_train_batch_size=4,
                 eval_strategy="steps", eval_steps=60, learning_rate=rate, lr_scheduler_type="constant")  # fmt: skip
    found = run(keys)
    assert found["evaluation"]["eval_accuracy"] == 1.0
    again = trimtab.Recipe.from_dict(keys).evaluate()
    assert again["metrics"]["accuracy"] == 1.0 and again["rows"] == 12
    base = trimtab.Recipe.from_dict(keys).evaluate(base_only=True)
    assert base["metrics"]["accuracy"] < 1.0


@pytest.mark.parametrize("name,task", [("paca live", "causal-lm"), ("lora dropout", "causal-lm"), ("full", "causal-lm"),
                                       ("parallel_adapter", "causal-lm"), ("paca", "classification")])  # fmt: skip
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(name, task, fails, world, tmp_path, monkeypatch):
    """Also when the run breaks: forward, attention, hooks, flags, config and every weight."""
    causal = task == "causal-lm"
    keys = (tree if causal else films)(world, tmp_path / "run", PATCHES[name], max_steps=3, gradient_checkpointing=True)
    model, _ = load_model(str(keys["model"]), task=task, labels=None if causal else 2)
    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    before, weights, config = snapshot(model), values(model), model.config.to_dict()
    generation = model.generation_config.to_dict() if causal else None
    monkeypatch.setattr(session.Session, "_model", lambda self: model)
    if fails:
        with at_step(2, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
            run(keys)
    else:
        run(keys)
    assert snapshot(model) == before
    same(values(model), weights)
    assert model.config.to_dict() == config and model.config._attn_implementation == "sdpa"
    assert (model.generation_config.to_dict() if causal else None) == generation
    assert not model.training and not any(m.training for m in model.modules())


def test_nothing_is_left_of_a_run_that_never_began(world, tmp_path):
    for patch, training in (
        ({"paca": {"r": 0}}, {}),
        ({"lora": {"targets": "nose"}}, {}),
        ({"paca": {}}, {"max_length": 4}),
    ):
        with pytest.raises(BadInput):
            run(tree(world, tmp_path / "deep" / "run", patch, max_steps=1, **training))
        assert not (tmp_path / "deep").exists()


# --- strangers' loops ------------------------------------------------------------------------------------------------


def test_a_strangers_loop():
    model = MODELS["llama"]()
    surgery = trimtab.PaCA(r=4).apply(model, trimtab.Place(fast="cpu"))
    batch, optimizer = tiny_batch(model), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    first = None
    for _ in range(10):
        loss = model(**batch).loss
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.9 * first
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits[batch["attention_mask"] == 1], logits(model, batch))
    surgery.revert()


@pytest.mark.parametrize("stranger", ["Trainer", "SFTTrainer"])
def test_stock_trainers(stranger, world, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load_model(str(world / "llama"))
    surgery = trimtab.PaCA(r=4).apply(model, trimtab.Place(fast="cpu"))
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if not p.requires_grad}
    values = dict(output_dir=str(tmp_path), max_steps=12, learning_rate=2e-2, use_cpu=True, report_to="none",
                  logging_steps=1, save_steps=6, disable_tqdm=True)  # fmt: skip
    if stranger == "Trainer":
        ids = torch.randint(8, 28, (4, 12)).tolist()
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = Trainer(model, TrainingArguments(**values), train_dataset=data)
    else:
        data = Dataset.from_list([{"prompt": "paris is in ", "completion": "france"}] * 4)
        trainer = SFTTrainer(model, args=SFTConfig(**values), train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(frozen[k], p) for k, p in model.named_parameters() if k in frozen)
    surgery.revert()
