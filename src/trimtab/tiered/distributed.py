"""Tables that several processes train together: one per host, and each row is stepped once.

The processes of a host map one file, where values and moments lie as in a table of one process. Each process
accumulates the gradients of its own batches in a region of its own (the first process uses the records' gradients), so
that no backward pass waits for another process. Before a step the processes tell each other which rows they touched
(`exchange`), and a row's owner, number `row mod processes of the host`, adds the regions up where they are mapped:
nothing goes over a network. As with the gradients of parameters (DistributedDataParallel), the step uses the mean over
the processes.

Each of several hosts has a table. There the owners of a row on all hosts add up the sums of their hosts, some rows at a
time, and make the same step. No process reads rows before all owners are done (`settle`).

Every function here is a collective: all processes call it, in the same order.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import BadInput
from ..memory.budget import gib
from .mapped_file import MappedFile, require_space
from .planned import PlannedStore
from .store import GRADS, TieredStore
from .threads import parallel_map

MEMORY = "/dev/shm"  # a file system in RAM
PIECE = 2**24  # bytes of rows that go between hosts at a time


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model, seen from one of them."""

    size: int  # processes in all
    here: int  # of them on this host
    first: int  # the rank of this host's first process
    local: int  # this process's number on its host
    group: Any  # all processes, over gloo
    across: Any  # the processes of the same local number on all hosts; None on one host

    @classmethod
    def found(cls) -> Ranks | None:
        """None in a process that trains alone."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        size, rank = dist.get_world_size(), dist.get_rank()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        local = int(os.environ.get("LOCAL_RANK", rank % here))
        group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        made = cls(size, here, rank - local, local, group, None)
        found = made.every(torch.tensor([here, rank - local])).tolist()
        if found != [[here, number // here * here] for number in range(size)]:
            raise BadInput(
                f"train a table with {size} processes", "the hosts start unequal numbers of them, or out of order",
                "Start the same number on each host, with torchrun",
            )  # fmt: skip
        alike = [list(range(number, size, here)) for number in range(here)] if here < size else []
        groups = [dist.new_group(ranks, backend="gloo") for ranks in alike]
        return cls(size, here, rank - local, local, group, groups[local] if groups else None)

    def every(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, (processes, *shape), on the CPU."""
        mine = tensor.cpu().contiguous()
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self.group)
        return torch.stack(every)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes; equal in each to the last bit."""
        return self.every(tensor).sum(0)

    def lowest(self, table: Tensor, many: int) -> Tensor:
        """Of all processes' rows (X, Y), X at most `many`: the `many` with the lowest first number, in that order."""
        padded = torch.nn.functional.pad(table, (0, 0, 0, many - len(table)), value=float("inf"))
        every = self.every(padded).flatten(0, 1)
        every = every[every[:, 0].argsort(stable=True)[:many]]
        return every[every[:, 0].isfinite()]

    def map_file(self, size: int, folder: str, what: str) -> MappedFile:
        """`size` bytes of a new file, mapped by all processes of this host.

        The file is unlinked before it gets its size: a process that is killed leaves an empty file at most.
        """
        name, descriptor = "", -1

        def make() -> str:
            nonlocal name, descriptor
            descriptor, name = tempfile.mkstemp(prefix=".trimtab-rows-", dir=folder)
            return name

        def join() -> None:
            nonlocal descriptor
            descriptor = os.open(names[self.first], os.O_RDWR)

        def reserve() -> None:
            os.unlink(name)
            os.posix_fallocate(descriptor, 0, size)

        main = self.local == 0
        try:
            names = self._together(make if main else None)
            self._together(join if not main else None)
            self._together(reserve if main else None)
            return MappedFile(descriptor, size)
        except OSError as error:
            raise BadInput(
                f"{gib(size)} for {what} in {folder}, shared by several processes",
                error.strerror or str(error),
                "Name a folder with enough space that all processes of a host see (place: folder, slow: disk)",
            ) from None
        finally:
            if descriptor >= 0:
                os.close(descriptor)
            if name:
                Path(name).unlink(missing_ok=True)

    def _together(self, action: Callable[[], Any] | None) -> list[Any]:
        """Each process calls its `action`; -> the results of all. OSError in all of them if one fails."""
        result, why = None, ""
        try:
            result = action() if action else None
        except OSError as error:
            why = error.strerror or str(error)
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, (result, why), group=self.group)
        for _, why in every:
            if why:
                raise OSError(why)
        return [result for result, _ in every]


