"""What a table is to the planner: shapes and seconds of a model without values.

The planner traces a training step on tensors without values, so it cannot tell which rows a batch uses. Here one row
stands for all in use. For memory it is an upper bound: of the rows that are processed in turn, one may have all tokens.
For time it is an expectation: as many rows as `expected_rows` predicts, all with the mean number of pairs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from .groups import FEW, Groups
from .record import GRADS, VALUES
from .rows import Rows
from .store import TieredStore
from .threads import max_workers

UNLIKE, SKEW = 0.735, 1.1  # see `touched`
QUANTILES = [NormalDist().inv_cdf((at + 0.5) / 32) for at in range(32)]


class PlannedStore(TieredStore):
    """A table of a model on the meta device. It takes no memory, and no row of it ever changes.

    `clock`: counts the seconds of work on it (cost/roofline.Clock), if the planner has set one. `used`: how many tokens
    of a backward pass used rows, and how many rows each.
    """

    clock: Any = None
    used = (0, 0)
    needs_transfer = False
    model_device = torch.device("meta")

    def _new_table(self, folder: str | None = None, more: int = 0) -> Tensor:
        return torch.empty(0, self.record_bytes, dtype=torch.uint8)

    _new_slots = _new_table

    def holds(self, tensor: Tensor) -> bool:
        return False

    def fill(self) -> Iterator[Tensor]:
        return iter(())

    def fetch(self, rows: Sequence[int], kinds: Sequence[str] = (VALUES,)) -> Rows:
        part = self.parts[VALUES]
        copied = self._table if self.in_place else torch.empty(self.rows, *part.shape, dtype=part.dtype)
        return Rows(rows, copied, {row: torch.empty(part.shape, dtype=part.dtype) for row in rows})

    def group(self, rows_TP: Tensor, used_TP: Tensor | None = None) -> Groups:
        order = rows_TP.flatten().argsort(stable=True)
        tokens = order.div(rows_TP.shape[1], rounding_mode="floor")
        times = expected_rows(self, *rows_TP.shape)
        sizes = [1] * self.rows  # all rows may be in use
        return PlannedGroups(self, tuple(rows_TP.shape), order, tokens, [0], sizes, times=times)

    def marked(self, flags_N: Tensor) -> list[int]:
        return [0]

    def most_wanted(self, rows_TP: Tensor) -> Tensor | None:
        return None

    def accumulate(self, rows: Sequence[int], grads: Sequence[Tensor] | Tensor) -> None:
        if self.clock is not None:
            self.clock.transfer(2 * len(rows) * self.parts[GRADS].nbytes, operations=len(rows))

    def whole(self, kind: str = VALUES) -> Tensor:
        part = self.parts[kind]
        return torch.empty(self.rows, *part.shape, dtype=part.dtype, device="meta")

    def repeated(self, times: float) -> Any:
        """A context: the clock counts what is done within it that many times."""
        return contextlib.nullcontext() if self.clock is None else self.clock.repeated(times)


def plan_step(patches: Sequence[Sequence[PlannedStore]]) -> None:
    """The memory of an optimizer step of each patch's tables: the largest copies of rows that exist at a time."""
    copies = sorted(max(store.optimizer.temporaries for store in stores) for stores in patches)
    torch.empty(sum(copies[-max_workers() :]), dtype=torch.uint8)


@dataclass(slots=True)
class PlannedGroups(Groups):
    """The first row stands for all in use. `times`: how often it would be used in place of them."""

    times: float = 1.0

    def chunks(self) -> Iterator[Groups]:
        store, (tokens, _), batch = self.store, self.shape, (self.store, self.shape, self.order)
        with store.repeated(0.0):
            yield PlannedGroups(*batch, self.tokens[:tokens], [0], [tokens], at=slice(0, tokens))
        if store.clock is None:
            return
        size = max(1, round(len(self.order) / self.times))
        few = max(1, min(self.chunk_rows, max(tokens, FEW) // size, round(self.times)))
        at = slice(0, few * size)
        with store.repeated(self.times / few):
            store.clock.transfer(few * store.parts[VALUES].nbytes / 2)  # their keys or values are read
            yield PlannedGroups(*batch, self.tokens[at], [0] * few, [size] * few, at=at)

    def each(self, rows: Iterable[Any], *parts_XY: Tensor, turned_YX: Sequence[Tensor] = ()) -> Iterator[tuple]:
        size = self.sizes[0]
        first = *(part[:size] for part in parts_XY), *(part[:, :size] for part in turned_YX)
        with self.store.repeated(len(self.rows)):
            yield next(iter(rows)), *first

    def accumulate(self, grads: Tensor) -> None:
        self.store.used = self.shape
        with self.store.repeated(self.times):
            self.store.accumulate(self.rows, grads[: len(self.rows)])


def touched(experts: int, tokens: int, probes: int) -> float:
    """How many of the experts a text of so many tokens is expected to probe.

    A router loads experts unevenly: an expert's load is assumed log-normal, with SKEW as the standard deviation of its
    logarithm. Tokens of one text are alike: T of them probe as many experts as T^UNLIKE unrelated tokens would (the
    form of Heaps' law). Both constants are fitted to SmolLM2-135M at 1,024 tokens and 8 probes, where shares of 0.93,
    0.84, 0.70, 0.54 and 0.35 of 128, 256, 512, 1,024 and 2,048 experts were probed; the fit is within 0.02 of each.
    """
    mean = tokens**UNLIKE * probes / experts
    loads = (mean * math.exp(SKEW * z - SKEW**2 / 2) for z in QUANTILES)
    return max(1.0, experts * sum(1 - math.exp(-load) for load in loads) / len(QUANTILES))


def expected_rows(store: TieredStore, tokens: int, probes: int, passes: int = 1) -> float:
    """How many of the table's rows this many training passes are expected to fetch."""
    return min(touched(store.rows, tokens * passes, probes), store.cap * passes)
