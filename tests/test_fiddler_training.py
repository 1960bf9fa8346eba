"""Training over Fiddler: the run is the one without it, inside its plan, and its adapter is an ordinary one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers_load import tiny_tokenizer
from helpers_run import metrics, rows, write_rows
from trimtab.errors import BadInput
from trimtab.inference.evaluate import evaluate
from trimtab.inference.export import export
from trimtab.inference.generate import generate
from trimtab.recipe import Recipe
from trimtab.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore")
ASK = ["which country is paris in ?", "madrid is in the country of ?"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2, vocab_size=64, pad_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "facts.jsonl", rows())
    return folder


def run(world: Path, output: Path, patches: list, keys: dict | None = None, **training) -> Recipe:
    data = {"train": str(world / "facts.jsonl"), "test": str(world / "facts.jsonl")}
    return Recipe.from_dict({
        "model": str(world / "model"), "data": data, "patches": patches, "output": str(output),
        "training": {"per_device_train_batch_size": 2, "max_length": 48, "learning_rate": 1e-2, "max_steps": 4,
                     **training},
        "engine": {"allocator": "none"}, **(keys or {}),
    })  # fmt: skip


FIDDLER = {"fiddler": {"cache": 1e-4}}
ATTENTION = {"r": 4, "targets": "q_proj,v_proj"}


@pytest.mark.parametrize("patch", [{"lora": ATTENTION}, {"paca": ATTENTION}], ids=["lora", "paca"])
@pytest.mark.parametrize("training", [{}, {"activation_checkpointing": True}], ids=["plain", "checkpointing"])
def test_a_run_is_the_one_without_it(world, tmp_path, patch, training):
    plain = run(world, tmp_path / "plain", [patch], **training)
    over = run(world, tmp_path / "over", [patch, FIDDLER], {"budget": {"fast": "6GiB"}}, **training)
    train(plain)
    record = train(over)
    losses, own = ([row[1] for row in metrics(tmp_path / name)] for name in ("over", "plain"))
    assert losses == pytest.approx(own, abs=0.02) and len(set(own)) == 4
    (name,) = patch
    config = json.loads((tmp_path / "over" / "adapter" / "trimtab.json").read_text())
    assert config["patch"] == name and "parts" not in config
    planned, measured = record["predicted"]["bytes"], record["measured"]["bytes"]
    for kind in ("experts", "experts in the slow tier", "mapped weights"):
        assert measured[kind] == planned[kind] > 0
    live = sum(size for kind, size in measured.items() if "slow" not in kind and "mapped" not in kind)
    assert live == record["measured"]["live_peak_bytes"]
    assert 0.97 * live <= record["predicted"]["live_peak_bytes"] <= 1.3 * live, "a bound: one expert has all tokens"


def test_its_adapter_is_loaded_with_it_without_it_and_by_peft(world, tmp_path):
    over = run(world, tmp_path / "over", [FIDDLER, {"lora": ATTENTION}])
    train(over)
    plain = run(world, tmp_path / "over", [{"lora": ATTENTION}])
    with_it, without = (list(generate(each, ASK, max_new_tokens=6)) for each in (over, plain))
    assert with_it == without
    for form in ("peft", "merged"):
        export(over, form)
    ids = torch.tensor([[5, 9, 12, 20]])
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(world / "model").eval()
        peft = PeftModel.from_pretrained(base, tmp_path / "over" / "peft")(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "over" / "merged").eval()(input_ids=ids).logits
    assert torch.allclose(peft.float(), merged.float(), atol=0.1)
    scores = [evaluate(each)["metrics"] for each in (over, plain)]
    assert scores[0] == pytest.approx(scores[1], rel=0.02)


def test_a_resumed_run_is_the_whole_one(world, tmp_path):
    patches, saved = [FIDDLER, {"lora": ATTENTION}], {"save_strategy": "steps", "save_steps": 2}
    train(run(world, tmp_path / "whole", patches, **saved))
    output, checkpoint = tmp_path / "whole", tmp_path / "whole" / "checkpoint-2"
    assert not list(checkpoint.glob("*fiddler*")) and (checkpoint / "adapter_model.safetensors").is_file()
    whole = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    (output / "run.json").unlink()
    for folder in ("adapter", "checkpoint-4"):  # as a kill after the second step leaves it
        shutil.rmtree(output / folder)
    train(run(world, output, patches, {"resume": True}, **saved))
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_stand_ins_serve_replies_and_not_training(world, tmp_path):
    stand_in = {"fiddler": {"cache": 0.0, "stand_in": "nf4", "rows": 4}}
    plain, over = (run(world, tmp_path / name, [fiddler, {"lora": ATTENTION}])
                   for name, fiddler in (("plain", {"fiddler": {"cache": 0.0}}), ("over", stand_in)))  # fmt: skip
    record = train(over)
    train(plain)
    losses, own = ([row[1] for row in metrics(tmp_path / name)] for name in ("over", "plain"))
    assert losses == own and not record["measured"]["bytes"].get("experts")
    said: list[str] = []
    list(generate(over, ASK, max_new_tokens=3, say=said.append))
    assert any("KL" in line for line in said) and any(" B read per token" in line for line in said)


def test_popular_counts_the_rows_of_the_run(world, tmp_path):
    popular = {"fiddler": {"residency": "popular", "cache": 1e-4, "rows": 6}}
    record = train(run(world, tmp_path / "run", [popular, {"lora": ATTENTION}]))
    assert 0 < record["measured"]["expert_hit_rate"] < 1 and record["measured"]["expert_up_bytes_per_step"] > 0
    with pytest.raises(BadInput, match=r"data\.train"):
        list(generate(run(world, tmp_path / "none", [popular], {"data": {}}), ASK, max_new_tokens=2))
