"""A table of the vocabulary (an embedding, a head) that holds some of its rows; the whole table is in the slow tier.

The parameter object stays the same and has only the kept rows, so it stays tied, and what trains it trains those rows
only. Token ids stay as they are: the embedding maps an id to its row, and the head returns one logit per id.

    row_of   (V,) int32: the row of each id, or -1           ids   (K,): the id of each row, ascending
    cold     (V, H): all rows as they were loaded: mapped from the base's file, or from an unnamed file of its own, or
             in RAM beside a device

Logits of all ids come from `cold`; those of kept ids are replaced by the products with the kept rows if these may
differ from it (they are trained). A number of rows that is a multiple of 64 keeps the products bit-equal to those of
the whole table in fp32: matrix libraries compute the columns of a remainder in another order.

Legend: B rows, T tokens, N positions, H hidden size, V ids, K kept ids.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..memory.meter import file_ranges, is_mapped
from ..memory.place import Place
from ..tiered.checkpoint import pieces_of, write_tensors
from ..tiered.mapped_file import require_folder, require_space, slow_kind
from .surgery import Swaps

KEPT = "trimtab_kept"  # attribute of an embedding or a head: its KeptRows
IN_FILE = "trimtab_in_file"  # attribute of a parameter without values: whether loading would map it from its file
ROW_OF, IDS, COLD = "trimtab_row_of", "trimtab_ids", "trimtab_cold"  # buffers
MULTIPLE = 64  # of the number of kept rows
BLOCK = 4096  # rows of `cold` that are converted or copied to a device at once


def among_kept(model: nn.Module, ids: Tensor) -> Tensor:
    """`ids` on the CPU, for a probe: each replaced by one whose row the model's embedding holds."""
    known = getattr(model.get_input_embeddings(), IDS, None)  # type: ignore[operator]
    return ids if known is None or known.is_meta else known.cpu()[ids % len(known)]


def in_file(parameter: nn.Parameter) -> bool:
    """Whether a parameter is mapped from its file; in a plan, whether it would be."""
    return bool(getattr(parameter, IN_FILE, False)) if parameter.is_meta else is_mapped(parameter, file_ranges())


def add_maps(module: nn.Module, ids_K: Tensor, size: int, swaps: Swaps) -> None:
    """Registers `row_of` and `ids` as buffers of `module` that are not saved. `size`: V."""
    row_V = torch.full((size,), -1, dtype=torch.int32, device=ids_K.device)
    row_V[ids_K] = torch.arange(len(ids_K), dtype=torch.int32, device=ids_K.device)
    _buffer(module, IDS, ids_K, swaps)
    _buffer(module, ROW_OF, row_V, swaps)


