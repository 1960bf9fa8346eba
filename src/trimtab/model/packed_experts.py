"""Experts in 4 bits: each matrix of a record as NF4 in blocks of 64 values, by bitsandbytes.

A record takes 4.5 bits a weight. An expert is unpacked whenever it is used, in the forward and in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..tiered.experts import Shapes

BLOCK = 64
SCALES = ".absmax"


class Nf4:
    """The form of records in 4 bits (tiered/experts.py, `Form`)."""

    name = "nf4"

    def parts(self, shapes: Shapes) -> Shapes:
        """What a record has, from the tensors of an expert. Vectors (biases) stay as they are."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, (shape, dtype) in shapes.items():
            if len(shape) < 2:
                found[name] = (shape, dtype)
                continue
            count = shape[0] * shape[1]
            found[name] = ((-(-count // 2),), torch.uint8)
            found[name + SCALES] = ((-(-count // BLOCK),), torch.float32)
        return found

    def packed(self, tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        found: dict[str, Tensor] = {}
        for name, (shape, dtype) in shapes.items():
            tensor = tensors[name].to(dtype)
            if len(shape) < 2:
                found[name] = tensor
                continue
            codes, state = quantize_4bit(tensor.contiguous(), blocksize=BLOCK, quant_type="nf4")
            found |= {name: codes.flatten(), name + SCALES: state.absmax}
        return found

    def unpacked(self, parts: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

        found: dict[str, Tensor] = {}
        for name, (shape, dtype) in shapes.items():
            if len(shape) < 2:
                found[name] = parts[name]
                continue
            scales, device = parts[name + SCALES], parts[name].device
            state = QuantState(
                absmax=scales, shape=torch.Size(shape), code=get_4bit_type("nf4", device=device), blocksize=BLOCK,
                quant_type="nf4", dtype=dtype,
            )  # fmt: skip
            found[name] = dequantize_4bit(parts[name].view(-1, 1), state)
        return found
