"""Packed rows: each document sees only itself, or packing is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn import functional as F

from byte_model import byte_folder, byte_tokenizer, tiny
from helpers_run import write_rows
from trimtab import Recipe
from trimtab.engine.packed_rows import PackedRows
from trimtab.engine.packing_probe import leak, pack_apart, packed_batch
from trimtab.errors import BadInput
from trimtab.inference.evaluate import evaluate
from trimtab.model.block_mask import block_mask
from trimtab.training.train import train

LFM2 = {"layer_types": ["conv", "full_attention"]}
MPT = {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2}
FALCON = {"alibi": True, "new_decoder_architecture": False, "multi_query": False}
# From transformers 5.24 on Falcon makes its mask from position ids, so its documents stay apart.
FALCON_PACKS = Version(transformers.__version__) >= Version("5.24")
KINDS = {  # class -> (fields, what becomes of its packed rows)
    "LlamaForCausalLM": ({}, "as they are"),
    "Gemma2ForCausalLM": ({"head_dim": 16, "sliding_window": 8}, "as they are"),
    "OPTForCausalLM": ({}, "mask"),
    "MptForCausalLM": (MPT, "mask"),
    "XGLMForCausalLM": ({}, "mask"),
    "BertLMHeadModel": ({"is_decoder": True}, "mask"),
    "BloomForCausalLM": ({}, "refused"),
    "FalconForCausalLM": (FALCON, "as they are" if FALCON_PACKS else "refused"),
    "Lfm2ForCausalLM": (LFM2, "refused"),
    "MambaForCausalLM": ({}, "refused"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_documents_stay_apart(name, dtype):
    fields, becomes = KINDS[name]
    model = tiny(name, **fields).to(dtype)
    rows = PackedRows(pad_token_id=259)
    random = torch.get_rng_state()
    if becomes == "refused":
        with pytest.raises(BadInput, match="Remove packing"):
            pack_apart(model, rows, 64)
        return
    note = pack_apart(model, rows, 64)
    assert ("explicit mask" in note) == (becomes == "mask") and (rows.block is not None) == (becomes == "mask")
    assert torch.equal(torch.get_rng_state(), random)
    # apart from the probe: documents of other lengths, in two rows, against each alone
    documents = [torch.arange(60 + 9 * i, 60 + 9 * i + size) for i, size in enumerate((9, 3, 5, 7))]
    examples = [
        {"input_ids": torch.cat(pair).tolist(), "labels": torch.cat(pair).tolist(), "seq_lengths": list(map(len, pair))}
        for pair in (documents[:2], documents[2:])
    ]
    batch = rows.torch_call(examples)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits.float()
        packed = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        alone = [
            F.cross_entropy(model(input_ids=d[None]).logits[0, :-1].float(), d[1:], reduction="sum") for d in documents
        ]
    wanted = sum(map(float, alone)) / sum(len(d) - 1 for d in documents)
    assert float(packed) == pytest.approx(wanted, abs=1e-4 if dtype == torch.float32 else 3e-2)


def test_a_mask_does_not_take_the_place_of_windows():
    """GPT-OSS needs an explicit mask, and its windows would be lost in it: only rows within a window are packed."""
    model = tiny("GptOssForCausalLM", sliding_window=32, num_local_experts=4, head_dim=16)
    assert "explicit mask" in pack_apart(model, PackedRows(pad_token_id=259), 32)
    for longest in (33, None):
        with pytest.raises(BadInput):
            pack_apart(model, PackedRows(pad_token_id=259), longest)


def test_the_mask():
    mask = block_mask(torch.tensor([[0, 1, 2, 0, 1]]), torch.float32)
    assert mask.shape == (1, 1, 5, 5)
    assert ((mask[0, 0] == 0).int().tolist()) == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip


def test_a_leak_is_seen():
    """Llama without position ids that restart: the probe says so, in fp32 and bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        rows = PackedRows(pad_token_id=259)
        rows.positions = False
        assert "sees the one before it" in leak(tiny("LlamaForCausalLM").to(dtype), rows)
        rows.positions = True
        assert leak(tiny("LlamaForCausalLM").to(dtype), rows) == ""
    batch = packed_batch(tiny("LlamaForCausalLM"), rows)
    assert (batch["labels"] == -100).any() and (batch["position_ids"] == 0).sum() > 2


def recipe(tmp_path: Path, model: str, **training) -> Recipe:
    data = write_rows(tmp_path / "n.jsonl", [{"prompt": f"n {i}", "completion": f" {i * i} sun"} for i in range(12)])
    return Recipe(
        model=model, data={"train": str(data), "test": str(data), "metrics": []}, output=str(tmp_path / "run"),
        patches=[{"lora": {"r": 2}}], engine={"allocator": "none"}, training={"max_steps": 2, **training},
    )  # fmt: skip


EVALUATED = {  # does it pack? and the right value of LFM2, which was computed apart
    "Lfm2ForCausalLM": (LFM2, False, 6.05984), "OPTForCausalLM": ({}, True, None),
    "BloomForCausalLM": ({}, False, None), "FalconForCausalLM": (FALCON, FALCON_PACKS, None),
}  # fmt: skip


def alone(folder: str) -> float:
    """The mean loss of the completions' tokens, a row at a time, by plain transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for i in range(12):
        prompt, whole = (torch.tensor(byte_tokenizer()(text)["input_ids"]) for text in (f"n {i}", f"n {i} {i * i} sun"))
        whole = torch.cat([whole, torch.tensor([258])])  # the tokenizer's end of a text
        with torch.no_grad():
            logits = model(input_ids=whole[None], attention_mask=torch.ones_like(whole[None])).logits[0]
        total += float(F.cross_entropy(logits[len(prompt) - 1 : -1], whole[len(prompt) :], reduction="sum"))
        count += len(whole) - len(prompt)
    return total / count


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_of_packed_rows(tmp_path, name):
    fields, packs, known = EVALUATED[name]
    model = byte_folder(tmp_path / "model", name, **fields)
    wanted = alone(model)
    assert known is None or wanted == pytest.approx(known, abs=1e-5)
    found = evaluate(recipe(tmp_path, model), base_only=True)
    assert found["metrics"]["loss"] == pytest.approx(wanted, abs=2e-5)
    packed = recipe(tmp_path, model, packing=True, max_length=64)
    if packs:
        assert evaluate(packed, base_only=True)["metrics"]["loss"] == pytest.approx(wanted, abs=2e-5)
        made = train(packed)  # its plan counts the mask
        assert made["steps"] == 2 and made["predicted"]["live_peak_bytes"] > 0
        return
    for verb in (lambda: evaluate(packed, base_only=True), lambda: train(packed)):
        with pytest.raises(BadInput, match="packing"):
            verb()
    assert not (tmp_path / "run" / "run.json").exists()
