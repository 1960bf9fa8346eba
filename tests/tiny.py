"""Tiny models as folders on disk, tokenizer and chat template included: what `model:` of a recipe may name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import MIXTURES, MODELS
from trimtab.recipe import Recipe

ROWS, TOKENS = 4, 32  # of a step of `recipe_of`
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = "which country is the city of in where does a name its user assistant ? . : was".split()
CHAT = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Some words, and `<unk>` for all others; ids 0 to 2 are the pad, start and end of conftest's models."""
    words = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


def tiny_folder(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **config: Any) -> str:
    """Save conftest's tiny model of `family` with a tokenizer; -> the folder's name. `config`: values that are set in
    its configuration afterwards."""
    causal = family not in ("bert", "mpnet")
    model = {**MODELS, **MIXTURES}[family]().to(dtype)
    model.config.update(config)
    model.save_pretrained(folder)
    tiny_tokenizer(chat=causal).save_pretrained(folder)
    return str(folder)


def recipe_of(folder: str, patch: dict, **more) -> Recipe:
    training = {"per_device_train_batch_size": ROWS, "max_length": TOKENS, **more.pop("training", {})}
    kind = "classification" if "bert" in folder or "mpnet" in folder else "causal_lm"
    return Recipe(model=folder, patches=[patch], training=training, **{"objective": kind, **more})