class KeptRows:
    """Cuts the weight of `owner` to the rows that the maps of `maps` name, until `swaps` are undone.

    `unseen(ids)` is called for ids without a row; it returns the row to read instead, or None to read their own from
    the slow tier. `head`: the linear whose `forward` becomes `logits`. `every`: training also uses the logits of all
    ids.
    """

    def __init__(
        self, owner: nn.Module, maps: nn.Module, place: Place, swaps: Swaps, every: bool,
        unseen: Callable[[Tensor], int | None], head: nn.Module | None = None,
    ):  # fmt: skip
        self.owner, self.maps, self.every, self.unseen, self.head = owner, maps, every, unseen, head
        weight: nn.Parameter = owner.weight  # type: ignore[assignment]
        self.size, self.mapped = len(weight), in_file(weight)
        device = place.device if weight.is_meta else weight.device
        self.moved = not self.mapped and (device.type != "cpu" or slow_kind(place.slow, device) == "disk")
        self.rows = weight.data.index_select(0, self.ids)
        self._cold = _moved(weight.data, device, place) if self.moved else weight.data
        weight.data, weight.grad = self.rows, None
        swaps.on_undo(lambda: self._put_back(weight))
        if device.type == "cpu":
            _buffer(owner, COLD, self._cold, swaps)  # a plan replaces it with a tensor of its trace

    def _put_back(self, weight: nn.Parameter) -> None:
        copies = self.moved and not self._cold.is_meta
        weight.grad, weight.data = None, self._cold.to(self.rows.device, copy=True) if copies else self._cold

    @property
    def ids(self) -> Tensor:
        return getattr(self.maps, IDS)

    @property
    def row_of(self) -> Tensor:
        return getattr(self.maps, ROW_OF)

    @property
    def cold(self) -> Tensor:
        return getattr(self.owner, COLD, self._cold)

    @property
    def altered(self) -> bool:
        """Whether the kept rows may differ from those in `cold`."""
        weight: Tensor = self.owner.weight  # type: ignore[assignment]
        return weight.requires_grad or not (self.rows.is_meta or weight.data_ptr() == self.rows.data_ptr())

    def whole(self) -> Tensor:
        """The table with the present values of the kept rows, (V, H); `cold` itself if they are those in it."""
        rows_KH = self.owner.weight.detach()  # type: ignore[operator]
        cold_KH = self._cold.index_select(0, self.ids.to(self._cold.device)).to(rows_KH.device)
        if rows_KH.dtype == cold_KH.dtype and torch.equal(rows_KH, cold_KH):
            return self._cold
        return self._cold.to(rows_KH.device, copy=True).index_copy_(0, self.ids, rows_KH.to(self._cold.dtype))

    # --- the embedding -----------------------------------------------------------------------------------------------

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The embedding's forward: (B, T) -> (B, T, H)."""
        forward, row_BT = type(self.owner).forward, self.row_of[ids_BT]
        if bool((row_BT >= 0).all()):
            return forward(self.owner, row_BT)
        missing_BT = row_BT < 0
        instead = self.unseen(ids_BT[missing_BT])
        if instead is not None:
            return forward(self.owner, row_BT.masked_fill(missing_BT, instead))
        twin = copy.copy(self.owner)  # the same kind of embedding (some scale their rows), with the fetched rows
        fetched = self.take(ids_BT[missing_BT], self.owner.weight)  # type: ignore[arg-type]
        twin._parameters, twin.padding_idx = {"weight": nn.Parameter(fetched, requires_grad=False)}, None  # type: ignore
        rows = forward(twin, torch.arange(len(fetched), device=ids_BT.device))
        return forward(self.owner, row_BT.clamp(min=0)).index_put((missing_BT,), rows)

    # --- the head ----------------------------------------------------------------------------------------------------

    def uses_all(self) -> bool:
        """Whether logits are those of all ids: always without gradients."""
        return self.every or not torch.is_grad_enabled()

    def logits(self, x: Tensor) -> Tensor:
        """The head's forward: (..., H) -> (..., V). Of ids without a row, -inf if only kept ids are used."""
        bias_V = getattr(self.head, "bias", None)
        if self.plain_for(x):
            return F.linear(x, self.cold, bias_V)
        if not self.uses_all():
            kept = F.linear(x, self.owner.weight, None if bias_V is None else bias_V[self.ids])  # type: ignore
            none = kept.new_full((*kept.shape[:-1], self.size), -torch.inf)
            return none.index_copy(-1, self.ids, kept)
        weight: Tensor = self.owner.weight  # type: ignore[assignment]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        every = _AllLogits.apply(x.reshape(-1, x.shape[-1]), weight.to(x.dtype), self).view(*x.shape[:-1], self.size)
        return every if bias_V is None else every + bias_V.to(every.dtype)

    def plain_for(self, x: Tensor) -> bool:
        """Whether the logits are those of the whole table as it was loaded, and it lies where `x` is."""
        return self.uses_all() and not self.altered and self.cold.device == x.device and self.cold.dtype == x.dtype

    def fill(self, x_NH: Tensor, weight_KH: Tensor, out_NV: Tensor) -> Tensor:
        """Writes the logits of all ids, without bias: from `cold`, and from `weight` for kept ids."""
        for start, rows in self.blocks(x_NH):
            torch.mm(x_NH, rows.t(), out=out_NV[:, start : start + len(rows)])
        return out_NV.index_copy_(1, self.ids, torch.mm(x_NH, weight_KH.t()))

    def pull(self, slope_NV: Tensor, weight_KH: Tensor, out_NH: Tensor) -> Tensor:
        """Writes the gradient of `fill`'s input; -> the slope of kept ids, (N, K). Sets it to 0 in `slope_NV`."""
        slope_NK = slope_NV.index_select(1, self.ids)
        slope_NV.index_fill_(1, self.ids, 0.0)
        torch.mm(slope_NK, weight_KH, out=out_NH)
        for start, rows in self.blocks(slope_NV):
            out_NH.addmm_(slope_NV[:, start : start + len(rows)], rows)
        return slope_NK

    def blocks(self, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """`cold` in the dtype and on the device of `like`, as (number of the first row, rows)."""
        cold = self.cold
        if not cold.is_meta and cold.dtype == like.dtype and cold.device == like.device:
            yield 0, cold
            return
        for start in range(0, self.size, BLOCK):
            some = range(start, min(start + BLOCK, self.size))
            yield start, _blank(cold, len(some), like) if cold.is_meta else _there(cold[start : some.stop], like)

    def take(self, ids_M: Tensor, like: Tensor) -> Tensor:
        """The rows of these ids from `cold`, (M, H), in the dtype and on the device of `like`."""
        cold = self.cold
        if cold.is_meta:
            return _blank(cold, len(ids_M), like)
        return _there(cold.index_select(0, ids_M.to(cold.device)), like)


class _AllLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, weight_KH: Tensor, kept: KeptRows) -> Tensor:
        ctx.save_for_backward(x_NH, weight_KH)
        ctx.kept = kept
        return kept.fill(x_NH, weight_KH, x_NH.new_empty(len(x_NH), kept.size))

    @staticmethod
    def backward(ctx: Any, slope_NV: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x_NH, weight_KH = ctx.saved_tensors
        grad_NH = torch.empty_like(x_NH)
        slope_NK = ctx.kept.pull(slope_NV.clone(), weight_KH, grad_NH)
        return grad_NH, slope_NK.t() @ x_NH if ctx.needs_input_grad[1] else None, None


def _there(rows: Tensor, like: Tensor) -> Tensor:
    return rows.to(like.device, like.dtype)


def _blank(cold: Tensor, rows: int, like: Tensor) -> Tensor:
    """Rows for a plan, in whose trace `cold` has no part: it lies beside a device."""
    return like.new_empty(rows, cold.shape[1])


def _buffer(module: nn.Module, name: str, tensor: Tensor, swaps: Swaps) -> None:
    module.register_buffer(name, tensor, persistent=False)
    swaps.on_undo(lambda: delattr(module, name))


def _moved(table: Tensor, device: torch.device, place: Place) -> Tensor:
    """`table` in the slow tier: in RAM beside a device, or mapped from a file that is freed with the process."""
    if table.is_meta:
        return table
    table = table.cpu()
    if slow_kind(place.slow, device) == "ram":
        return table
    if place.folder:
        require_folder(place.folder)
    require_space(table.nbytes, place.folder, "the rows of the vocabulary")
    handle, path = tempfile.mkstemp(suffix=".safetensors", dir=place.folder)  # the meter knows mapped files by the name
    try:
        os.close(handle)
        write_tensors(Path(path), {COLD: pieces_of(table)})
        return load_file(path)[COLD]
    finally:
        os.unlink(path)
