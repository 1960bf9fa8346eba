"""TieredStore: a table whose rows stay in a slow tier; the rows in use are fetched to the fast tier.

The fast tier is the memory in which the model computes: an accelerator's or, without one, the process's own. The slow
tier is host RAM or a mapped file (table.py).

If the model computes on the CPU, rows of a mapped file are not copied: `fetch` returns views of the mapping, the kernel
reads pages that are missing, and the process's anonymous memory does not grow. For an accelerator, `fetch` gathers the
rows into one buffer on the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .groups import Groups
from .prefetch import CARRIED, Reader, Request
from .record import GRADS, PAGE, VALUES, spans
from .record import M as M
from .record import V as V
from .rows import Rows as Rows
from .table import Table

SAMPLED = 4  # rows of a fetch whose pages are checked, to see whether all are in memory


class TieredStore(Table):
    """A table of which a model uses rows, and the account of what was used, changed and read ahead.

    `cap`: how many rows a training pass uses at most; 0: all. `reader`: prefetches rows. `fields`: those of Table.
    """

    def __init__(
        self, name: str, rows: int, shape: tuple[int, ...], *, cap: int = 0, reader: Reader | None = None, **fields: Any
    ):
        super().__init__(name, rows, shape, **fields)
        self.cap = min(cap or rows, rows)
        self.optimizer: Any = None  # RowAdam, if the rows are trained; checkpoints include its state
        self.grad_scale = 1.0  # the next step multiplies the gradients by this
        self.saved: tuple[int, int] | None = None  # device and inode of the file that dirty rows are counted from
        self.touched: set[int] = set()  # rows that differ from their initial values
        self.carried = 0 if reader is None or self.in_place else min(CARRIED, rows * self.parts[VALUES].nbytes)
        self.reader = reader if self.needs_transfer else None
        self._copies: Callable[[], None] | None = None  # updates copies of the whole table
        self._prefetched: Request | None = None
        self._pending: dict[int, None] = {}  # rows with a gradient, in the order of their first one
        self._dirty: set[int] = set()  # rows changed since the last checkpoint

    # --- rows in use --------------------------------------------------------------------------------------------------

    def group(self, rows_TP: Tensor, used_TP: Tensor | None = None) -> Groups:
        """The pairs of a token and a row that it uses, sorted by row. `used_TP`: which of the pairs count (default:
        all)."""
        flat = rows_TP.flatten()
        order = flat.argsort(stable=True)
        if used_TP is not None:
            order = order[used_TP.flatten()[order]]
            flat = flat[order]
        tokens = order.div(rows_TP.shape[1], rounding_mode="floor")
        counts = torch.bincount(flat, minlength=self.rows)
        rows = counts.nonzero().flatten()
        return Groups(self, tuple(rows_TP.shape), order, tokens, rows.tolist(), counts[rows].tolist())

    def marked(self, flags_N: Tensor) -> list[int]:
        """The rows whose flag is set."""
        return flags_N.nonzero().flatten().tolist()

    def most_wanted(self, rows_TP: Tensor) -> Tensor | None:
        """The `cap` rows that most tokens want, (cap,); None if tokens want no more rows than that."""
        if self.cap == self.rows:
            return None
        wanted_N = torch.bincount(rows_TP.flatten(), minlength=self.rows)
        if wanted_N.count_nonzero() <= self.cap:
            return None
        return wanted_N.argsort(descending=True, stable=True)[: self.cap]

    def fetch(self, rows: Sequence[int], kinds: Sequence[str] = (VALUES,)) -> Rows:
        """The rows' values on the fast device, each of `shape`: views, valid until the next optimizer step.

        `kinds`: the parts of the rows that will be used; missing pages of all of them are requested from the disk.
        """
        carried = self._await_prefetch(rows, kinds)
        self.catch_up(rows)
        if self.slots:
            self._admit(rows)
        else:
            self.traffic.misses += len(rows)
            self.traffic.up += len(rows) * self.parts[VALUES].nbytes
        if self.in_place:
            return self.each(VALUES, rows)
        others = [row for row in rows if row not in carried]
        part = self.parts[VALUES]
        gathered = torch.empty(len(others), *part.shape, dtype=part.dtype, device=self.device)
        for slot, row in zip(gathered, others, strict=True):
            carried[row] = slot.copy_(self.part(VALUES, row), non_blocking=True)
        return Rows(rows, gathered, carried)

    def on_host(self, rows: Sequence[int]) -> Rows:
        """The rows' values, each of `shape`, for computing on the host: nothing is copied to the device."""
        self.catch_up(rows)
        values = zip(rows, self.each(VALUES, rows), strict=True)
        return Rows(rows, self._table, {row: tensor.cpu() for row, tensor in values})

    # --- gradients and steps ------------------------------------------------------------------------------------------

    def attach(self, optimizer: Any) -> None:
        """From now on `optimizer` (RowAdam) steps the rows."""
        self.optimizer = optimizer

    @property
    def exact(self) -> bool:
        """Whether rows may have missed optimizer steps, which are made up for before they are read."""
        return self.optimizer is not None and self.optimizer.mode == "exact"

    def catch_up(self, rows: Sequence[int] | None = None) -> None:
        """Make up for the steps that these rows (default: all) missed."""
        if self.exact:
            self.optimizer.catch_up(rows)

    def accumulate(self, rows: Sequence[int], grads: Sequence[Tensor] | Tensor) -> None:
        """Add a gradient (shape) to each of these rows, which must differ; an optimizer step uses the sums."""
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

    def scale_grads(self, factor: float) -> None:
        """Multiply the pending gradients by `factor` when the next step uses them (clipping)."""
        self.grad_scale = factor

    def stepped(self) -> list[int]:
        """The optimizer has used the pending gradients; they are dropped. -> their rows, now changed."""
        rows = self.pending()
        self.changed(rows)
        self.forget()
        return rows

    def forget(self) -> None:
        """Drop the pending gradients."""
        self._pending = {}
        self.grad_scale = 1.0

    def changed(self, rows: Iterable[int]) -> None:
        """Call after writing to rows through views."""
        self._cancel_prefetch()
        rows = set(rows)
        self._dirty |= rows
        self.touched |= rows
        self._unwritten |= self._slot_of.keys() & rows

    # --- prefetching --------------------------------------------------------------------------------------------------

    @property
    def needs_transfer(self) -> bool:
        """Whether rows may have to be read from a file, or copied to a device, before they are used."""
        return self.slow == "disk" or not self.in_place

    @property
    def slow_values(self) -> Tensor | None:
        """The rows' values in the slow tier, (rows, *shape); None after `drop`."""
        return self._views.get(VALUES)

    def pages(self, rows: Sequence[int], kinds: Sequence[str]) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Where parts of rows lie: -> the table, and spans of (address, bytes, how many rows are complete by then)."""
        table = self._table
        found = spans(self.parts, self.record_bytes, rows, kinds) if table.nbytes else ()
        return table, [(table.data_ptr() + start, length, whole) for start, length, whole in found]

    @property
    def wants_prefetch(self) -> bool:
        """Whether prefetching pays: not if all rows were in memory lately."""
        return self.reader is not None and (not self.in_place or self.reader.cold)

    def prefetch(self, rows: Sequence[int], kinds: Sequence[str] = (VALUES,)) -> None:
        """Start reading the rows that the next `fetch` will need. Returns at once."""
        self._cancel_prefetch()
        if self.reader is not None and (self.in_place or not self.exact):
            self._prefetched = self.reader.request(self, self._without_slot(rows), self._used(kinds))

    def demand_read(self, rows: Sequence[int], kinds: Sequence[str]) -> None:
        """Request these parts ahead of all prefetches; skipped if sampled pages are resident. Returns at once."""
        if self.reader is not None and self.in_place:
            rows, kinds = self._without_slot(rows), self._used(kinds)
            if self.reader.cold or not self.reader.resident(self._some_pages(rows, kinds)):
                self.reader.request(self, rows, kinds, now=True)

    def _some_pages(self, rows: Sequence[int], kinds: Sequence[str]) -> Iterator[int]:
        for row in rows[:: -(-len(rows) // SAMPLED) or 1]:
            for kind in kinds:
                yield self._table.data_ptr() + (row * self.record_bytes + self.parts[kind].offset) // PAGE * PAGE

    def _without_slot(self, rows: Sequence[int]) -> Sequence[int]:
        return [row for row in rows if row not in self._slot_of] if self._slot_of else rows

    def _used(self, kinds: Sequence[str]) -> Sequence[str]:
        """The parts that are read when `kinds` are used: all of them if rows go to slots, or make up for steps."""
        whole = self.slots or self.exact
        return tuple(self.parts) if whole else [kind for kind in kinds if kind != GRADS or self.writes]

    def _await_prefetch(self, rows: Sequence[int], kinds: Sequence[str]) -> dict[int, Tensor]:
        """End the prefetch and request what it has not read yet; -> the rows that it has copied to the device."""
        if self.reader is None:
            return {}
        request, counted, rows = self._prefetched, self.wants_prefetch, self._without_slot(rows)
        self._cancel_prefetch(rows)
        ready = set() if request is None else set(request.rows[: request.done])
        if counted or request is not None:
            self.traffic.needed += len(rows)
            self.traffic.foreseen += len(ready.intersection(rows))
        self.demand_read([row for row in rows if row not in ready], kinds)
        return {} if request is None else request.arrive()

    def _cancel_prefetch(self, used: Iterable[int] = ()) -> None:
        """Drop the prefetch. Of the rows that it has read, only `used` were needed."""
        request, self._prefetched = self._prefetched, None
        if request is not None:
            request.cancelled = True
            self.traffic.unused += len(set(request.read).difference(used)) * self.parts[VALUES].nbytes

    # --- the account of changes ---------------------------------------------------------------------------------------

    def flush(self) -> None:
        self._cancel_prefetch()
        super().flush()

    def drop(self) -> None:
        self._cancel_prefetch()
        super().drop()

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within it the table may be read. Afterwards the counters are as before, and all slots are free."""
        before = dataclasses.replace(self.traffic)
        try:
            yield
        finally:
            self.flush()
            self.traffic = before

    def dirty_rows(self) -> list[int]:
        """Rows changed since `clean` was last called."""
        return sorted(self._dirty)

    def clean(self, saved: tuple[int, int] | None = None) -> None:
        """The rows are as in a checkpoint whose newest file is `saved` (device, inode)."""
        self._dirty, self.saved = set(), saved

    def loaded(self, rows: set[int], saved: tuple[int, int]) -> None:
        """A checkpoint was loaded: `rows` differ from their initial values, and `saved` is its newest file."""
        self.touched = rows
        self.clean(saved)
        self.rewritten()

    def keep_copy(self, update: Callable[[], None]) -> None:
        """Have `update` called whenever the whole table was rewritten."""
        self._copies = update

    def rewritten(self) -> None:
        """Call after rewriting the whole table."""
        if self._copies is not None:
            self._copies()
