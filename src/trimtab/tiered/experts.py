"""Experts of a mixture in two tiers: one record for each in the slow tier, and slots of the fast tier for some.

A record has the weights of one expert, end to end. The slow tier is a mapped file, or host RAM below a GPU. The fast
tier is an arena of as many slots as its budget allows. Which experts have slots is up to a Residency.

Of an expert without a slot, a CPU uses the record where it is mapped: the kernel reads the missing pages, and no memory
of the process is used. A GPU gets it through a buffer of one slot.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import BadInput
from ..files import write_json
from ..validation import read_json
from .kept_store import DATA, MEANING, SUMS, difference
from .mapped_file import MappedFile, map_file, require_memory, require_space, reserve
from .prefetch import PIECE, Reader, Request
from .record import PAGE, Part, round_up
from .residency import Residency, Use, WorkingSet
from .table import Traffic

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and precision of one expert's tensor
SAMPLED = 4  # records whose first pages are checked, to see whether all are in memory


@dataclass(frozen=True)
class Layer:
    """The rows of one layer, and where their tensors lie in a record."""

    rows: range
    start: int  # of the first record in the table, in bytes
    parts: dict[str, Part]
    record_bytes: int
    shapes: Shapes  # of an expert's tensors, before they are packed


class Form(Protocol):
    """How an expert's tensors are packed in its record."""

    name: str

    def parts(self, shapes: Shapes) -> Shapes: ...

    def packed(self, tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]: ...

    def unpacked(self, parts: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]: ...


def layers_of(shapes: Sequence[tuple[int, Shapes]], form: Form | None) -> list[Layer]:
    found, row, start = [], 0, 0
    for count, tensors in shapes:
        parts, end = {}, 0
        for name, (shape, dtype) in (tensors if form is None else form.parts(tensors)).items():
            parts[name] = Part(end, shape, dtype)
            end = round_up(end + parts[name].nbytes, 64)
        size = round_up(end, PAGE if end >= PAGE else 64)
        found.append(Layer(range(row, row + count), start, parts, size, tensors))
        row, start = row + count, round_up(start + count * size, PAGE)
    return found


