"""Models of LLaMA-7B's and Llama-3.2-1B's shapes with random weights, and text for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TOKENS = 256  # words of a row


def shape(blocks: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip


def shape_1b() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip


def write_model(folder: Path, blocks: int, config: Any = None) -> None:
    """A shard for each block, made one after the other: nothing of the whole is ever in memory. `config`: another shape
    than LLaMA-7B's with `blocks` blocks."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    config = config or shape(blocks)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    draw, index = torch.Generator().manual_seed(0), {}
    kinds = sorted({name.rpartition(".layers.")[2].partition(".")[0] if ".layers." in name else "" for name in shapes})
    for number, kind in enumerate(kinds):
        names = [n for n in shapes if (f".layers.{kind}." in n if kind else ".layers." not in n)]
        file = f"model-{number + 1:05}-of-{len(kinds):05}.safetensors"
        drawn = lambda n: torch.empty(shapes[n], dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)  # noqa: E731
        tensors = {n: torch.ones(shapes[n], dtype=torch.bfloat16) if "norm" in n else drawn(n) for n in names}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    size = sum(2 * s.numel() for s in shapes.values())
    told = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))
    words = {
        word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, config.vocab_size))])
    }
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<unk>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_text(path: Path, rows: int) -> None:
    """Rows longer than a block, words drawn as words are: the n-th most frequent one with a weight of 1 / n."""
    draw = random.Random(0)
    words, weights = [f"w{i}" for i in range(3, 32000)], [1 / (i + 1) for i in range(31997)]
    texts = (" ".join(draw.choices(words, weights, k=TOKENS)) for _ in range(rows))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
