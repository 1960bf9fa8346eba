"""A block's weights are read while the block before it computes, where they are mapped from files.

A base that is mapped and larger than what memory has left is read from the disk in each pass. Which weights come next
is known: the next block's on the way forward, those of the block below on the way back. Like rows of a table they are
asked for as a whole (tiered/prefetch.py), and only while they have to be read.
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

LARGE = 0.5  # of the memory that is free: from here on a base is read ahead
LOOK = 2**22  # bytes between two pages that are looked at to see whether a block is still in memory


class Weights:
    """Those of a block that are mapped from files."""

    in_place = True

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = list(tensors)
        ends = sorted((t.data_ptr() // PAGE * PAGE, t.data_ptr() + t.nbytes) for t in self.tensors)
        joined: list[tuple[int, int]] = []
        for low, high in ends:
            if joined and low <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(high, joined[-1][1])
            else:
                joined.append((low, high))
        self.spans = [(at, min(LOOK, high - at), 1) for low, high in joined for at in range(low, high, LOOK)]

    @property
    def nbytes(self) -> int:
        return sum(length for _, length, _ in self.spans)

    def pages(self, rows: Any, kinds: Any) -> tuple[list[Tensor], list[tuple[int, int, int]]]:
        """As of a table: what holds the mapping, and where it lies."""
        return self.tensors, self.spans


def read_weights_ahead(model: Any, swaps: Swaps, reader: Reader | None = None) -> list[Weights]:
    """Ask for each block's mapped weights before it is reached, until `swaps` are undone; -> what is asked for.

    Nothing is where the blocks' mapped weights are small beside the memory that is free.
    """
    maps = file_ranges()
    stack = anatomy.blocks(model)[1]
    blocks = [Weights(p for p in block.parameters() if maps and is_mapped(p, maps)) for block in stack]
    if sum(block.nbytes for block in blocks) <= LARGE * ram().get("MemAvailable", 0):
        return []
    reader = reader or Reader()
    swaps.on_undo(reader.close)

    def ask(number: int) -> None:
        if 0 <= number < len(blocks) and blocks[number].spans:
            some = (at for at, _, _ in blocks[number].spans)
            if reader.cold or not reader.sees(some):
                reader.ask(blocks[number], [0])

    for number, block in enumerate(stack):

        def before(module: nn.Module, args: Any, number: int = number) -> None:
            if recomputing():
                ask(number - 1)
            elif number + 1 < len(blocks):
                ask(number + 1)
            elif not torch.is_grad_enabled():  # a pass forward follows
                ask(0)

        def after(module: nn.Module, args: Any, output: Any, number: int = number) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad and not recomputing():
                hidden.register_hook(lambda grad: ask(number - 1))

        swaps.hook(block.register_forward_pre_hook(before))
        swaps.hook(block.register_forward_hook(after))
    return blocks
