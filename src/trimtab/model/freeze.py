"""Freezes the base before a patch is trained, and keeps its 4-bit weights in the layout that supports training.

bitsandbytes has a second layout of 4-bit weights. On a CPU with AVX512-BF16, `Linear4bit` repacks its weight the first
time it runs in eval mode on an input without gradients. That layout rounds the scales to bf16, and its product returns
no gradient of the input: a model that was evaluated once and then trained in eval mode, or dequantised by
`dequantize_4bit`, is silently wrong (bitsandbytes 0.50). While replies are generated, model/packed.py packs weights
in a way that it can undo.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import BadInput
from .surgery import EXCLUSIVE, Swaps, is_patch


def freeze_base(model: nn.Module, swaps: Swaps) -> None:
    """Freezes every parameter that is not a patch's, before any other change; `swaps` restores the flags."""
    if why := getattr(model, EXCLUSIVE, ""):
        raise BadInput("apply a second trained patch", why, "Keep one of the two")
    keep_trainable_layout(model, swaps)
    ours = {id(p) for module in model.modules() if is_patch(module) for p in own_parameters(module)}
    for parameter in model.parameters():
        if id(parameter) not in ours and parameter.requires_grad:
            swaps.set_requires_grad(parameter, False)


def own_parameters(layer: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters of a wrapper, except those of the module that it wraps (`base`; `base_layer` in peft)."""
    wrapped = (getattr(layer, name, None) for name in ("base", "base_layer"))
    base = {id(p) for module in wrapped if isinstance(module, nn.Module) for p in module.parameters()}
    return (p for p in layer.parameters() if id(p) not in base)


def keep_trainable_layout(model: nn.Module, swaps: Swaps) -> None:
    """Unpacks each 4-bit weight that was packed for inference, and prevents packing until `swaps` are undone."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            swaps.set_attribute(module, "support_avx512bf16_for_cpu", False)
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                module.state_dict()  # bitsandbytes unpacks before it writes weights out
