"""trimtab's methods inside PEFT: the same numbers as trimtab's own, and all that PEFT does with a tuner."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import trimtab
import trimtab.integrations.peft as ours
from conftest import MODELS, logits, quantise, tiny_batch
from helpers_run import make_world, tree
from trimtab import methods
from trimtab.errors import BadInput
from world import PLACE, snapshot, values

CASES = {
    "paca": {"r": 4}, "edora": {"r": 4}, "senszoq": {"density": 0.02, "score": "weight"},
    "parallel_adapter": {"r": 16}, "meft": {"r": 64, "k": 16, "scale": 1.0},
}  # fmt: skip
MERGED = ("paca", "edora", "senszoq")
cases = pytest.mark.parametrize("name", CASES)
merged_cases = pytest.mark.parametrize("name", MERGED)
pytestmark = pytest.mark.filterwarnings("ignore")


def config(name: str, **more):
    return getattr(ours, name.title().replace("_", "") + "Config")(**{**CASES[name], **more})


def train(model, steps: int = 4, seed: int = 1) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**tiny_batch(getattr(model, "base_model", model), seed=seed)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def batch_of(model):
    return tiny_batch(model, seed=5)


@cases
@pytest.mark.parametrize("family", ["llama", "qwen2", "bert"])
def test_steps_equal_trimtabs_own(name, family):
    plain, inside = MODELS[family](), MODELS[family]()
    methods.find(name)(**CASES[name]).apply(plain, PLACE)
    model = get_peft_model(inside, config(name))
    batch = batch_of(inside)
    assert torch.equal(logits(model, batch), logits(MODELS[family](), batch)), "nothing changes before training"
    kind = tiny_batch(plain)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (plain, model)]
    for _ in range(3):
        losses = []
        for made, optimizer in zip((plain, model), optimizers, strict=True):
            loss = made(**kind).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == losses[1]


@cases
def test_saved_and_loaded_it_computes_the_same(name, tmp_path):
    model = get_peft_model(MODELS["llama"](), config(name))
    train(model)
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found["peft_type"] == name.upper() and found["r" if "r" in found else "density"]
    again = PeftModel.from_pretrained(MODELS["llama"](), tmp_path)
    batch = batch_of(model.base_model.model)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert not any(p.requires_grad for p in again.parameters() if p.numel())
    more = PeftModel.from_pretrained(MODELS["llama"](), tmp_path, is_trainable=True)
    assert train(more, 3)[-1] < train(model, 1)[0] + 1


@cases
def test_several_adapters_are_switched_disabled_and_deleted(name):
    base = MODELS["llama"]()
    batch = batch_of(base)
    bare = logits(base, batch)
    model = get_peft_model(base, config(name))
    train(model, seed=1)
    first = logits(model, batch)
    model.add_adapter("second", config(name))
    model.set_adapter("second")
    assert torch.equal(logits(model, batch), bare)
    train(model, seed=2)
    second = logits(model, batch)
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first) and not torch.equal(second, first)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), bare)
    model.base_model.set_adapter(["default", "second"])
    assert not torch.equal(logits(model, batch), first) and not torch.equal(logits(model, batch), second)
    model.base_model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model, batch), second)


@cases
def test_unloaded_the_model_is_what_it_was(name):
    model = MODELS["llama"]()
    model.requires_grad_(False)  # as PEFT leaves it
    before, weights = snapshot(model), values(model)
    wrapped = get_peft_model(model, config(name))
    train(wrapped)
    again = wrapped.unload()
    assert again is model
    after = snapshot(model)
    assert after["text"] == before["text"] and after["hooks"] == before["hooks"]
    assert all(torch.equal(weights[key], tensor) for key, tensor in values(model).items())


@merged_cases
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_merged_it_computes_the_same(name, precision):
    base = MODELS["llama"]()
    if precision == "nf4":
        base = quantise(base.to(torch.bfloat16), dtype=torch.bfloat16)
    model = get_peft_model(base, config(name))
    train(model)
    batch = batch_of(base)
    before = logits(model, batch)
    close = {"atol": 1e-4} if precision == "fp32" else {"atol": 0.15, "rtol": 0.05}
    if precision == "fp32":
        weights = {
            key: tensor.clone() for key, tensor in base.state_dict().items() if key.endswith("base_layer.weight")
        }
        model.merge_adapter()
        assert torch.allclose(logits(model, batch), before, **close)
        model.unmerge_adapter()
        assert torch.equal(logits(model, batch), before)
        assert all(torch.equal(weights[key], base.state_dict()[key]) for key in weights)
    plain = model.merge_and_unload()
    assert not any(isinstance(module, ours.LinearLayer) for module in plain.modules())
    assert torch.allclose(logits(plain, batch), before, **close)


@pytest.mark.parametrize("name", ["parallel_adapter", "meft"])
def test_what_cannot_be_merged_says_so(name):
    model = get_peft_model(MODELS["llama"](), config(name))
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()


def test_entries_are_chosen_by_data():
    model = get_peft_model(MODELS["llama"](), config("senszoq", score="fisher"))
    layer = next(m for m in model.modules() if isinstance(m, ours.LinearLayer)).adapters["default"]
    before = layer.columns.clone()
    model.base_model.calibrate([tiny_batch(model.base_model.model, seed=seed) for seed in (1, 2)])
    assert not torch.equal(before, layer.columns) or len(before) != len(layer.columns)
    assert train(model)[-1] < train(get_peft_model(MODELS["llama"](), config("senszoq")), 1)[0]


MISFITS = [
    ("paca", {"reselect_every": 3}, "only trimtab's own training"),
    ("meft", {"router": "switch", "probes": 1}, "own training"),
    ("paca", {"target_modules": ["nothing"]}, "nothing"), ("paca", {"r": 0}, "r is the number"),
    ("edora", {"r": 400}, "its rank is at most"), ("meft", {"experts": 90}, "64 pairs"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "said"), MISFITS, ids=str)
def test_mistakes_are_refused(name, fields, said):
    model = MODELS["llama"]()
    before = snapshot(model)
    with pytest.raises(BadInput, match=said):
        get_peft_model(model, config(name, **fields))
    assert snapshot(model)["text"] == before["text"]


def test_tables_are_not_shared_between_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(BadInput, match="shares a table between processes"):
        get_peft_model(MODELS["llama"](), config("meft"))


def test_an_edora_of_another_base_is_refused(tmp_path):
    get_peft_model(MODELS["llama"](), config("edora")).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="singular vectors"):
        PeftModel.from_pretrained(MODELS["llama"](seed=3), tmp_path)


# --- trainers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def args(kind: type, output: Path, **more):
    return kind(str(output), per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to="none",
                use_cpu=True, disable_tqdm=True, seed=0, **more)  # fmt: skip


@pytest.mark.parametrize("name", ["paca", "parallel_adapter"])
def test_trainer_resumes_exactly(name, world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world / "llama")
    ids = tokenizer("paris is in the country of france", return_tensors="pt").input_ids
    rows = [{"input_ids": ids[0], "labels": ids[0]}] * 8

    def run(output: Path, **resume):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(world / "llama"), config(name))
        trainer = Trainer(model, args(TrainingArguments, output, max_steps=4, save_steps=2), train_dataset=rows)
        trainer.train(**resume)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    whole = run(tmp_path / "run")
    assert run(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run/checkpoint-2")) == whole
    assert whole[-1] < whole[0]


def plain_loop(world: Path, name: str, fields: dict, rows: list[str], steps: int) -> list[float]:
    """Thirty lines of PyTorch: a patch, an optimizer, rows in order."""
    tokenizer = AutoTokenizer.from_pretrained(world / "llama")
    model = AutoModelForCausalLM.from_pretrained(world / "llama", dtype=torch.float32)
    surgery = methods.find(name)(**fields).apply(model, PLACE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    surgery.begin(steps)
    for step in range(steps):
        surgery.before_step(step)
        batch = tokenizer(rows[2 * step : 2 * step + 2], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1e9)
        optimizer.step()
        optimizer.zero_grad()
        surgery.after_step(step, optimizer)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["paca", "edora", "parallel_adapter", "meft"])
def test_three_ways_give_the_same_losses(name, world, tmp_path):
    """trimtab's command, SFTTrainer with our config, and a plain loop."""
    texts = [f"the country of {place} is france" for place in ("paris", "lyon", "madrid", "paris")] * 2
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    same = {
        "max_steps": 4, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 1e9, "weight_decay": 0.0,
        "train_sampling_strategy": "sequential", "max_length": 48,
    }  # fmt: skip
    fields = CASES[name] | ({"experts": 4, "probes": 4, "k": 64} if name == "meft" else {})  # no choice that could flip
    keys = tree(world, tmp_path / "run", {name: fields}, logging_steps=1, **same)
    trimtab.Recipe.from_dict({**keys, "data": {"train": str(tmp_path / "texts.jsonl")}}).train()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    command = [line["loss"] for line in lines if "loss" in line]

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(world / "llama", dtype=torch.float32),
        args(SFTConfig, tmp_path / "sft", bf16=False, **same),
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        processing_class=AutoTokenizer.from_pretrained(world / "llama"), peft_config=config(name, **fields),
    )  # fmt: skip
    trainer.train()
    library = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    eos = AutoTokenizer.from_pretrained(world / "llama").eos_token
    loop = plain_loop(world, name, fields, [text + eos for text in texts], 4)
    assert command == pytest.approx(loop, abs=1e-6) and library == pytest.approx(loop, abs=1e-6)
    assert loop[-1] < loop[0]


def test_grpo_trains_a_tuner_of_ours(world, tmp_path):
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(world / "llama", dtype=torch.float32),
        [lambda completions, **_: [float(len(text)) for text in completions]],
        args(GRPOConfig, tmp_path, bf16=False, max_steps=2, num_generations=2, max_completion_length=8),
        train_dataset=Dataset.from_list([{"prompt": "paris is in"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(world / "llama"), peft_config=config("paca"),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_process_must_import_it_first(world, tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(world / "llama"), config("paca")).save_pretrained(tmp_path)
    code = f"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({str(tmp_path)!r})"
    run = [subprocess.run([sys.executable, "-c", first + code], capture_output=True, text=True)
           for first in ("", "import trimtab.integrations.peft; ")]  # fmt: skip
    assert run[0].returncode and "PACA" in run[0].stderr
    assert run[1].returncode == 0, run[1].stderr
