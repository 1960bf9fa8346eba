"""The layout of a table's rows: each row is one record, a sequence of parts at fixed offsets.

The row's values come first. A trained row also has Adam's two moments, its gradient and, if the moments are stored in
8 bits, their scales. Each part of a page or more begins on a page, so that reading the values reads nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

PAGE = 4096
VALUES, M, V, GRADS = "values", "m", "v", "grads"  # the parts of a record
SCALES = {M: "m_scales", V: "v_scales"}  # and of 8-bit moments: one scale for each BLOCK of them
BLOCK = 256


@dataclass(frozen=True)
class Part:
    """Where in a record one part lies, and its shape and precision."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layout(shape: tuple[int, ...], dtype: torch.dtype, moments: torch.dtype | None) -> tuple[dict[str, Part], int]:
    """-> the parts of a row of `shape`, and the bytes of its record.

    `moments`: the precision of Adam's state; torch.int8: 8 bits by blocks (adam_state.py); None: a row that is only
    read.
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
    for kind, (part_shape, part_dtype) in kinds.items():
        parts[kind] = Part(end, part_shape, part_dtype)
        end = round_up(end + parts[kind].nbytes, 64 if parts[kind].nbytes < PAGE else PAGE)
    return parts, end if end < PAGE else round_up(end, PAGE)


def spans(
    parts: Mapping[str, Part], record_bytes: int, rows: Iterable[int], kinds: Sequence[str]
) -> Iterator[tuple[int, int, int]]:
    """The pages of these parts of these rows, adjacent ones merged: -> (offset in the table, bytes, how many of the
    rows are complete at the end of the span)."""
    wanted = sorted((parts[kind].offset, parts[kind].offset + parts[kind].nbytes) for kind in kinds)
    start = end = number = 0
    for number, row in enumerate(rows):
        for low, high in wanted:
            low, high = (row * record_bytes + low) // PAGE * PAGE, row * record_bytes + high
            if end and start <= low <= end:
                end = max(end, high)
                continue
            if end:
                yield start, end - start, number
            start, end = low, high
    if end:
        yield start, end - start, number + 1


def adjacent_parts(parts: Mapping[str, Part], kinds: Iterable[str]) -> list[list[str]]:
    """`kinds`, in the order of the record, in groups of parts without a gap between them."""
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
