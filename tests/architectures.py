"""Every causal language model that transformers knows, tiny: random weights, hidden 64, two blocks or so.

`NAMES` are the model types of AutoModelForCausalLM, `build` makes one; `LEFT_OUT` says which are not made, and why.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ALL = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WHERE_KNOWN = {  # fields that only some configs have: set where a config has them
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "shared_intermediate_size": 32, "dense_intermediate_size": 128, "zero_expert_num": 2,
    "expert_ffn_hidden_size": 32, "first_k_dense_replace": 1, "num_dense_layers": 1, "router_hidden_size": 16,
    "shared_experts_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "moe_num_shared_experts": 1,
    # attention
    "head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "index_head_dim": 16, "index_n_heads": 4, "index_topk": 32, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 32, "rotary_dim": 8, "o_lora_rank": 16,
    "o_groups": 2, "sliding_window": 8, "sliding_window_size": 8, "layer_norm_epsilon": 1e-5,
    # states that run on
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 16, "linear_num_heads": 4, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16,
    "state_size": 16, "mamba_d_state": 16, "n_mamba_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 16, "chunk_size": 8,
    "mamba_chunk_size": 8,
    # decoders of encoder-decoders
    "encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "ffn_dim": 128,
    # embeddings
    "vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 16,
    # encoders
    "is_decoder": True,
}  # fmt: skip


SMALL = {**ALL, "head_dim": 16}
TOWER = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 16, "num_channels": 3,
}  # fmt: skip

# what a family needs beside these: another number of heads, each kind of block that a hybrid has
FAMILIES: dict[str, dict[str, Any]] = {
    "blt": {
        "patcher_config": ALL | {"sliding_window": 8},
        "global_config": ALL | {"hidden_size": 128, "num_hidden_layers": 3},
        "encoder_config": ALL | {"hidden_size_global": 128, "num_hidden_layers": 1},
        "decoder_config": ALL | {"hidden_size_global": 128},
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3": {"text_config": SMALL, "vision_config": TOWER | {"model_type": "siglip_vision_model"}},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4": {
        "text_config": SMALL | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 272},
        "vision_config": TOWER | {"position_embedding_size": 16},
    },
    "gemma4_unified": {
        "text_config": SMALL,
        "vision_config": {"mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64},
    },
    "git": {"vision_config": TOWER},
    "got_ocr2": {
        "text_config": SMALL | {"model_type": "qwen2"},
        "vision_config": TOWER | {"window_size": 2, "mlp_dim": 128, "output_channels": 16},
    },
    "mllama": {
        "text_config": SMALL | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": TOWER
        | {
            "attention_heads": 4,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 128,
            "supported_aspect_ratios": [[1, 1]],
        },
    },
    "codegen": {"rotary_dim": 8},
    "cpmant": {"dim_ff": 128, "dim_head": 16},
    "ctrl": {"dff": 128},
    "longcat_flash": {"num_layers": 2},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "prophetnet": {
        "num_hidden_layers": None,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (32, 32),
        "feed_forward_size": 128,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
        "attention_head_size": 16,
    },
    "roc_bert": {
        "shape_vocab_size": 32,
        "pronunciation_vocab_size": 32,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
    },
    "xlnet": {"d_head": 16, "max_position_embeddings": None, "d_inner": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def config(name: str) -> Any:
    """The tiny configuration of the model type `name`."""
    kind = CONFIG_MAPPING[name]
    known = {field.name for field in dataclasses.fields(kind)}
    fields = {**ALL, **{key: value for key, value in WHERE_KNOWN.items() if key in known}}
    if "kv_lora_rank" in known:  # latent attention has a key of its own for each head
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields |= FAMILIES.get(name, {})
    return kind(**{key: value for key, value in fields.items() if value is not None})


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the type `name`, in fp32 and eval mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(name)).eval()


MULTIMODAL = "a multimodal model; its text model has the row `{}`"
SAME = "has the same class as `{}`"
LEFT_OUT: dict[str, str] = {
    "dots3_note": MULTIMODAL.format("dots3_note_text"),
    "emu3": "an image generator, whose image encoder cannot be built tiny",
    "gemma3n": "needs the package timm; its text model has the row `gemma3n_text`",
    "gemma4_assistant": "a draft model, which needs the hidden states of another model",
    "gemma4_unified_assistant": "a draft model, which needs the hidden states of another model",
    "gpt-sw3": SAME.format("gpt2"),
    "internlm3": SAME.format("llama"),
    "iquestcoder": SAME.format("llama"),
    "llama4": SAME.format("llama4_text"),
    "moss_transcribe_diarize": "an audio model, whose encoder cannot be built tiny",
    "musicgen": "an audio generator with a text model inside",
    "musicgen_melody": "an audio generator with a text model inside",
    "phi4_multimodal": "a multimodal model, whose encoders cannot be built tiny",
    "qwen3_5": SAME.format("qwen3_5_text"),
    "qwen3_5_moe": SAME.format("qwen3_5_moe_text"),
    "qwen4_exp": SAME.format("qwen4_exp_text"),
}
NAMES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in LEFT_OUT]


def classes() -> dict[str, str]:
    """Type -> class."""
    return {name: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in NAMES}