class ExpertStore:
    """`shapes`: of each layer, how many experts there are and what one consists of. `reader`: reads records ahead.
    `form`: how records are packed. `keep`: a folder in which the store stays; "": the file has no name, and ends with
    the process. `identity`: what the weights come from; a store that was kept must have the same. A record of it is
    compared with its checksum before its first use. `planned`: for a model without values; takes no memory.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, Shapes]], residency: Residency, *, device: torch.device, slow: str,
        folder: str | None = None, keep: str = "", identity: str = "", planned: bool = False,
        reader: Reader | None = None, form: Form | None = None,
    ):  # fmt: skip
        self.layers, self.device, self.slow = layers_of(shapes, form), device, slow
        self.form = form
        self.planned, self.traffic = planned, Traffic()
        last = self.layers[-1]
        self.rows, self.table_bytes = last.rows.stop, last.start + len(last.rows) * last.record_bytes
        self.slot_bytes = max(layer.record_bytes for layer in self.layers)
        self.filled = False
        self._file: MappedFile | None = None
        self._partial: tuple[Path, Path, dict[str, Any]] | None = None
        self._kept_in, self._sums = keep, list[int]()  # CRC-32 of each record of a store that is kept
        self._unchecked: set[int] = set()  # rows of a store that was kept, which nothing has used yet
        self._table = self._new_table(folder, keep, identity)
        self.reader = reader if self.in_place and self._file is not None else None
        self._prefetched: Request | None = None
        self._of_row = [layer for layer in self.layers for _ in layer.rows]
        self.working = WorkingSet([layer.rows for layer in self.layers], residency)
        self.choose: Callable[[Mapping[int, int], Use], Iterable[int]] | None = None  # rows to compute on the host
        self.hosted: set[int] = set()
        self.stand_ins: Any = None  # StandIns, if experts without a slot are replaced by copies in few bits
        self.clock: Any = None  # counts the seconds of a plan (cost/roofline.Clock)
        self.trace: list[tuple[int, int, dict[int, int]]] | None = None  # (layer, tokens, row -> how many), if recorded
        self._arena = self._buffer = torch.empty(0, dtype=torch.uint8)
        if not self.in_place:
            self._buffer = self._empty(1)
        self.resize(0)

    @property
    def in_place(self) -> bool:
        """Whether the model computes with records where they lie."""
        return self.device.type == "cpu"

    # --- the slow tier ------------------------------------------------------------------------------------------------

    def _new_table(self, folder: str | None, keep: str, identity: str) -> Tensor:
        if self.planned:
            return torch.empty(self.table_bytes, dtype=torch.uint8, device="meta")
        if keep:
            self._file = self._kept(Path(keep), identity)
        elif self.slow == "disk":
            self._file = map_file(self.table_bytes, folder, "experts")
        else:
            require_memory(self.table_bytes, "experts")
            return torch.empty(self.table_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return torch.frombuffer(self._file.map, dtype=torch.uint8)

    def _kept(self, folder: Path, identity: str) -> MappedFile:
        """The file in `folder`: an existing one of the same experts, or a new one, which `complete` names."""
        layout = [[len(layer.rows), *([n, list(p.shape), str(p.dtype)] for n, p in layer.parts.items())]
                  for layer in self.layers]  # fmt: skip
        form = {} if self.form is None else {"form": self.form.name}
        meaning = {"identity": identity, **form, "layout": layout}
        data, said = folder / DATA, folder / MEANING
        if said.is_file() or data.is_file():
            known = read_json(said) or {}
            sums, do = known.pop(SUMS, None), "Name another folder, or remove this one"
            whole = isinstance(sums, list) and len(sums) == sum(len(layer.rows) for layer in self.layers)
            if known != meaning:
                raise BadInput(f"store: {folder}", difference(known, meaning), do)
            if not whole:
                raise BadInput(f"store: {folder}", f"its {MEANING} has no checksums", do)
            if data.is_file() and data.stat().st_size == self.table_bytes:
                self.filled, self._sums, self._unchecked = True, sums, set(range(self.rows))
                with data.open("r+b") as file:
                    return MappedFile(file.fileno(), self.table_bytes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"{DATA}.*"):  # by a process that was killed
                if not Path("/proc", left.suffix[1:]).exists():
                    left.unlink(missing_ok=True)
            require_space(self.table_bytes, folder, "experts")
            partial = folder / f"{DATA}.{os.getpid()}"
            with partial.open("w+b", buffering=0) as file:
                reserve(file, self.table_bytes)
                self._partial = (partial, data, meaning)
                return MappedFile(file.fileno(), self.table_bytes)
        except OSError as error:
            why = error.strerror or str(error)
            raise BadInput(f"store: {folder}", why, "Name a folder on a local disk that can be written") from None

    def fill(self, experts: Callable[[int, int], Mapping[str, Tensor]], written: Callable[[int], None]) -> None:
        """Write each expert's tensors: `experts(layer, expert)` returns them. `written(layer)` is called after each
        layer. Nothing is written to a store that was kept or is planned."""
        if self.planned:
            return
        try:
            for number, layer in enumerate(self.layers):
                for expert in range(0 if self.filled else len(layer.rows)):
                    self._write(layer, expert, experts(number, expert))
                written(number)
        except BaseException:
            self.abandon()
            raise
        self._complete()

    def _write(self, layer: Layer, expert: int, tensors: Mapping[str, Tensor]) -> None:
        if self.form is not None:
            tensors = self.form.packed(tensors, layer.shapes)
        crc = 0
        for name, part in layer.parts.items():
            values = tensors[name].detach().to("cpu", part.dtype).contiguous().reshape(-1).view(torch.uint8)
            at = layer.start + expert * layer.record_bytes + part.offset
            if self._file is None:
                self._table[at : at + part.nbytes] = values
            else:
                self._file.write(at, values.numpy())
            if self._partial is not None:
                crc = zlib.crc32(values.numpy(), crc)
        if self._partial is not None:
            self._sums.append(crc)

    def _complete(self) -> None:
        self.filled = True
        if self._partial is not None:
            partial, data, meaning = self._partial
            write_json(data.parent / MEANING, {**meaning, SUMS: self._sums})  # first: without data it means nothing
            os.replace(partial, data)
            self._partial = None

    def check(self, row: int, record: Tensor | None = None) -> None:
        """BadInput if a row's record in a store that was kept (or its copy `record`) is not what was written. Only the
        first call for a row reads it."""
        if row not in self._unchecked:
            return
        layer, crc = self._of_row[row], 0
        record = self._table[self._span(row)] if record is None else record
        for part in layer.parts.values():
            crc = zlib.crc32(record[part.offset : part.offset + part.nbytes].numpy(), crc)
        if crc != self._sums[row]:
            have = f"expert {row - layer.rows.start} of layer {self.layers.index(layer)} is not what was written"
            raise BadInput(f"store: {self._kept_in}", have, "Remove this folder: the next run writes it again")
        self._unchecked.discard(row)

    def abandon(self) -> None:
        """Remove a file that was not completed."""
        if self._partial is not None:
            self._partial[0].unlink(missing_ok=True)
            self._partial = None

    def _span(self, row: int) -> slice:
        """Where a row's record is in the table, in bytes."""
        layer = self._of_row[row]
        start = layer.start + (row - layer.rows.start) * layer.record_bytes
        return slice(start, start + layer.record_bytes)

    def original(self, row: int) -> dict[str, Tensor]:
        """A row's tensors in the slow tier."""
        self.check(row)
        return self.split(row, self._table[self._span(row)])

    def split(self, row: int, record: Tensor) -> dict[str, Tensor]:
        """The tensors of a row in its record, by name; unpacked, if they are packed."""
        layer = self._of_row[row]
        parts = {
            name: record[part.offset : part.offset + part.nbytes].view(part.dtype).view(part.shape)
            for name, part in layer.parts.items()
        }  # fmt: skip
        return parts if self.form is None else self.form.unpacked(parts, layer.shapes)

    # --- the fast tier ------------------------------------------------------------------------------------------------

    def _empty(self, slots: int) -> Tensor:
        device = torch.device("meta") if self.planned else self.device
        return torch.empty(slots, self.slot_bytes, dtype=torch.uint8, device=device)

    def resize(self, slots: int) -> None:
        """Have this many slots, all free."""
        self.working.resize(slots)
        self._arena = torch.empty(0, dtype=torch.uint8)  # freed before the next is made
        self._arena = self._empty(self.slots)

    @property
    def slots(self) -> int:
        return self.working.slots

    @property
    def slot_of(self) -> dict[int, int]:
        """Row -> slot."""
        return self.working.slot_of

    @property
    def fast(self) -> list[Tensor]:
        """Its tensors in the fast tier."""
        table = [self._table] if self.in_place and self._file is None and not self.planned else []
        copies = [] if self.stand_ins is None else [self.stand_ins.table]
        return [*table, *copies, *(tensor for tensor in (self._arena, self._buffer) if tensor.numel())]

    @property
    def used_bytes(self) -> int:
        """Bytes of the fast tier that are in use now: of slots, those that have an expert."""
        fast = sum(tensor.nbytes for tensor in self.fast)
        return fast - (self.slots - len(self.slot_of)) * self.slot_bytes

    @property
    def below(self) -> list[Tensor]:
        """Its tensors in the slow tier."""
        return [] if self.in_place and self._file is None and not self.planned else [self._table]

    def bring(self, layer: int, counts: Mapping[int, int], tokens: int, exact: bool = True) -> None:
        """Of `tokens` tokens, so many (expert -> number) need these experts of a layer now: give slots to those that
        the residency chooses. No expert that is needed now loses its slot. `exact`: no stand-in will be used."""
        first = self.layers[layer].rows.start
        needed = {first + expert: count for expert, count in counts.items()}
        if self.trace is not None:
            self.trace.append((layer, tokens, needed))
        done = self.working.use(layer, needed, tokens)
        used = [row for row, _ in done.moved] + (done.streamed if exact or self.stand_ins is None else [])
        try:
            self._read_missing(used)
            for row, slot in done.moved:
                self.read(row, self._arena[slot])
        except BaseException:  # some slots do not have what the books say
            self.working.resize(self.slots)
            raise
        self.hosted = set() if self.choose is None else set(self.choose(needed, done))
        self.traffic.hits += len(done.hits)
        self.traffic.misses += len(done.moved) + len(done.streamed)
        self.traffic.up += len(used) * self.layers[layer].record_bytes

    def read(self, row: int, slot: Tensor) -> None:
        """Copy a row's record into a slot."""
        span, size = self._span(row), self._of_row[row].record_bytes
        if self._file is not None and self.in_place:
            self._file.read(span.start, slot[:size].numpy())
            self.check(row, slot)
        else:
            self.check(row)
            slot[:size].copy_(self._table[span], non_blocking=True)

    def weights(self, row: int, exact: bool = True) -> dict[str, Tensor]:
        """A row's tensors where the model computes, until the next call of `bring` or, from the buffer, of this. Unless
        it is to be `exact`, a stand-in may be used."""
        slot = self.slot_of.get(row)
        if slot is not None:
            return self.split(row, self._arena[slot])
        if self.stand_ins is not None and not exact:
            return self.stand_ins.weights(row)
        if self.in_place or row in self.hosted:
            return self.original(row)
        self.read(row, self._buffer[0])
        return self.split(row, self._buffer[0])

    # --- reading ahead ------------------------------------------------------------------------------------------------

    def pages(self, rows: Sequence[int], kinds: Sequence[str]) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Where records lie: -> the table, and spans of (address, bytes, how many of the rows are complete by then)."""
        table, found = self._table, []
        for number, row in enumerate(rows if table.numel() else ()):
            span = self._span(row)
            for start in range(span.start // PAGE * PAGE, span.stop, PIECE):
                length = min(PIECE, span.stop - start)
                found.append((table.data_ptr() + start, length, number + (start + length == span.stop)))
        return table, found

    @property
    def wants_prefetch(self) -> bool:
        """Whether records had to be read from the disk lately."""
        return self.reader is not None and self.reader.cold

    def prefetch(self, rows: Iterable[int]) -> None:
        """Start reading the records that the next `bring` will need. Returns at once."""
        self._end_prefetch([])
        if self.reader is not None:
            self._prefetched = self.reader.request(self, [row for row in rows if row not in self.slot_of])

    def _read_missing(self, rows: list[int]) -> None:
        """Request the records of these rows together, if some are not in memory."""
        if self.reader is None:
            return
        counted, ready = self.reader.cold, self._end_prefetch(rows)
        absent = [row for row in rows if row not in ready]
        some = (
            self._table.data_ptr() + self._span(row).start // PAGE * PAGE for row in absent[:: len(absent) // 4 or 1]
        )
        if absent and (self.reader.cold or not self.reader.resident(some)):
            self.reader.request(self, absent, now=True)
        if counted:
            self.traffic.needed += len(rows)
            self.traffic.foreseen += len(ready)

    def _end_prefetch(self, used: Sequence[int]) -> set[int]:
        """-> those of the rows `used` whose prefetch was complete."""
        request, self._prefetched = self._prefetched, None
        if request is None:
            return set()
        request.cancelled = True
        self.traffic.unused += len(set(request.read).difference(used)) * self.slot_bytes
        return set(request.rows[: request.done]).intersection(used)

    def forget(self) -> None:
        """Have the kernel drop the file's pages from memory, to measure what reading them takes."""
        if self._file is not None:
            self._file.forget()

    def drop(self) -> None:
        """Release both tiers; a file without a name is freed with its last view."""
        self.abandon()
        self._end_prefetch([])
        self._table = self._arena = self._buffer = torch.empty(0, dtype=torch.uint8)
        self.slot_of.clear()
        self._file = None


def slots_in(store: ExpertStore, size: int) -> int:
    """How many slots of the store `size` bytes have."""
    return min(store.rows, max(0, math.floor(size)) // store.slot_bytes)
