"""Tables on disk: tensors written piece by piece into safetensors files, and the checkpoints of a store.

A checkpoint of a store is a folder of deltas, `0.safetensors`, `1.safetensors`, ...: the table is the rows' initial
values, overwritten by each delta's rows in turn. Only the newest delta is written, with the rows changed since the
previous checkpoint; the others are links to that checkpoint's files, so that each folder is complete by itself and old
ones can be deleted in any order. The working table is never part of a checkpoint: if a run is killed, only files that
nothing refers to yet are incomplete. Checksums of each row's parts lie beside them, so that a damaged row is named.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BadInput
from ..files import link
from .checksums import Checksums, bytes_of, differing, of_parts, some
from .distributed import settle
from .record import Part
from .store import GRADS, TieredStore

CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16",
         torch.bool: "BOOL"}  # fmt: skip
PIECE = 2**24  # bytes that are copied at a time
STATE, SUMS = "state.", "crc32."  # prefixes: of the optimizer's tensors, and of a tensor's checksums


class Pieces(NamedTuple):
    """A tensor that is written one piece after another."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterable[Tensor]
    sums: Checksums | None = None  # computed while it is written


ALIGNED = 64  # bytes; products of mapped tensors then round as those of allocated ones do


def pieces_of(tensor: Tensor, sums: Checksums | None = None) -> Pieces:
    return Pieces(tuple(tensor.shape), tensor.dtype, cut(tensor), sums)


