"""TieredStore: a table of rows in the slow tier, of which the rows at work are brought into the fast one.

A row is one *extent* (extent.py): its numbers and, where it is trained, Adam's two moments and the gradient. The slow
tier is host RAM or a file that is mapped (an unlinked one: it is this process's private copy, and a killed run leaves
nothing behind).

Where the model computes on the CPU, a row of a mapped file needs no copy at all: `fetch` gives views of the mapping, a
miss is a page that the kernel reads, and no anonymous memory grows. Before an accelerator, `fetch` gathers the rows
into one buffer on the device. A row is never left out: what no slot holds is read from the slow tier, more slowly.

Hot rows may be kept in slots of the fast tier (`cache_bytes`): whole extents, least recently used first to go, written
back when they go. While a row has a slot, the slot is the row.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..foreign import foreach_copy
from .mapped_file import MappedFile, map_file, require_memory, require_room
from .prefetch import Ask, Reader
from .record import GRADS, PAGE, VALUES, joined, layout, spans
from .record import M as M
from .record import V as V
from .rows import Rows as Rows
from .traffic import Traffic

SENSED = 4  # rows of a fetch that are looked at to see whether all are still in memory


class TieredStore:
    """`rows` rows of `shape` numbers each.

    `slow`: "ram" or "disk"; `planned`: shapes only, for the planner. `folder`: where the file is made. `device`: the
    fast tier. `moments`: the precision of Adam's state (extent.py); None for a table that is only read. `more`: how
    many such tables will follow: the disk must have room for all of them before the first is made.
    """

    clock: Any = None  # of a planned table: what counts the seconds of work on it (roofline.Clock)
    asked = (0, 0)  # of a planned table: how many tokens asked for rows in a pass with gradients, each for how many
    ranks: Any = None  # the processes that train it together, if there are several (shared_rows.py)

    def __init__(
        self,
        name: str, rows: int, shape: tuple[int, ...], *, slow: str = "ram", folder: str | None = None,
        device: torch.device | None = None, dtype: torch.dtype = torch.float32,
        moments: torch.dtype | None = torch.float32, cache_bytes: int = 0, planned: bool = False, more: int = 0,
    ):  # fmt: skip
        self.name, self.rows, self.shape, self.slow, self.planned = name, rows, shape, slow, planned
        self.most = rows  # that a pass in training brings up
        self.device = device or torch.device("cpu")
        self._where = torch.device("cpu") if planned else self.device  # a plan is traced there, for whatever device
        self.parts, self.extent = layout(shape, dtype, moments)
        self.traffic = Traffic()
        self.grad_scale = 1.0  # what the pending gradients are multiplied by in the step (clipping)
        self.catch_up: Any = None  # called with the rows about to be read, where the optimiser has steps to make up
        self.optimiser: Any = None  # what steps the rows, where they are trained; its state belongs to a checkpoint
        self.saved: tuple[int, int] | None = None  # the file after which the dirty set counts: device, inode
        self.reader: Reader | None = None  # reads rows ahead (ahead.py)
        self.carried = 0  # bytes of rows on their way to the device at once, at most
        self._expected: Ask | None = None  # the rows that the next `fetch` is thought to need
        self._file: MappedFile | None = None
        self._pending: dict[int, None] = {}  # rows with a gradient, in the order of their first one
        self._dirty: set[int] = set()  # rows changed since the last checkpoint
        self.touched: set[int] = set()  # rows changed since they were drawn
        self.draw: Any = None  # called with rows that are zeros again, to make them as they were at the start
        self.filled: Any = None  # called when a file has been read into the table
        if planned:
            self._table = torch.empty(0, dtype=torch.uint8)
            self._views: dict[str, Tensor] = {}
        else:
            self._table = self._file_table(folder, more) if slow == "disk" else self._ram_table(more)
            self._views = {kind: self._view(self._table, kind) for kind in self.parts}
        self.slots = min(rows, cache_bytes // self.extent)
        self._cache = torch.zeros(0 if planned else self.slots, self.extent, dtype=torch.uint8, device=self._where)
        self._slots = {kind: self._view(self._cache, kind) for kind in self.parts}
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # row -> slot, least recently used first
        self._unwritten: set[int] = set()  # rows whose slot is newer than the table

    # --- the slow tier ------------------------------------------------------------------------------------------------

    def _ram_table(self, more: int) -> Tensor:
        require_memory(self.rows * self.extent * (1 + more), f"{1 + more} tables of {self.rows} rows")
        pinned = self.device.type == "cuda"
        return torch.zeros(self.rows, self.extent, dtype=torch.uint8, pin_memory=pinned)

    def _file_table(self, folder: str | None, more: int) -> Tensor:
        size = self.rows * self.extent
        if more:
            require_room(size * (1 + more), folder, f"{1 + more} tables of {self.rows} rows")
        self._file = map_file(size, folder, self.name)
        return torch.frombuffer(self._file.map, dtype=torch.uint8).view(self.rows, self.extent)

    def _view(self, table: Tensor, kind: str) -> Tensor:
        """(rows of `table`, *shape of the part), without a copy."""
        part = self.parts[kind]
        return table[:, part.offset : part.offset + part.nbytes].view(part.dtype).unflatten(1, part.shape)

    @property
    def in_place(self) -> bool:
        """Whether rows are computed with where they lie."""
        return self.device.type == "cpu"

    @property
    def trained(self) -> bool:
        return GRADS in self.parts

    @property
    def writes(self) -> bool:
        """Whether it is this process that fills the table."""
        return self.ranks is None or self.ranks.local == 0

    @property
    def numel(self) -> int:
        """How many numbers the rows hold."""
        return self.rows * math.prod(self.shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a view of the table."""
        return not self.planned and tensor.untyped_storage().data_ptr() == self._table.untyped_storage().data_ptr()

    @property
    def nbytes(self) -> dict[str, int]:
        """{"fast": bytes, "slow": bytes}: what is held in each tier. Without a GPU, RAM is the fast one."""
        table = self.rows * self.extent
        slow = 0 if self.slow == "ram" and self.in_place else table
        return {"fast": self.slots * self.extent + table - slow, "slow": slow}

    def mapped(self) -> list[Tensor]:
        """The storages that are mapped from a file, for the meter: slow tier."""
        return [self._table] if self._file is not None else []

    # --- rows in work -------------------------------------------------------------------------------------------------

    def fetch(self, rows: Sequence[int], kinds: Sequence[str] = (VALUES,)) -> Rows:
        """The rows' numbers on the fast device, each of `shape`: views, valid until the next optimiser step.

        `kinds`: the parts of the rows that will be touched; all that lie in a file are read from now on.
        """
        if self.planned:
            brought = self._table if self.in_place else self._empty(VALUES, self.rows)  # at most
            return Rows(rows, brought, {row: self._empty(VALUES) for row in rows})
        carried = self._meet(rows, kinds)
        if self.catch_up is not None:
            self.catch_up(rows)
        if len(self._cache):
            self._admit(rows)
        else:
            self.traffic.misses += len(rows)
            self.traffic.up += len(rows) * self.parts[VALUES].nbytes
        if self.in_place:
            return self.each(VALUES, rows)
        others = [row for row in rows if row not in carried]
        gathered = self._empty(VALUES, len(others))
        for slot, row in zip(gathered, others, strict=True):
            carried[row] = slot.copy_(self.part(VALUES, row), non_blocking=True)
        return Rows(rows, gathered, carried)

    def _empty(self, kind: str, *many: int, device: Any = None) -> Tensor:
        part = self.parts[kind]
        return torch.empty(*many, *part.shape, dtype=part.dtype, device=device or self._where)

    def lying(self, rows: Sequence[int]) -> Rows:
        """The rows' numbers for the host's processor, each of `shape`: nothing is brought up."""
        if self.catch_up is not None:
            self.catch_up(rows)
        held = self.each(VALUES, rows)
        return Rows(rows, self._table, {row: tensor.cpu() for row, tensor in zip(rows, held, strict=True)})

    def part(self, kind: str, row: int) -> Tensor:
        """One part of one row, (shape), where it is now: in its slot, or in the table."""
        slot = self._slot_of.get(row)
        return self._lies(kind)[row] if slot is None else self._slots[kind][slot]

    def each(self, kind: str, rows: Sequence[int]) -> Rows:
        """`part` of several rows."""
        apart = {row: self.part(kind, row) for row in rows} if self._slot_of else None
        return Rows(rows, self._lies(kind), apart)

    def gather(self, kind: str, rows: Sequence[int]) -> Tensor:
        """A copy of one part of several rows, (len(rows), *shape)."""
        if self._slot_of:
            return torch.stack(list(self.each(kind, rows)))
        return self._lies(kind).index_select(0, torch.tensor(rows))

    def put(self, kind: str, rows: Sequence[int], parts: Sequence[Tensor] | Tensor) -> None:
        """Write one part of several rows, each of the part's shape."""
        self.write(rows, {kind: parts})

    def write(self, rows: Sequence[int], parts: dict[str, Sequence[Tensor] | Tensor]) -> None:
        """`put` of several parts, in the extent's order; to a file, those without a gap between them go at once."""
        if not rows:
            return
        if self._file is None or self._slot_of:
            for kind, given in parts.items():
                foreach_copy(list(self.each(kind, rows)), list(given))
            return
        for kinds in joined(self.parts, parts):
            (start, step), data = self._at(kinds[0]), [self._bytes(kind, parts[kind]) for kind in kinds]
            for row, *pieces in zip(rows, *data, strict=True):
                self._file.write(start + row * step, *pieces)

    def _bytes(self, kind: str, given: Sequence[Tensor] | Tensor) -> Any:
        whole = given if isinstance(given, Tensor) else torch.stack(list(given))
        whole = whole.detach().to("cpu", self.parts[kind].dtype).contiguous()
        return whole.view(len(given), -1).view(torch.uint8).numpy()

    def _at(self, kind: str) -> tuple[int, int]:
        """Where `_lies` begins in the file, and how far its rows are apart, in bytes."""
        return self.parts[kind].offset, self.extent

    def _lies(self, kind: str) -> Tensor:
        """A part of the table, (rows, *shape), as this process sees it now."""
        return self._views[kind]

    def accumulate(self, rows: Sequence[int], grads: Sequence[Tensor] | Tensor) -> None:
        """Add each row's gradient (shape), of different rows, to what it has since the last optimiser step."""
        if self.planned:
            if self.clock is not None:
                self.clock.moved(2 * len(rows) * self.parts[GRADS].nbytes, operations=len(rows))
            return
        old = [at for at, row in enumerate(rows) if row in self._pending]
        sums = {at: held + grads[at].to(held.device) for at in old for held in [self.part(GRADS, rows[at])]}
        self.put(GRADS, rows, [sums.get(at, grad) for at, grad in enumerate(grads)] if sums else grads)
        self._pending |= dict.fromkeys(rows)
        self._unwritten |= self._slot_of.keys() & set(rows)
        self.traffic.down += len(rows) * self.parts[GRADS].nbytes

    def pending(self) -> list[int]:
        """Rows that have a gradient."""
        return list(self._pending)

    def grad_norm_squared(self) -> float:
        """Of all pending gradients together."""
        return float(torch.nn.utils.get_total_norm(list(self.each(GRADS, self.pending())))) ** 2

    def stepped(self) -> list[int]:
        """The optimiser has used the pending gradients: they are gone. -> their rows, which are changed."""
        rows = self.pending()
        self.changed(rows)
        self.forget()
        return rows

    def forget(self) -> None:
        """Let the pending gradients go unused."""
        self._pending = {}
        self.grad_scale = 1.0

    def changed(self, rows: Iterable[int]) -> None:
        """Say that rows were written to through `part`."""
        self._let_go()
        rows = set(rows)
        self._dirty |= rows
        self.touched |= rows
        self._unwritten |= self._slot_of.keys() & rows

    # --- rows to come -------------------------------------------------------------------------------------------------

    @property
    def far(self) -> bool:
        """Whether a row may have to be read from a file, or copied to a device, before it is computed with."""
        return not self.planned and (self._file is not None or not self.in_place)

    @property
    def home(self) -> Tensor | None:
        """The rows' numbers in the slow tier, (rows, *shape); None of a table that was dropped."""
        return self._views.get(VALUES)

    def pages(self, rows: Sequence[int], kinds: Sequence[str]) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Where parts of rows lie: -> the table, and (address, bytes, how many of the rows are whole by then)."""
        table = self._table
        found = spans(self.parts, self.extent, rows, kinds) if table.nbytes else ()
        return table, [(table.data_ptr() + start, length, whole) for start, length, whole in found]

    @property
    def awaits(self) -> bool:
        """Whether it pays to say which rows will be needed: not where all were found in memory lately."""
        return self.reader is not None and (not self.in_place or self.reader.cold)

    def expect(self, rows: Sequence[int], kinds: Sequence[str] = (VALUES,)) -> None:
        """These rows are thought to be what is fetched next: they are read meanwhile, and nobody waits for them."""
        self._let_go()
        if self.reader is not None and (self.in_place or self.catch_up is None):
            self._expected = self.reader.ask(self, self._without_slot(rows), self._touched(kinds))

    def hasten(self, rows: Sequence[int], kinds: Sequence[str]) -> None:
        """These parts will be touched now: read them before any guess, unless what is looked at of them is there."""
        if self.reader is not None and self.in_place:
            rows, kinds = self._without_slot(rows), self._touched(kinds)
            if self.reader.cold or not self.reader.sees(self._some_pages(rows, kinds)):
                self.reader.ask(self, rows, kinds, now=True)

    def _some_pages(self, rows: Sequence[int], kinds: Sequence[str]) -> Iterator[int]:
        for row in rows[:: -(-len(rows) // SENSED) or 1]:
            for kind in kinds:
                yield self._table.data_ptr() + (row * self.extent + self.parts[kind].offset) // PAGE * PAGE

    def _without_slot(self, rows: Sequence[int]) -> Sequence[int]:
        return [row for row in rows if row not in self._slot_of] if self._slot_of else rows

    def _touched(self, kinds: Sequence[str]) -> Sequence[str]:
        whole = self.slots or self.catch_up is not None  # rows go to slots, or make up steps
        return tuple(self.parts) if whole else [kind for kind in kinds if kind != GRADS or self.writes]

    def _meet(self, rows: Sequence[int], kinds: Sequence[str]) -> dict[int, Tensor]:
        """Ask for those of the rows that are not there yet; -> those that were carried to the device."""
        if self.reader is None:
            return {}
        ask, watched, rows = self._expected, self.awaits, self._without_slot(rows)
        there = {} if ask is None else {row: at for at, row in enumerate(ask.rows[: ask.done])}
        self._let_go(rows)
        if watched or ask is not None:
            self.traffic.needed += len(rows)
            self.traffic.foreseen += sum(row in there for row in rows)
        self.hasten([row for row in rows if row not in there], kinds)
        if ask is None or ask.load is None:
            return {}
        ask.load.arrive()
        return {row: ask.load.buffer[there[row]] for row in rows if row in there}

    def _let_go(self, used: Iterable[int] = ()) -> None:
        """What was expected is no more, and of what was read only `used` was needed."""
        ask, self._expected = self._expected, None
        if ask is not None:
            ask.over = True
            self.traffic.unused += len(set(ask.read).difference(used)) * self.parts[VALUES].nbytes

    # --- the hot rows -------------------------------------------------------------------------------------------------

    def _admit(self, rows: Sequence[int]) -> None:
        """Give the rows slots: the free ones first, then those of the least recently used that are not asked for."""
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
                if oldest in wanted:  # those asked for are the newest: no slot is free for this one
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
                self._file.write(row * self.extent, self._cache[slot].cpu().numpy())
            self._unwritten.discard(row)
            self.traffic.down += self.extent
        return slot

    def flush(self) -> None:
        """Write back every slot that is newer than the table, free all slots, and expect no rows any more."""
        self._let_go()
        for row in list(self._slot_of):
            self._evict(row)

    # --- the table as a whole -----------------------------------------------------------------------------------------

    def whole(self, kind: str = VALUES) -> Tensor:
        """(rows, *shape): a part of the whole table where it lies. The slots are flushed first."""
        self.flush()
        return self._empty(kind, self.rows, device="meta") if self.planned else self._views[kind]

    def dirty_rows(self) -> list[int]:
        """Rows changed since `clean` was last called."""
        return sorted(self._dirty)

    def clean(self, saved: tuple[int, int] | None = None) -> None:
        """The rows are as a checkpoint has them, whose newest file is `saved`."""
        self._dirty, self.saved = set(), saved

    def drop(self) -> None:
        """Let go of the tables; the file goes with its last view."""
        self._let_go()
        self._views, self._slots = {}, {}
        self._table = self._cache = torch.empty(0, dtype=torch.uint8)
        self._slot_of.clear()
        self._file = None
