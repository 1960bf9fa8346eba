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


def write_gguf(path: Path, folder: str) -> Path:
    """The tiny Llama in `folder` as a GGUF file, as llama.cpp would write it."""
    import gguf
    import numpy

    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), byte_tokenizer()
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    known = [*tokenizer.convert_ids_to_tokens(list(range(260))), "qz"]  # a merge, since a file without is no BPE's
    tokens = known + [f"<unused{index}>" for index in range(config.vocab_size - len(known))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1 if index < 256 or token == "qz" else 3 for index, token in enumerate(tokens)])
    writer.add_token_merges(["q z"])
    writer.add_eos_token_id(258)
    writer.add_bos_token_id(256)
    writer.add_pad_token_id(259)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        values = tensor.float().numpy()
        if (count := heads.get(stem.rpartition(".")[2])) is not None:  # llama.cpp's order of the rotary halves
            values = values.reshape(count, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        if stem != "lm_head":
            writer.add_tensor(f"{names.get_name(stem)}.weight", numpy.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
