"""Rows of a file step as copies or where they are mapped: the quicker way, and the same bits."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from trimtab.memory import mapped
from trimtab.memory.row_adam import COPIES, MAPPED, Rates, RowAdam
from trimtab.memory.store import GRADS, VALUES, M, TieredStore, V
from trimtab.memory.trial import AGAIN, FIRST, Trial

WIDE = (4, 1024)  # of 16 KiB: in RAM, such rows step where they lie
KINDS = (VALUES, M, V)


@pytest.fixture(autouse=True)
def fixed(tmp_path, monkeypatch):
    """Wherever the tests' folder is."""
    monkeypatch.setattr(mapped, "FIXED", (mapped._file_system(os.stat(tmp_path).st_dev),))


class Told(Trial):
    """Goes one way where one is said, and remembers the ways that were gone."""

    def __init__(self, way: int | None = None):
        super().__init__()
        self.way, self.ways = way, []

    @contextmanager
    def round(self, work: int) -> Iterator[int]:
        with super().round(work) as way:
            self.ways.append(way if self.way is None else self.way)
            yield self.ways[-1]


def trained(folder, way=None, shape=WIDE, steps=12, decoupled=True, **fields) -> tuple[TieredStore, list[int]]:
    """-> a table after some steps, and the ways that its rows stepped."""
    made = TieredStore("table", 150, shape, folder=str(folder), **{"slow": "disk", **fields})
    draw, choose = torch.Generator().manual_seed(0), random.Random(0)
    made.put(VALUES, range(150), torch.randn(150, *shape, generator=draw))
    optimiser = RowAdam(made)
    optimiser.trial = Told(way)
    for step in range(steps):
        rows = choose.sample(range(150), 140 if step % 3 else 5)
        made.accumulate(rows, torch.randn(len(rows), *shape, generator=draw))
        made.grad_scale = 0.3 if step % 2 else 1.0  # as clipping does
        optimiser.step(Rates(1e-2, weight_decay=0.1, decoupled=decoupled))
    return made, optimiser.trial.ways


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("slots", [0, 40])
def test_both_ways_leave_the_same_bits(tmp_path, decoupled, slots):
    plain, ways = trained(tmp_path, slow="ram", decoupled=decoupled)
    assert ways == []
    for way, gone in ((COPIES, {COPIES}), (MAPPED, {MAPPED}), (None, {COPIES, MAPPED})):
        made, ways = trained(tmp_path, way, decoupled=decoupled, cache_bytes=slots * plain.extent)
        assert set(ways) == gone
        for kind in (VALUES, M, V):
            assert torch.equal(made.whole(kind), plain.whole(kind)), (way, kind)


def test_what_is_clipped_is_not_written_into_the_table(tmp_path):
    made = TieredStore("table", 150, WIDE, slow="disk", folder=str(tmp_path))
    optimiser = RowAdam(made)
    optimiser.trial = Told(MAPPED)
    made.accumulate([3], [torch.ones(WIDE)])
    made.grad_scale = 0.5
    assert optimiser.step(Rates(0.1)) == [3]
    assert made.part(GRADS, 3).eq(1).all() and made.part(M, 3).eq(torch.tensor(0.5) * (1 - 0.9)).all()


def test_a_file_system_that_may_run_full_is_not_written_to_through_the_mapping(tmp_path, monkeypatch):
    """There the kernel would end the process, where a write through the descriptor is an error to be told."""
    monkeypatch.setattr(mapped, "FIXED", ())
    assert trained(tmp_path, MAPPED, steps=3)[1] == []


def test_rows_of_which_both_ways_might_round_differently_step_as_copies(tmp_path):
    assert trained(tmp_path, MAPPED, shape=(3, 1000), steps=3)[1] == []


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_quicker_way_is_taken_and_the_other_looked_at_again(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    trial, costs = Trial(), [2.0, 1.0]

    def go(rounds: int) -> list[int]:
        ways = []
        for at in range(rounds):
            work = 1 + at % 4
            with trial.round(work) as way:
                ways.append(way)
                clock.now += costs[way] * work
        return ways

    assert go(FIRST) == [0, 1] * (FIRST // 2)
    assert go(AGAIN) == [1] * (AGAIN - FIRST) + [0] + [1] * (FIRST - 1)
    costs[:] = [1.0, 3.0]  # the machine has changed
    assert go(4 * AGAIN)[-AGAIN:].count(0) == AGAIN - 1


def test_no_work_tells_nothing():
    trial = Trial()
    for _ in range(2 * FIRST):
        with trial.round(0):
            pass
    assert trial.took == {}
