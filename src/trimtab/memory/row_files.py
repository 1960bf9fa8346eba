"""Tables on disk: tensors written piece by piece into safetensors files, and the checkpoints of a store.

A checkpoint of a store is a folder of deltas, `0.safetensors`, `1.safetensors`, ...: the rows as they were drawn, and
then each delta's rows written over them, give the table. Only the newest delta is written, with the rows changed since
the checkpoint before; the others are links to that checkpoint's files, so that each folder is whole by itself and old
ones can go in any order. The working table is never part of a checkpoint: a run killed at any instant has only half
written what nothing refers to yet.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BadInput
from .shared_rows import settle
from .store import GRADS, TieredStore

CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
PIECE = 2**24  # bytes that are copied at a time


class Pieces(NamedTuple):
    """A tensor that is written (or read) one piece after another."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterable[Tensor]


def pieces_of(tensor: Tensor) -> Pieces:
    return Pieces(tuple(tensor.shape), tensor.dtype, _cut(tensor))


def _cut(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.dim() == 0 or tensor.nbytes <= PIECE:
        yield tensor
        return
    rows = max(1, PIECE // max(1, tensor[0].nbytes))
    yield from tensor.split(rows)


def write_tensors(path: Path, tensors: Mapping[str, Pieces], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file; no more than a piece of it is in memory at a time."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # aligned, as the format asks
    for name in order:
        shape, dtype, _ = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for piece in tensors[name].pieces:
                plain = piece.detach().cpu().contiguous().flatten()
                if plain.numel():
                    file.write(plain.view(torch.uint8).numpy().data)
        assert file.tell() == 8 + len(text) + end


def save_rows(store: TieredStore, folder: Path, before: Path | None = None) -> None:
    """Write a checkpoint of `store` into `folder` (new). `before`: the folder of the one before, if there is one.

    All rows are written anew where the checkpoint that the dirty rows count from is not `before` (it may never have
    become whole), and once the deltas hold more rows than the table has.
    """
    folder.mkdir(parents=True)
    rows, older = store.dirty_rows(), []
    if store.saved is not None:
        older = _deltas(before) if before is not None else []
        follows = bool(older) and _identity(older[-1]) == store.saved
        if not follows or sum(_length(path) for path in older) + len(rows) > store.rows:
            older, rows = [], list(range(store.rows))
    for path in older:
        _link(path, folder / path.name)
    state = store.optimiser.state() if store.optimiser is not None else {}
    parts = {
        kind: Pieces((len(rows), *store.shape), part.dtype, _rows_of(store, kind, rows))
        for kind, part in store.parts.items()
        if kind != GRADS
    }
    whole = {f"state.{name}": pieces_of(tensor) for name, tensor in state.items()}
    index = {"rows": pieces_of(torch.tensor(rows, dtype=torch.int64))}
    newest = folder / f"{len(older)}.safetensors"
    write_tensors(newest, parts | whole | index)
    store.clean(_identity(newest))


def _rows_of(store: TieredStore, kind: str, rows: Iterable[int]) -> Iterator[Tensor]:
    return (store.part(kind, row) for row in rows)


def load_rows(store: TieredStore, folder: Path) -> None:
    """Bring `store`, as it was drawn, to what the checkpoint in `folder` holds."""
    state: dict[str, Tensor] = {}
    if not (deltas := _deltas(folder)):
        raise BadInput(f"rows of {store.name}", f"there are none in {folder}", "Take an intact checkpoint")
    for path in deltas:
        try:
            with safe_open(path, framework="pt") as file:
                rows = file.get_tensor("rows")
                if rows.dim() != 1 or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < store.rows):
                    raise SafetensorError("its rows are none of this table's")
                for kind, part in store.parts.items():
                    if kind == GRADS:
                        continue
                    values, into = file.get_slice(kind), store.whole(kind)
                    if values.get_shape() != [len(rows), *store.shape] or values.get_dtype() != CODES[part.dtype]:
                        raise SafetensorError(f"{kind} is of another shape or precision")
                    many = max(1, PIECE // part.nbytes)
                    for at in range(0, len(rows) if store.writes else 0, many):
                        into[rows[at : at + many]] = values[at : at + many]
                state = {k.removeprefix("state."): file.get_tensor(k) for k in file.keys() if k.startswith("state.")}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BadInput(f"rows of {store.name} in {path}", f"the file is damaged ({error})", "Take an earlier "
                           "checkpoint") from None  # fmt: skip
    if store.optimiser is not None:
        store.optimiser.load_state(state)
    store.clean(_identity(deltas[-1]))
    settle([store])


def _deltas(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("*.safetensors") if p.stem.isdigit()), key=lambda p: int(p.stem))


def _identity(path: Path) -> tuple[int, int]:
    """Of a file, whatever its name becomes."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _length(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return file.get_slice("rows").get_shape()[0]


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without links
        shutil.copyfile(old, new)
