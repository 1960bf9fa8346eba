"""bitsandbytes' second layout of 4-bit weights, and why a model that is trained must not be in it.

On a CPU with AVX512-BF16, `Linear4bit` re-packs its weight the first time it runs in eval mode on an input without
gradients. That layout rounds the scales to bf16, and its product passes no gradient back: a model that was evaluated
once and then trained in eval mode, or read by `dequantize_4bit`, is silently wrong (bitsandbytes 0.50).
"""

from __future__ import annotations

from torch import nn

from .surgery import Swaps


def keep_trainable_layout(model: nn.Module, swaps: Swaps) -> None:
    """Unpack each 4-bit weight that was packed for inference; bitsandbytes packs none until the way back."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            swaps.set_attribute(module, "support_avx512bf16_for_cpu", False)
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                module.state_dict()  # bitsandbytes unpacks before it writes weights out
