"""Tiny models and tokenizers of the families that a GGUF file can have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.tokenization_utils_base import generate_merges

from helpers_reply import CHATML

TEXTS = ["the cat sat on the mat, and the dog's hat was flat", "it's 1234 or 99 apples; don't count", "  two  spaces",
         "def f(x):\n\treturn x ** 2\n\n", "Paris is the capital of France. ÄÖ ünï 世界"]  # fmt: skip
PROBES = [
    *TEXTS,
    "<|im_start|>user\nHello there<|im_end|>\n",
    "unseen: Ωμέγα ☃ 🙂",
    "a",
    "tab\tand\r\nlines\n\n\n  end ",
]
DIGITS = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(regex: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


def bpe_on_bytes(steps: Any = (), ignore_merges: bool = False) -> transformers.PreTrainedTokenizerFast:
    """BPE on bytes, after `steps` (none: GPT-2's). <|endoftext|>, <|im_start|>, <|im_end|> are 0, 1, 2."""
    inner = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = list(steps) or [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def pieces(kind: str = "Llama") -> Any:
    """BPE of SentencePiece's kind, as `kind`Tokenizer: unk, bos, eos and pad, 256 bytes, characters, and merges of all
    parts of each token."""
    trained = Tokenizer(models.BPE())
    spaced = ["▁" + text.replace(" ", "▁") for text in TEXTS]
    trained.train_from_iterator(spaced * 3, trainers.BpeTrainer(vocab_size=140, show_progress=False))
    made = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    names = ["<unk>", "<s>", "</s>", "<pad>"] if kind == "Llama" else ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*names, *(f"<0x{byte:02X}>" for byte in range(256)), *(token for token, _ in made)]
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = generate_merges(vocab, {token: -index for token, index in vocab.items()})
    tokenizer = getattr(transformers, f"{kind}Tokenizer")(vocab=vocab, merges=pairs, add_bos_token=True)
    if kind == "Llama":
        tokenizer.pad_token = "<pad>"
    return tokenizer


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2}  # fmt: skip
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}, lambda: bpe_on_bytes(DIGITS)),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}, bpe_on_bytes),
    "llama-2": ("Llama", {"rms_norm_eps": 1e-5}, pieces),
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
                pieces),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, lambda: bpe_on_bytes(split(QWEN))),
    "qwen3": ("Qwen3", {"head_dim": 128}, lambda: bpe_on_bytes(split(QWEN))),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 30.0, "final_logit_softcapping": 20.0},
               lambda: pieces("Gemma")),
    "gemma3": ("Gemma3", {**GEMMA, "num_hidden_layers": 6}, lambda: pieces("Gemma")),
}  # fmt: skip


def make(family: str, **changed: Any) -> tuple[Any, Any]:
    """-> (a model with random weights, none of them zero; its tokenizer)."""
    kind, config, tokenizer = FAMILIES[family]
    tokenizer = tokenizer()
    text = "Text" if kind == "Gemma3" else ""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    made = {**SMALL, "vocab_size": len(tokenizer) + 7, **ids, **config, **changed}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}{text}Config")(**made)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, tokenizer


def make_folder(folder: Path, family: str, **changed: Any) -> str:
    model, tokenizer = make(family, **changed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
