"""A tiny Llama and a tiny BERT, with a tokenizer of whole words, saved to a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "which country is in the of paris lyon france spain madrid a good bad film ? .".split()
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tiny_tokenizer(chat: str | None = CHAT, pad: bool = True) -> PreTrainedTokenizerFast:
    special = ["<unk>", "</s>", "<pad>", "[CLS]", "[SEP]", "<system>", "<user>", "<assistant>"]
    vocab = {word: index for index, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    if pad:
        tokenizer.pad_token = "<pad>"
    tokenizer.chat_template = chat
    return tokenizer


def tiny_llama(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, pad: bool = True, **other: int
) -> Path:
    """`other`: fields of the config, larger ones for example."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64,
    }  # fmt: skip
    config = LlamaConfig(**{**sizes, **other}, pad_token_id=None, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer(pad=pad).save_pretrained(folder)
    return folder


def tiny_bert(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer(chat=None).save_pretrained(folder)
    return folder
