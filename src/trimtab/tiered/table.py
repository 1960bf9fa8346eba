"""Table: rows as records in the slow tier, and slots of the fast tier for hot rows.

A row is one *record* (record.py): its values and, if it is trained, Adam's two moments and the gradient. The slow tier
is host RAM or a mapped file. The file has no name: it is private to the process, and a run that is killed leaves
nothing behind.

`cache_bytes` keeps hot rows in slots of the fast tier: whole records, evicted least recently used first and written
back then. While a row has a slot, the table's own copy of it is out of date.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..foreign import foreach_copy
from .mapped_file import MappedFile, map_file, require_memory, require_space
from .record import GRADS, VALUES, adjacent_parts, layout
from .rows import Rows


@dataclass
class Traffic:
    """Rows found in a slot or not, bytes transferred in each direction, and how useful prefetching was."""

    hits: int = 0
    misses: int = 0
    up: int = 0  # bytes, slow to fast
    down: int = 0  # bytes, fast to slow
    needed: int = 0  # misses of fetches that a prefetch could have served
    foreseen: int = 0  # of these, rows whose prefetch was complete
    unused: int = 0  # bytes prefetched in vain; no other counter includes them


class Table:
    """`rows` rows of `shape` values each.

    `slow`: "ram" or "disk"; `folder`: where the file is made. `device`: the fast tier. `moments`: the precision of
    Adam's state (record.py); None for a table that is only read. `initial`: returns an iterator over the rows' values
    before training, (shape) each, in order; without it they are zeros. `more`: how many such tables will follow: all
    must fit before the first is made.
    """

    ranks: Any = None  # the processes that train the table together, if there are several (distributed.py)

    def __init__(
        self,
        name: str, rows: int, shape: tuple[int, ...], *, slow: str = "ram", folder: str | None = None,
        device: torch.device | None = None, dtype: torch.dtype = torch.float32,
        moments: torch.dtype | None = torch.float32, cache_bytes: int = 0,
        initial: Callable[[], Iterable[Tensor]] | None = None, more: int = 0,
    ):  # fmt: skip
        self.name, self.rows, self.shape, self.slow, self.initial = name, rows, shape, slow, initial
        self.device = device or torch.device("cpu")
        self.parts, self.record_bytes = layout(shape, dtype, moments)
        self.traffic = Traffic()
        self._file: MappedFile | None = None
        self._table = self._new_table(folder, more)
        self._views = {kind: self._view(self._table, kind) for kind in self.parts}
        self.slots = min(rows, cache_bytes // self.record_bytes)
        self._cache = self._new_slots()
        self._slots = {kind: self._view(self._cache, kind) for kind in self.parts}
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # row -> slot, least recently used first
        self._unwritten: set[int] = set()  # rows whose slot is newer than the table

    def _new_table(self, folder: str | None, more: int) -> Tensor:
        """(rows, record_bytes), zeros."""
        size, tables = self.rows * self.record_bytes, f"{1 + more} tables of {self.rows} rows"
        if self.slow == "disk":
            if more:
                require_space(size * (1 + more), folder, tables)
            self._file = map_file(size, folder, self.name)
            return torch.frombuffer(self._file.map, dtype=torch.uint8).view(self.rows, self.record_bytes)
        require_memory(size * (1 + more), tables)
        pinned = self.device.type == "cuda"
        return torch.zeros(self.rows, self.record_bytes, dtype=torch.uint8, pin_memory=pinned)

    def _new_slots(self) -> Tensor:
        return torch.zeros(self.slots, self.record_bytes, dtype=torch.uint8, device=self.device)

    def _view(self, table: Tensor, kind: str) -> Tensor:
        """(rows of `table`, *shape of the part), without a copy."""
        part = self.parts[kind]
        return table[:, part.offset : part.offset + part.nbytes].view(part.dtype).unflatten(1, part.shape)

    @property
    def in_place(self) -> bool:
        """Whether the model computes with rows where they lie."""
        return self.device.type == "cpu"

    @property
    def model_device(self) -> torch.device:
        """Where the model's own tensors are."""
        return self.device

    @property
    def trained(self) -> bool:
        return GRADS in self.parts

    @property
    def writes(self) -> bool:
        """Whether this process writes initial values and checkpoints into the table; of several, one does."""
        return self.ranks is None or self.ranks.local == 0

    @property
    def numel(self) -> int:
        """How many values the rows have together."""
        return self.rows * math.prod(self.shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a view of the table."""
        return tensor.untyped_storage().data_ptr() == self._table.untyped_storage().data_ptr()

    @property
    def nbytes(self) -> dict[str, int]:
        """{"fast": bytes, "slow": bytes} in each tier. Without an accelerator, RAM is the fast tier."""
        table = self.rows * self.record_bytes
        slow = 0 if self.slow == "ram" and self.in_place else table
        return {"fast": self.slots * self.record_bytes + table - slow, "slow": slow}

    def mapped(self) -> list[Tensor]:
        """The tensors that are mapped from a file, which the meter counts as slow tier."""
        return [self._table] if self._file is not None else []

    def fill(self) -> Iterator[Tensor]:
        """Write each row's initial values and yield them, (shape), one row at a time: all may be too large."""
        for row, values in enumerate(self.initial() if self.initial is not None else ()):
            self.overwrite(row, values)
            yield values

    def overwrite(self, row: int, values: Tensor) -> None:
        """Set a row's values; of several processes one writes them."""
        if self.writes:
            self.put(VALUES, [row], [values])

    def reset(self, rows: Collection[int]) -> None:
        """Make rows what they were before training: their initial values, and moments of zero."""
        if not rows or not self.writes:
            return
        assert self.initial is not None, "a table that is trained has initial values"
        for row, values in enumerate(self.initial()):
            if row in rows:
                zeros = {kind: [torch.zeros_like(self.part(kind, row))] for kind in self.parts if kind != GRADS}
                self.write([row], {**zeros, VALUES: [values]})

    # --- parts of rows ------------------------------------------------------------------------------------------------

    def part(self, kind: str, row: int) -> Tensor:
        """One part of one row, (shape): a view of its slot, or of the table."""
        slot = self._slot_of.get(row)
        return self._current(kind)[row] if slot is None else self._slots[kind][slot]

    def each(self, kind: str, rows: Sequence[int]) -> Rows:
        """`part` of several rows."""
        separate = {row: self.part(kind, row) for row in rows} if self._slot_of else None
        return Rows(rows, self._current(kind), separate)

    def gather(self, kind: str, rows: Sequence[int]) -> Tensor:
        """A copy of one part of several rows, (len(rows), *shape)."""
        if self._slot_of:
            return torch.stack(list(self.each(kind, rows)))
        return self._current(kind).index_select(0, torch.tensor(rows))

    def put(self, kind: str, rows: Sequence[int], parts: Sequence[Tensor] | Tensor) -> None:
        """Write one part of several rows, each of the part's shape."""
        self.write(rows, {kind: parts})

    def write(self, rows: Sequence[int], parts: dict[str, Sequence[Tensor] | Tensor]) -> None:
        """Write several parts, in the record's order; adjacent parts go to a file in one call a row."""
        if not rows:
            return
        if self._file is None or self._slot_of:
            for kind, values in parts.items():
                foreach_copy(list(self.each(kind, rows)), list(values))
            return
        for kinds in adjacent_parts(self.parts, parts):
            (start, step), data = self._position(kinds[0]), [self._bytes(kind, parts[kind]) for kind in kinds]
            for row, *pieces in zip(rows, *data, strict=True):
                self._file.write(start + row * step, *pieces)

    def _bytes(self, kind: str, values: Sequence[Tensor] | Tensor) -> Any:
        whole = values if isinstance(values, Tensor) else torch.stack(list(values))
        whole = whole.detach().to("cpu", self.parts[kind].dtype).contiguous()
        return whole.view(len(values), -1).view(torch.uint8).numpy()

    def _position(self, kind: str) -> tuple[int, int]:
        """Where `_current` begins in the file, and the distance between its rows, in bytes."""
        return self.parts[kind].offset, self.record_bytes

    def _current(self, kind: str) -> Tensor:
        """A part of the table, (rows, *shape), as this process sees it now."""
        return self._views[kind]

    def whole(self, kind: str = VALUES) -> Tensor:
        """(rows, *shape): a view of one part of the whole table. The slots are flushed first."""
        self.flush()
        return self._views[kind]

    def drop(self) -> None:
        """Release the tables; the file is freed with its last view."""
        self._views, self._slots = {}, {}
        self._table = self._cache = torch.empty(0, dtype=torch.uint8)
        self._slot_of.clear()
        self._file = None

    # --- the hot rows -------------------------------------------------------------------------------------------------

    def _admit(self, rows: Sequence[int]) -> None:
        """Give the rows slots: free ones first, then those of the least recently used rows that are not among them."""
        wanted, size = set(rows), self.parts[VALUES].nbytes
        for row in rows:
            if row in self._slot_of:
                self.traffic.hits += 1
                self._slot_of.move_to_end(row)
                continue
            self.traffic.misses += 1
            self.traffic.up += size
            slot = len(self._slot_of)
            if slot == len(self._cache):
                oldest = next(iter(self._slot_of))
                if oldest in wanted:  # the wanted rows are the most recently used: no slot is free
                    continue
                slot = self._evict(oldest)
            self._cache[slot].copy_(self._table[row])
            self._slot_of[row] = slot

    def _evict(self, row: int) -> int:
        slot = self._slot_of.pop(row)
        if row in self._unwritten:
            if self._file is None:
                self._table[row].copy_(self._cache[slot])
            else:
                self._file.write(row * self.record_bytes, self._cache[slot].cpu().numpy())
            self._unwritten.discard(row)
            self.traffic.down += self.record_bytes
        return slot

    def flush(self) -> None:
        """Write changed slots back, and free all slots."""
        for row in list(self._slot_of):
            self._evict(row)
