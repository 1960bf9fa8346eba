"""Faults that a user makes before or while training: exit code 2, and the row or the field is named."""

from __future__ import annotations

import json

import pytest
import transformers

from helpers_load import tiny_bert
from helpers_reply import CHATML, SKY, byte_folder, learned
from helpers_run import write_rows
from trimtab.errors import BadInput
from trimtab.model.limits import learned_positions
from trimtab.recipe import Recipe

NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML.removeprefix("{% for m in messages %}")
)
SHORT = {"family": "GPT2", "max_position_embeddings": 64}
TEXTS = [{"text": "one"}, {"text": "two"}]
PAIRS = [{"prompt": "a", "completion": "b"}]

# name: (rows, the model, data, training, what the message says)
FAULTS = {
    "system role": (SKY, {"template": NO_SYSTEM}, {"system": "be short"}, {},
                    r"rows.jsonl, line 1 through the chat template: .*System role not supported"),
    "system role in the third row": (
        [*[{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2,
         {"messages": [{"role": role, "content": "c"} for role in ("system", "user", "assistant")]}],
        {"template": NO_SYSTEM}, {}, {}, "rows.jsonl, line 3 through the chat template"),
    "longer than learned positions": (
        [*SKY, {"question": "x" * 70, "answer": "y"}], SHORT, {}, {}, r"data.train, row 3: .*learned 64 positions"),
    "a token beyond the embeddings": (
        SKY, {"vocab_size": 257, "pad_token_id": 0}, {}, {}, r"data.train, row 1: .*token 258.*257 tokens"),
    "evaluation without a test": (SKY, {}, {"test": None}, {"eval_strategy": "steps"}, "names no data.test"),
    "padding-free": (TEXTS, {}, {}, {"padding_free": True}, "padding_free"),
    "assistant_only_loss on texts": (TEXTS, {}, {}, {"assistant_only_loss": True}, "not conversations"),
    "assistant_only_loss on pairs": (PAIRS, {}, {}, {"assistant_only_loss": True}, "not conversations"),
    "assistant_only_loss without marks": (SKY, {}, {}, {"assistant_only_loss": True}, "does not mark"),
    "liger": (SKY, {}, {}, {"use_liger_kernel": True}, "use_liger_kernel: True: trimtab has its own fused operations"),
    "empty text": ([*TEXTS, {"text": ""}], {}, {}, {}, "rows.jsonl, line 3: text is empty"),
    "no batch": (SKY, {}, {}, {"dataloader_drop_last": True}, "2 rows are fewer than one batch of 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_cannot_be(tmp_path, name):
    rows, model, data, training, words = FAULTS[name]
    with pytest.raises(BadInput, match=words) as told:
        learned(tmp_path, byte_folder(tmp_path / "m", **model), rows, data=data, training={"max_steps": 1, **training})
    assert told.value.exit_code == 2 and not (tmp_path / "run" / "adapter").exists()


def test_what_is_like_these_faults_and_none(tmp_path):
    rows = [*SKY, {"question": "x" * 70, "answer": "y"}]
    fits = {"max_steps": 1, "max_length": 64, "dataloader_drop_last": True, "per_device_train_batch_size": 2}
    folder = byte_folder(tmp_path / "m", **SHORT)
    learned(tmp_path, folder, rows, data={"too_long": "cut"}, training={**fits, "eval_strategy": False})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 1


def test_a_test_row_is_named_as_one(tmp_path):
    recipe = learned(tmp_path, byte_folder(tmp_path / "m", **SHORT), SKY, training={"max_steps": 1})
    write_rows(tmp_path / "rows.jsonl", [*SKY, {"question": "x" * 70, "answer": "y"}])
    with pytest.raises(BadInput, match="data.test, row 3"):
        recipe.evaluate()


def test_a_classifier_has_learned_positions(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"text": "film " * size, "label": size % 2} for size in (2, 3, 600)])
    recipe = Recipe(
        model=str(tiny_bert(tmp_path / "bert")), data=str(path), patches=["full"], objective="classification",
        training={"max_steps": 1, "max_length": 700}, engine={"allocator": "none"}, output=str(tmp_path / "run"),
    )  # fmt: skip
    with pytest.raises(BadInput, match="data.train, row 3: it has 602 tokens, and the model has learned 512 positions"):
        recipe.train()


@pytest.mark.parametrize("family, config, places", [
    ("Llama", {}, None), ("GPT2", {"n_positions": 32}, 32), ("OPT", {"max_position_embeddings": 32}, 32),
    ("Roberta", {"max_position_embeddings": 34, "pad_token_id": 1}, 32), ("GPTJ", {"n_positions": 32}, 32),
])  # fmt: skip
def test_learned_positions(family, config, places):
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "rotary_dim": 4}
    made = transformers.AutoModel.from_config(getattr(transformers, f"{family}Config")(**small, **config))
    assert learned_positions(made) == places
