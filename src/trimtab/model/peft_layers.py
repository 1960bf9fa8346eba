"""Layers of peft's LoRA, adapted: without the model's config, with an effective weight, and with our product."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .low_rank import Codes, LowRank

ADAPTER = "default"  # peft's name for the one adapter of a model


def bare(model: PreTrainedModel) -> nn.Module:
    """The model's modules without its config, so that peft takes the names as they are.

    From the config, peft would conclude that the gate_proj of a dense FFN or of a shared expert means stacked experts,
    and that Mamba's kernels cannot be adapted; these read the weight that `_Weighted` provides.
    """
    parts = nn.Module()
    vars(parts)["_modules"] = model._modules
    for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            setattr(parts, name, getattr(model, name))
    return parts


class _Weighted:
    """Mixed into the class of peft's layer: `weight` is the effective weight, for models that read it themselves."""

    @property
    def weight(self: Any) -> Tensor:
        base = self.get_base_layer().weight
        plain = not self.merged and not self.disable_adapters and not self.lora_variant
        return base + self.get_delta_weight(ADAPTER).to(base.dtype) if plain and base.is_floating_point() else base


@cache
def weighted(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Weighted, kind), {})


def forward_of(layer: nn.Module, codes: Codes | None, code_scale: float) -> Any:
    """peft's forward, with `LowRank` if the only active adapter is the plain one."""
    theirs = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = not args and not kwargs and not layer.disable_adapters and not layer.merged
        if not plain or layer.active_adapters != [ADAPTER] or not x.is_floating_point():
            return theirs(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        a_RI, b_OR = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        coded = codes is not None and layer.training and torch.is_grad_enabled()
        code_TM, v_D = codes.of(x) if coded else (None, None)
        return LowRank.apply(x, a_RI, b_OR, layer.base_layer, layer.scaling[ADAPTER], code_TM, v_D, code_scale)

    return forward


def dense(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A plain linear with the de-quantised weight of peft's `layer` and its adapter."""
    from peft.utils.integrations import dequantize_module_weight

    base, variant = layer.base_layer, layer.lora_variant.get(ADAPTER)
    weight_OI = dequantize_module_weight(base).float()
    if variant is None:
        weight_OI = weight_OI + layer.get_delta_weight(ADAPTER).float()
    else:
        weight_OI = variant.merge_safe(layer, ADAPTER, weight_OI)
    plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight_OI.detach().to(dtype), requires_grad=False)
    plain.bias = base.bias
    return plain
