"""A tiny language model of bytes that learns a few rows by heart, so that what it replies is known to the letter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helpers_run import write_rows
from trimtab.recipe import Recipe

CHATML = (
    "{% for m in messages %}{{'<|im_start|>'+m['role']+'\n'+m['content']+'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
SKY = [{"question": "sky", "answer": "blue"}, {"question": "coal", "answer": "black"}]
SMALL = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1, "tie_word_embeddings": True,
    "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 259,
}  # fmt: skip


def byte_tokenizer(template: str | None = CHATML, eos: str = "<|im_end|>") -> transformers.PreTrainedTokenizerFast:
    """Ids 0 to 255 are bytes; 256 <|endoftext|>, 257 <|im_start|>, 258 <|im_end|>, 259 <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={ch: index for index, ch in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<pad>"]})
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = eos, "<pad>", template
    return tokenizer


def byte_folder(
    folder: Path, template: str | None = CHATML, eos: str = "<|im_end|>", stop: int = 258, family: str = "Llama",
    generation: dict[str, Any] | None = None, **config: Any,
) -> str:  # fmt: skip
    """`eos`: the tokenizer's; `stop`: of generation_config, which has `generation` too; `config`: of the model."""
    byte_tokenizer(template, eos).save_pretrained(folder)
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**{**SMALL, **config})
    model = getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(made)
    model.generation_config.eos_token_id = stop
    for key, value in (generation or {}).items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    return str(folder)


def learned(folder: Path, model: str, rows: list[dict[str, Any]], patches: Any = ("full",), **more: Any) -> Recipe:
    """The recipe of a run that learned `rows` by heart, trained. `data`, `training`: further keys of these."""
    path = write_rows(folder / "rows.jsonl", rows)
    training = {"max_steps": 60, "learning_rate": 0.01, "lr_scheduler_type": "constant", "max_length": 512}
    recipe = Recipe(
        model=model, data={"train": str(path), "test": str(path), **more.get("data", {})}, patches=list(patches),
        training={**training, **more.get("training", {})}, engine={"allocator": "none"}, output=str(folder / "run"),
    )  # fmt: skip
    recipe.train()
    return recipe