class SharedStore(TieredStore):
    """A table that the processes of a host map and train together."""

    ranks: Ranks

    def __init__(self, ranks: Ranks, *args: Any, **fields: Any):
        if fields.get("cache_bytes"):
            raise BadInput(
                "hot rows (cache) with several processes", "a copy in one process would miss another one's steps",
                "Set cache: 0, or start one process",
            )  # fmt: skip
        self.ranks = ranks
        self._others = torch.empty(0, dtype=torch.uint8)  # gradients of the host's processes after the first
        self._exchanged = False
        self._union: list[int] = []  # rows that some process touched, between exchange and step
        super().__init__(*args, **fields)
        self._regions: list[Tensor] = []  # gradients of each process of the host
        if self.trained:
            others = self._others.view(torch.float32).view(ranks.here - 1, self.rows, *self.shape)
            self._regions = [self._views[GRADS], *others]

    def _new_table(self, folder: str | None, more: int) -> Tensor:
        if self.slow == "ram":
            return self._map(MEMORY if Path(MEMORY).is_dir() else tempfile.gettempdir())[1]
        if more:
            size = self.rows * self.record_bytes + self._others_bytes
            require_space(size * (1 + more), folder, f"{1 + more} shared tables")
        self._file, table = self._map(folder or tempfile.gettempdir())
        return table

    def _map(self, folder: str) -> tuple[MappedFile, Tensor]:
        """-> the file and the table in it; the gradients of the processes after the first follow the table."""
        table = self.rows * self.record_bytes
        mapped = self.ranks.map_file(table + self._others_bytes, folder, self.name)
        whole = torch.frombuffer(mapped.map, dtype=torch.uint8)
        self._others = whole[table:]
        return mapped, whole[:table].view(self.rows, self.record_bytes)

    @property
    def _others_bytes(self) -> int:
        return (self.ranks.here - 1) * self.rows * self.parts[GRADS].nbytes if self.trained else 0

    @property
    def nbytes(self) -> dict[str, int]:
        """Of the host's one table."""
        sizes = super().nbytes
        tier = "slow" if sizes["slow"] else "fast"
        return {**sizes, tier: sizes[tier] + self._others_bytes}

    def _position(self, kind: str) -> tuple[int, int]:
        if kind == GRADS and not self._exchanged and self.ranks.local:
            size = self.parts[GRADS].nbytes
            return self.rows * (self.record_bytes + (self.ranks.local - 1) * size), size
        return super()._position(kind)

    def _current(self, kind: str) -> Tensor:
        """Gradients are this process's own until the exchange, and then, in the owner, means over all processes."""
        if kind == GRADS and not self._exchanged:
            return self._regions[self.ranks.local]
        return super()._current(kind)

    def stepped(self) -> list[int]:
        """-> the rows that have changed, whoever owns them."""
        assert self._exchanged, "a row would be stepped with one process's gradient"
        union = self._union
        super().stepped()
        self.changed(union)
        return union

    def forget(self) -> None:
        super().forget()
        self._union, self._exchanged = [], False

    def drop(self) -> None:
        super().drop()
        self._regions, self._others = [], torch.empty(0, dtype=torch.uint8)

    def flags(self) -> Tensor:
        """Which rows this process has a gradient for, (rows,)."""
        flags = torch.zeros(self.rows, dtype=torch.uint8)
        flags[self.pending()] = 1
        return flags

    def collect(self, touched_SN: Tensor) -> None:
        """Put the mean gradient of each row that this process owns into its record. `touched_SN`: the rows that each
        process touched."""
        ranks = self.ranks
        self._union = touched_SN.any(0).nonzero().flatten().tolist()
        own = [row for row in self._union if row % ranks.here == ranks.local]
        here_SN = touched_SN[ranks.first : ranks.first + ranks.here]
        for row in own:
            mean = self._views[GRADS][row]
            grads = [self._regions[process][row] for process in here_SN[:, row].nonzero().flatten().tolist()]
            if not grads:  # touched on other hosts only
                mean.zero_()
            elif grads[0].data_ptr() != mean.data_ptr():
                mean.copy_(grads[0])
            for gradient in grads[1:]:
                mean.add_(gradient)
            mean.div_(ranks.size)
        if ranks.across is not None:
            self._add_hosts(own)
        self._pending = dict.fromkeys(own)
        self._exchanged = True

    def _add_hosts(self, rows: list[int]) -> None:
        grads = self._views[GRADS]
        many = max(1, PIECE // self.parts[GRADS].nbytes)
        for at in range(0, len(rows), many):
            chosen = torch.tensor(rows[at : at + many])
            piece = grads[chosen]
            dist.all_reduce(piece, group=self.ranks.across)
            grads[chosen] = piece


def store_class(planned: bool) -> Callable[..., TieredStore]:
    """What makes a model's tables: for the planner, for this process alone, or shared by the processes that train."""
    ranks = None if planned else Ranks.found()
    return PlannedStore if planned else TieredStore if ranks is None else functools.partial(SharedStore, ranks)


@torch.no_grad()
def exchange(stores: Sequence[TieredStore]) -> None:
    """Make each row's gradient the mean over all processes, in its owner; tables exchanged before are skipped."""
    waiting = [store for store in stores if isinstance(store, SharedStore) and not store._exchanged]
    if waiting:
        touched = waiting[0].ranks.every(torch.cat([store.flags() for store in waiting])).bool()
        for store, touched_SN in zip(waiting, touched.split([store.rows for store in waiting], 1), strict=True):
            store.collect(touched_SN)


def grad_norm_squared(stores: Sequence[TieredStore]) -> float:
    """Of all rows' gradients together. Exchanges them first."""
    exchange(stores)
    own = sum(parallel_map(lambda store: store.grad_norm_squared(), stores))
    ranks = _ranks(stores)
    return own if ranks is None else summed(stores, [own])[0] / (ranks.size // ranks.here)


def summed(stores: Sequence[TieredStore], figures: Sequence[float]) -> list[float]:
    """Each figure over all processes that share the tables."""
    ranks = _ranks(stores)
    return list(figures) if ranks is None else ranks.total(torch.tensor(figures, dtype=torch.float64)).tolist()


def settle(stores: Sequence[TieredStore]) -> None:
    """Wait for all processes: afterwards all that they wrote into the tables can be read."""
    if (ranks := _ranks(stores)) is not None:
        dist.barrier(group=ranks.group)


def _ranks(stores: Sequence[TieredStore]) -> Ranks | None:
    return next((store.ranks for store in stores if store.ranks is not None), None)
