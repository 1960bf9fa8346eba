"""What llama.cpp must be told of a model, under its own keys and names, and which models it computes alike.

A model is refused where llama.cpp would compute something else: another activation, another order of sliding windows, a
rope scaling that it does not know. Facts of the format: llama.cpp's docs and the `gguf` package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput

TANH = "gelu_pytorch_tanh"
OTHERWISE = "Use --to merged, and llama.cpp's own convert_hf_to_gguf.py on the folder"


@dataclass(frozen=True)
class Family:
    """`arch`: llama.cpp's name. `permuted`: it rotates neighbouring pairs of q and k, transformers halves.
    `shifted`: norms multiply by 1 + weight. `period`: every so manyth layer attends to everything; 0: no windows."""

    arch: str
    permuted: bool = False
    shifted: bool = False
    activation: str = "silu"
    tied: bool = False
    period: int = 0
    deep: int = 0  # number of layers at which llama.cpp scales queries by the width per head, not by the head's


FAMILIES = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", shifted=True, activation=TANH, tied=True),
    "gemma2": Family("gemma2", shifted=True, activation=TANH, tied=True, period=2, deep=46),
    "gemma3_text": Family("gemma3", shifted=True, activation=TANH, period=6, deep=62),
}
SCALES = {"default", "linear", "yarn", "llama3"}
YARN = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None,
        "truncate": True}  # fmt: skip


class Shape:
    """A model's text part in llama.cpp's terms. BadInput for a model that llama.cpp would compute differently."""

    def __init__(self, config: Any, asked: str = "export to gguf"):
        self.config, self.asked = config.get_text_config(), asked
        kind = self.config.model_type
        if kind not in FAMILIES:
            known = "Llama, Mistral, Qwen 2, Qwen 3 and Gemma 1 to 3"
            raise self.refused(f"its architecture is {kind}, and trimtab writes {known}", OTHERWISE)
        self.family = FAMILIES[kind]
        self.heads = self.config.num_attention_heads
        self.kv_heads = getattr(self.config, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        rope = self.config.rope_parameters or {}
        self.rope = rope.get("full_attention", rope)
        self.rope_of_windows = rope.get("sliding_attention")
        self._check()

    def refused(self, have: str, do: str = "Use --to merged") -> BadInput:
        return BadInput(self.asked, have, do)

    def _check(self) -> None:
        config, family = self.config, self.family
        act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", family.activation)
        if act != family.activation:
            raise self.refused(
                f"its activation is {act}, and llama.cpp computes {family.activation} in this architecture"
            )
        kind = self.rope.get("rope_type", "default")
        plain = {key for key, value in YARN.items() if self.rope.get(key, value) == value}
        if kind not in SCALES or (kind == "llama3" and family.arch != "llama") or (kind == "yarn" and plain != {*YARN}):
            raise self.refused(f"llama.cpp does not compute its rope scaling ({kind}, as config.json sets it)")
        if self.rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise self.refused("it rotates a part of each head only")
        if (self.rope_of_windows or {}).get("rope_type", "default") != "default":
            raise self.refused("it scales the positions of its sliding windows")
        if family.period:
            self._check_gemma()

    def _check_gemma(self) -> None:
        """Gemma 2 and 3: the order of windows and the scale of queries are fixed in llama.cpp."""
        config, family = self.config, self.family
        layers = config.num_hidden_layers
        whole = [kind == "full_attention" for kind in config.layer_types]
        if whole != [(index + 1) % family.period == 0 for index in range(layers)]:
            raise self.refused(
                f"llama.cpp expects full attention in every {family.period}th layer, and it has another order"
            )
        by_width = layers == family.deep
        width = config.hidden_size // self.heads if by_width else self.head_dim
        if config.query_pre_attn_scalar != width:
            have = f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp computes with {width}"
            raise self.refused(f"{have} in this architecture")
        if getattr(config, "use_bidirectional_attention", None):
            raise self.refused("its attention is not causal")

    @property
    def context(self) -> int:
        """The most tokens that llama.cpp computes as transformers does: where it has no sliding windows, one window."""
        config, window = self.config, getattr(self.config, "sliding_window", None)
        windows = not self.family.period and window and getattr(config, "use_sliding_window", True)
        kinds = getattr(config, "layer_types", None)
        if windows and (kinds is None or "sliding_attention" in kinds):
            return min(window, config.max_position_embeddings)
        return config.max_position_embeddings

    def describe(self, writer: Any) -> None:
        """Write the keys of the architecture into a gguf.GGUFWriter."""
        config, family, rope = self.config, self.family, self.rope
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
        writer.add_vocab_size(config.vocab_size)
        if (kind := rope.get("rope_type", "default")) in ("linear", "yarn"):
            import gguf

            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(float(rope["factor"]))
            if kind == "yarn":
                before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
                writer.add_rope_scaling_orig_ctx_len(int(before))
        if family.period:
            writer.add_sliding_window(config.sliding_window)
            if self.rope_of_windows:
                writer.add_float32(f"{family.arch}.rope.freq_base_swa", float(self.rope_of_windows["rope_theta"]))
        if family.arch == "gemma2" and config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if family.period and config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)

    def extra(self) -> dict[str, Tensor]:
        """Tensors that transformers computes: for Llama 3 what each frequency is divided by, (head_dim / 2,)."""
        if self.rope.get("rope_type", "default") != "llama3":
            return {}
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        plain = 1.0 / self.rope["rope_theta"] ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        return {"rope_freqs.weight": plain / scaled}

    def names(self) -> Names:
        return Names(self)

    def order(self, path: str, rows: int) -> Tensor | None:
        """The order in which the rows of the linear `path` are written, (rows,); None if it is the model's own.

        transformers rotates element i of a head with i + d / 2, llama.cpp's Llama 2 i with 2 i + 1.
        """
        leaf = path.rpartition(".")[2]
        if not self.family.permuted or leaf not in ("q_proj", "k_proj"):
            return None
        heads = self.heads if leaf == "q_proj" else self.kv_heads
        return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)

    def shift(self, path: str) -> float:
        """What is added to the weight of the module `path`."""
        return 1.0 if self.family.shifted and path.endswith("norm") else 0.0


class Names:
    """llama.cpp's names of a model's tensors."""

    def __init__(self, shape: Shape):
        import gguf

        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == shape.family.arch)
        self.table = gguf.get_tensor_name_map(arch, shape.config.num_hidden_layers)
        self.shape = shape

    def of(self, path: str, kind: str) -> str:
        """The name of `kind` ("weight" or "bias") of the module `path`. BadInput if llama.cpp has no such tensor."""
        name = self.table.get_name(path.replace("model.language_model.", "model.", 1))
        biased = self.shape.family.arch == "llama" or path.endswith(("q_proj", "k_proj", "v_proj"))
        if name is None or kind == "bias" and not biased:
            raise self.shape.refused(f"llama.cpp's {self.shape.family.arch} has no tensor for {path}.{kind}")
        return f"{name}.{kind}"
