"""Reads a block's mapped weights from their files while the block before it computes.

A mapped base larger than the free memory is read from the disk in each pass. The next weights are known: those of the
next block in a forward pass, those of the previous block in a backward pass. They are requested all at once, as rows of
a table are (tiered/prefetch.py), and only if they are not in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import recomputing
from ..memory.budget import ram
from ..memory.meter import file_ranges, is_mapped
from ..tiered.prefetch import Reader
from ..tiered.record import PAGE
from . import anatomy
from .surgery import Swaps

LARGE = 0.5  # a base larger than this share of the free memory is prefetched
LOOK = 2**22  # bytes between two pages that are checked for residence in memory


class Weights:
    """The weights of a block that are mapped from files."""

    in_place = True

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = list(tensors)
        ends = sorted((t.data_ptr() // PAGE * PAGE, t.data_ptr() + t.nbytes) for t in self.tensors)
        merged: list[tuple[int, int]] = []
        for low, high in ends:
            if merged and low <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(high, merged[-1][1])
            else:
                merged.append((low, high))
        self.spans = [(at, min(LOOK, high - at), 1) for low, high in merged for at in range(low, high, LOOK)]

    @property
    def nbytes(self) -> int:
        return sum(length for _, length, _ in self.spans)

    def pages(self, rows: Any, kinds: Any) -> tuple[list[Tensor], list[tuple[int, int, int]]]:
        """As TieredStore.pages: -> the tensors that keep the mapping alive, and its spans (address, bytes, 1)."""
        return self.tensors, self.spans


def read_weights_ahead(model: Any, swaps: Swaps, reader: Reader | None = None) -> list[Weights]:
    """Until `swaps` are undone, requests each block's mapped weights before a pass reaches it; -> the weights.

    Empty, without requests, if the weights are small compared with the free memory.
    """
    maps = file_ranges()
    stack = anatomy.blocks(model)[1]
    blocks = [Weights(p for p in block.parameters() if maps and is_mapped(p, maps)) for block in stack]
    if sum(block.nbytes for block in blocks) <= LARGE * ram().get("MemAvailable", 0):
        return []
    reader = reader or Reader()
    swaps.on_undo(reader.close)

    def request(number: int) -> None:
        if 0 <= number < len(blocks) and blocks[number].spans:
            some = (at for at, _, _ in blocks[number].spans)
            if reader.cold or not reader.resident(some):
                reader.request(blocks[number], [0])

    for number, block in enumerate(stack):

        def before(module: nn.Module, args: Any, number: int = number) -> None:
            if recomputing():
                request(number - 1)
            elif number + 1 < len(blocks):
                request(number + 1)
            elif not torch.is_grad_enabled():  # the next pass is a forward pass
                request(0)

        def after(module: nn.Module, args: Any, output: Any, number: int = number) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad and not recomputing():
                hidden.register_hook(lambda grad: request(number - 1))

        swaps.hook(block.register_forward_pre_hook(before))
        swaps.hook(block.register_forward_hook(after))
    return blocks
