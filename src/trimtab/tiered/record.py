"""Where the numbers of a table's row lie: one extent of parts, one after the other.

The row's values come first; where it is trained, Adam's two moments, the gradient, and the scales of moments in 8 bits.
Each part that fills a page begins on one, so that reading the values reads nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

PAGE = 4096
VALUES, M, V, GRADS = "values", "m", "v", "grads"  # the parts of an extent
SCALES = {M: "m_scales", V: "v_scales"}  # and of moments in 8 bits, one number for each BLOCK of them
BLOCK = 256


@dataclass(frozen=True)
class Part:
    """Where in an extent one kind of number lies."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layout(shape: tuple[int, ...], dtype: torch.dtype, moments: torch.dtype | None) -> tuple[dict[str, Part], int]:
    """-> the parts of a row of `shape`, and the bytes of its extent.

    `moments`: the precision of Adam's state; torch.int8: 8 bits by blocks (moments.py); None: a row that is only read.
    """
    coded = torch.uint8 if moments == torch.int8 else moments
    kinds = {VALUES: (shape, dtype)}
    if coded is not None:
        kinds |= {M: (shape, coded), V: (shape, coded), GRADS: (shape, torch.float32)}
    if moments == torch.int8:
        blocks = (round_up(math.prod(shape), BLOCK) // BLOCK,)
        kinds |= {scales: (blocks, torch.float32) for scales in SCALES.values()}
    parts: dict[str, Part] = {}
    end = 0
    for kind, (of, held) in kinds.items():
        parts[kind] = Part(end, of, held)
        end = round_up(end + parts[kind].nbytes, 64 if parts[kind].nbytes < PAGE else PAGE)
    return parts, end if end < PAGE else round_up(end, PAGE)


def spans(
    parts: Mapping[str, Part], extent: int, rows: Iterable[int], kinds: Sequence[str]
) -> Iterator[tuple[int, int, int]]:
    """-> (offset in the table, bytes, rows that are whole by then): the pages of these parts, neighbours joined."""
    wanted = sorted((parts[kind].offset, parts[kind].offset + parts[kind].nbytes) for kind in kinds)
    start = end = number = 0
    for number, row in enumerate(rows):
        for low, high in wanted:
            low, high = (row * extent + low) // PAGE * PAGE, row * extent + high
            if end and start <= low <= end:
                end = max(end, high)
                continue
            if end:
                yield start, end - start, number
            start, end = low, high
    if end:
        yield start, end - start, number + 1


def joined(parts: Mapping[str, Part], kinds: Iterable[str]) -> list[list[str]]:
    """`kinds`, which come in the extent's order, in groups that have no gap within them."""
    found: list[list[str]] = []
    end = -1
    for kind in kinds:
        if parts[kind].offset == end:
            found[-1].append(kind)
        else:
            found.append([kind])
        end = parts[kind].offset + parts[kind].nbytes
    return found


def round_up(size: int, to: int) -> int:
    return -(-size // to) * to
