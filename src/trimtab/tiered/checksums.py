"""CRC-32 of a tensor's equal parts (a table's rows), computed while its bytes are written or read."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Checksums:
    """The checksums of `parts` parts of `size` bytes each, whose bytes are added in order, in pieces of any length."""

    def __init__(self, parts: int, size: int):
        self.size, self.at = size, 0
        self.found = [0] * parts

    def add(self, data: Any) -> None:
        """`data`: bytes, or any object with a contiguous buffer."""
        view = memoryview(data)
        while len(view):
            part, done = divmod(self.at, self.size)
            piece = view[: self.size - done]
            self.found[part] = zlib.crc32(piece, self.found[part])
            self.at += len(piece)
            view = view[len(piece) :]


def of_parts(tensor: Tensor, parts: int) -> Checksums:
    """For the `parts` equal parts of a tensor, whose bytes are still to be added."""
    return Checksums(parts, tensor.nbytes // max(1, parts))


def bytes_of(tensor: Tensor) -> Any:
    """A tensor's bytes, without a copy if it is contiguous and on the CPU."""
    plain = tensor.detach().cpu().contiguous().flatten()
    return plain.view(torch.uint8).numpy().data if plain.numel() else b""


def differing(found: Sequence[int], written: Sequence[int]) -> list[int]:
    """The positions at which two lists of checksums differ."""
    return [at for at, (one, two) in enumerate(zip(found, written, strict=True)) if one != two]


def some(rows: Sequence[int]) -> str:
    """`row 3`, `rows 3, 5`, `rows 0, 1, 2, 3, 4, 5, 6, 7 and 92 more`."""
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:8]))}{more}"
