"""Adam's moments in a table's records: in the values' precision, in fewer bits, or in 8 bits by blocks.

8 bits (Dettmers et al., arXiv 2110.02861): each block of 256 elements is divided by its largest magnitude and coded in
bitsandbytes' dynamic 8-bit type, whose steps are fine near zero. Unlike their optimizer, this one codes the root of the
second moment, which halves the decades that the codes must span, and a root above zero never becomes zero, since a step
divides by it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..quiet import no_kernel_lookup
from .record import BLOCK, SCALES, VALUES, M, V
from .store import TieredStore


def narrow(store: TieredStore) -> bool:
    """Whether moments have fewer bits than values."""
    return store.parts[M].dtype != store.parts[VALUES].dtype


def read(store: TieredStore, kind: str, row: int) -> Tensor:
    """A copy of the row's first (M) or second (V) moment, in its values' precision."""
    stored, wide = store.part(kind, row), store.parts[VALUES].dtype
    if SCALES[kind] not in store.parts:
        return stored.to(wide, copy=True)
    scales = store.part(SCALES[kind], row)
    codes = _codes(kind).to(stored.device)
    found = _functions().dequantize_blockwise(stored, absmax=scales, code=codes, blocksize=BLOCK)
    return (found.square_() if kind == V else found).to(wide)


def write(store: TieredStore, kind: str, row: int, moment: Tensor) -> None:
    """Write the row's first (M) or second (V) moment, in its values' precision."""
    if SCALES[kind] not in store.parts:
        store.put(kind, [row], [moment.to(store.parts[kind].dtype)])
        return
    plain = moment.float().sqrt() if kind == V else moment.float()
    codes, state = _functions().quantize_blockwise(plain, code=_codes(kind).to(moment.device), blocksize=BLOCK)
    if kind == V:
        codes = torch.where((codes == 0) & (plain > 0), 1, codes)
    store.put(kind, [row], [codes])
    store.put(SCALES[kind], [row], [state.absmax])


@functools.cache
def _codes(kind: str) -> Tensor:
    """The 256 values from -1 (roots: 0) to 1 of the codes, ascending."""
    return _functions().create_dynamic_map(signed=kind == M)


def _functions() -> Any:
    no_kernel_lookup()
    from bitsandbytes import functional

    return functional