def cut(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most PIECE bytes, in the order of the tensor's elements."""
    if tensor.dim() == 0 or tensor.nbytes <= PIECE:
        yield tensor
    elif tensor[0].nbytes > PIECE:
        for row in tensor:
            yield from cut(row)
    else:
        yield from tensor.split(PIECE // tensor[0].nbytes)


def write_tensors(path: Path, tensors: Mapping[str, Pieces], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; no more than a piece of it is in memory at a time.

    Wider types come first, as the format asks; tensors of equal width keep the order of `tensors`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    for name in order:
        shape, dtype = tensors[name][:2]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            sums = tensors[name].sums
            for piece in tensors[name].pieces:
                data = bytes_of(piece)
                file.write(data)
                if sums is not None:
                    sums.add(data)
        assert file.tell() == 8 + len(text) + end


def save_rows(store: TieredStore, folder: Path, before: Path | None = None) -> None:
    """Write a checkpoint of `store` into `folder` (new). `before`: the folder of the previous one, if there is one.

    All rows are written if the checkpoint that the dirty rows are counted from is not `before` (it may never have been
    completed), or if the deltas have more rows than the table.
    """
    folder.mkdir(parents=True)
    rows, older = store.dirty_rows(), []
    if store.saved is not None:
        older = _deltas(before) if before is not None else []
        follows = bool(older) and _identity(older[-1]) == store.saved
        if not follows or sum(_length(path) for path in older) + len(rows) > store.rows:
            older, rows = [], list(range(store.rows))
    for path in older:
        link(path, folder / path.name)
    state = store.optimizer.state() if store.optimizer is not None else {}
    small = {"rows": torch.tensor(rows, dtype=torch.int64), **{f"{STATE}{name}": t for name, t in state.items()}}
    tensors = {name: pieces_of(tensor, of_parts(tensor, 1)) for name, tensor in small.items()}
    for kind, part in _kept(store).items():
        sums = Checksums(len(rows), part.nbytes)
        tensors[kind] = Pieces((len(rows), *part.shape), part.dtype, _rows_of(store, kind, rows), sums)
    newest = folder / f"{len(older)}.safetensors"
    write_tensors(newest, tensors | _sums_of(tensors), {"table": _table(store)})
    store.clean(_identity(newest))


def _rows_of(store: TieredStore, kind: str, rows: Iterable[int]) -> Iterator[Tensor]:
    return (store.part(kind, row) for row in rows)


def _kept(store: TieredStore) -> dict[str, Part]:
    """The parts of a record that a checkpoint has: no gradients, since it is written between steps."""
    return {kind: part for kind, part in store.parts.items() if kind != GRADS}


def _table(store: TieredStore) -> str:
    return f"{store.rows} rows of {' x '.join(map(str, store.shape))}"


def _sums_of(tensors: Mapping[str, Pieces]) -> dict[str, Pieces]:
    """The checksums of `tensors` as tensors of bytes, (parts, 4): of the narrowest type and last by name, so that they
    are written after all the others."""

    def read(sums: Checksums) -> Iterator[Tensor]:
        yield torch.tensor(sums.found, dtype=torch.int64).unsqueeze(1).view(torch.uint8)[:, :4]

    return {
        SUMS + name: Pieces((len(pieces.sums.found), 4), torch.uint8, read(pieces.sums))
        for name, pieces in tensors.items()
        if pieces.sums is not None
    }


def load_rows(store: TieredStore, folder: Path) -> None:
    """Load the checkpoint in `folder` into `store`; rows that it does not name get their initial values."""
    if not (deltas := _deltas(folder)):
        raise BadInput(f"rows of {store.name}", f"there are none in {folder}", "Use an intact checkpoint")
    held = [_open(store, path) for path in deltas]
    store.flush()
    named = {row for tensors in held for row in tensors["rows"].tolist()}
    store.reset(store.touched - named)
    for path, tensors in zip(deltas, held, strict=True):
        for kind in _kept(store) if store.writes else ():
            _put(store, kind, path, tensors)
    if store.optimizer is not None:
        store.optimizer.load_state(_state_in(held[-1]))
    settle([store])
    store.loaded(named, _identity(deltas[-1]))


def _open(store: TieredStore, path: Path) -> dict[str, Tensor]:
    """The tensors of a delta, mapped from its file. All is checked but the rows' own values."""
    try:
        with safe_open(path, framework="pt") as file:
            table = (file.metadata() or {}).get("table")
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(store, path, str(error)) from None
    if table != _table(store):
        raise _of_another(store, path, f"they are of a table of {table}, and this one has {_table(store)}")
    rows = held.get("rows", torch.zeros(0))
    for name in ("rows", *(name for name in held if name.startswith(STATE))):
        if name not in held or _sums(held, name) != [zlib.crc32(bytes_of(held[name]))]:
            raise _damaged(store, path, f"{name} is not what was written")
    if rows.dtype != torch.int64 or rows.dim() != 1 or any(not 0 <= row < store.rows for row in rows.tolist()):
        raise _damaged(store, path, "it names rows that this table does not have")
    if store.optimizer is not None and not store.optimizer.fits(_state_in(held)):
        raise _of_another(store, path, "another optimizer stepped them")
    for kind, part in _kept(store).items():
        found = held.get(kind)
        if found is None or found.dtype != part.dtype:
            theirs = "not in it" if found is None else f"{found.dtype} in it"
            raise _of_another(store, path, f"{kind} is {part.dtype} here and {theirs}")
        if found.shape != (len(rows), *part.shape) or len(_sums(held, kind)) != len(rows):
            raise _damaged(store, path, f"{kind} is of another shape")
    return held


def _put(store: TieredStore, kind: str, path: Path, held: Mapping[str, Tensor]) -> None:
    """Copy one part of a delta's rows into the table, and check it."""
    rows, sums = held["rows"], Checksums(len(held["rows"]), store.parts[kind].nbytes)
    many = max(1, PIECE // store.parts[kind].nbytes)
    for which, piece in zip(rows.split(many), held[kind].split(many), strict=True):
        sums.add(bytes_of(piece))
        store.put(kind, which.tolist(), piece)
    if bad := differing(sums.found, _sums(held, kind)):
        raise _damaged(store, path, f"{kind} of {some([int(rows[at]) for at in bad])} are not what was written")


def _state_in(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(STATE): tensor for name, tensor in held.items() if name.startswith(STATE)}


def _sums(held: Mapping[str, Tensor], name: str) -> list[int]:
    """The checksums that were written with tensor `name`; empty if they are missing or malformed."""
    found = held.get(SUMS + name)
    if found is None or found.dtype != torch.uint8 or found.dim() != 2 or found.shape[1] != 4:
        return []
    return (found.long() << torch.tensor([0, 8, 16, 24])).sum(1).tolist()


def _damaged(store: TieredStore, path: Path, how: str) -> BadInput:
    return BadInput(f"rows of {store.name} in {path}", f"the file is damaged ({how})", "Use a checkpoint without it")


def _of_another(store: TieredStore, path: Path, which: str) -> BadInput:
    return BadInput(f"rows of {store.name} in {path}", which, "Resume with the recipe that the run was started with")


def _deltas(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("*.safetensors") if p.stem.isdigit()), key=lambda p: int(p.stem))


def _identity(path: Path) -> tuple[int, int]:
    """Of a file, independent of its name."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _length(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return file.get_slice("rows").get_shape()[0]
