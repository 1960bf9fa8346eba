"""Tiny models of any architecture, in folders with a byte tokenizer: what `model:` of a recipe may name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TINY = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1, "tie_word_embeddings": True,
    "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 259,
}  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte (0 to 255), then <|endoftext|>, <|im_start|>, <|im_end|>, <pad>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<pad>"]})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<pad>"
    return tokenizer


def tiny(name: str, config: str | None = None, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A random model of the class `name`, in fp32 and eval mode; `config`: its config's class, if it is not XConfig."""
    for head in ("ForCausalLM", "LMHeadModel"):
        family = name.removesuffix(head) if name.endswith(head) else name
        if family != name:
            break
    made = getattr(transformers, config or f"{family}Config")(**{**TINY, **fields})
    torch.manual_seed(seed)
    return getattr(transformers, name)(made).eval()


def byte_folder(folder: Path, name: str, config: str | None = None, **fields: Any) -> str:
    tiny(name, config, **fields).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
