"""Rows read ahead: what is asked for and when, what is counted, that nothing depends on it, and how the thread ends."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils.data import DataLoader

from helpers_prefetch import SHAPE, alone, running, store
from trimtab.tiered import prefetch
from trimtab.tiered.prefetch import PATIENCE, WAITING, Reader
from trimtab.tiered.record import PAGE, layout, spans
from trimtab.tiered.store import GRADS, SAMPLED, VALUES, TieredStore

# --- which pages ----------------------------------------------------------------------------------------------------


def test_neighbours_are_read_at_once():
    parts, size = layout(SHAPE, torch.float32, torch.float32)
    assert size == 4 * PAGE
    assert list(spans(parts, size, [0, 1, 5], [VALUES])) == [(0, PAGE, 1), (size, PAGE, 2), (5 * size, PAGE, 3)]
    both = [(0, PAGE, 0), (3 * PAGE, 2 * PAGE, 1), (size + 3 * PAGE, PAGE, 2)]
    assert list(spans(parts, size, [0, 1], [VALUES, GRADS])) == both
    assert list(spans(parts, size, [2, 3, 4, 9], list(parts))) == [
        (2 * size, 3 * size, 3), (9 * size, size, 4)
    ]  # fmt: skip
    parts, size = layout((10,), torch.float32, None)  # many rows in a page
    apart = [(0, 3 * 64 + 40, 2), (3 * PAGE, 200 * 64 + 40 - 3 * PAGE, 3)]
    assert list(spans(parts, size, [0, 3, 200], [VALUES])) == apart
    assert list(spans(parts, size, [], [VALUES])) == []


def test_rows_of_a_file_come_into_memory():
    made = TieredStore("table", 400, (64, 256), slow="disk", reader=Reader(alone=True))
    pages = prefetch._Pages()
    at = [made._table.data_ptr() + row * made.record_bytes for row in range(400)]
    if pages.resident(at[0], 16 * PAGE):
        pytest.skip("the file system keeps files in memory")
    made.prefetch([300, 20, 310])
    assert not any(pages.resident(at[row], 16 * PAGE) for row in (300, 20, 310)), "asked for, and not waited for"
    made.reader.serve()
    assert all(pages.resident(at[row], 16 * PAGE) for row in (300, 20, 310)) and made.reader.cold
    assert not pages.resident(at[200], 16 * PAGE)
    made.fetch([20, 300, 399])
    found = made.traffic
    assert (found.needed, found.foreseen, found.unused) == (3, 2, made.parts[VALUES].nbytes)
    assert (found.misses, found.up) == (3, 3 * made.parts[VALUES].nbytes), "what is read ahead is counted once"


def test_a_kernel_that_knows_less_is_asked_for_less():
    pages, asked = prefetch._Pages(), []

    class Old:
        def madvise(self, start, length, advice):
            asked.append(advice)
            prefetch.ctypes.set_errno(22)
            return -1

    pages.libc, pages.mincore, pages.populate = Old(), lambda *args: -1, True
    for _ in range(2):
        assert not pages.resident(0, PAGE)
        pages.request(0, PAGE)
        pages.map_in(0, PAGE)
    assert asked == [prefetch.WILLNEED, prefetch.POPULATE_READ, prefetch.WILLNEED]
    pages.libc = pages.mincore = None
    pages.request(0, PAGE)
    assert not pages.resident(0, PAGE)


# --- what is asked for ----------------------------------------------------------------------------------------------


def test_demand_reads_go_before_prefetches():
    reader = alone()
    coming, needed = store(reader=reader), store(reader=reader)
    coming.prefetch([1, 2])
    needed.fetch([7])
    reader.serve()
    first = needed._table.data_ptr() + 7 * needed.record_bytes
    assert reader._work.pages.ordered[0] == (first, PAGE) and len(reader._work.pages.ordered) == 3
    assert reader._work.pages.brought == reader._work.pages.ordered[1:], "what is needed now is touched anyway"


def test_a_prefetch_that_is_late_is_cancelled_and_the_rest_requested():
    reader = alone()
    made = store(reader=reader)
    made.prefetch([1, 2, 3])
    made.fetch([2, 3, 4])
    assert made.traffic.needed == 3 and made.traffic.foreseen == 0
    reader.serve()
    base = made._table.data_ptr()
    assert [at for at, _ in reader._work.pages.ordered] == [base + row * made.record_bytes for row in (2, 3, 4)]


def test_where_all_is_in_memory_a_few_rows_are_checked_and_nothing_is_prefetched():
    reader = alone()
    made, calls = store(rows=40, reader=reader), reader._work.calls
    pages = reader._work.pages
    assert not made.wants_prefetch
    made.fetch(range(40))
    assert made.wants_prefetch, "one of the rows that were looked at was not there: all are read"
    reader.serve()
    assert len(pages.ordered) == 40 and made.traffic.needed == 0
    for _ in range(PATIENCE):
        assert made.wants_prefetch
        made.fetch([1])
        reader.serve()
    made.fetch(range(40))
    assert not made.wants_prefetch and not reader._work.urgent and len(pages.ordered) == 40 and calls.empty()
    assert made.traffic.needed == PATIENCE, "counted while rows had to be read"
    pages.held.discard(made._table.data_ptr() + 40 // SAMPLED * made.record_bytes)
    made.fetch(range(40))
    assert made.wants_prefetch and len(reader._work.urgent) == 1


def test_hot_rows_are_not_read_and_what_goes_to_a_slot_is_read_whole():
    reader = alone()
    made = store(reader=reader, cache_bytes=4 * 4 * PAGE)
    made.fetch([1, 2])
    reader.serve()
    assert [length for _, length in reader._work.pages.ordered] == [2 * 4 * PAGE]
    made.prefetch([1, 2, 3])
    reader.serve()
    assert reader._work.pages.ordered[1:] == [(made._table.data_ptr() + 3 * made.record_bytes, 4 * PAGE)]
    made.fetch([1, 2, 3])
    assert (made.traffic.hits, made.traffic.needed, made.traffic.foreseen) == (2, 1, 1)


def test_a_full_queue_drops_the_oldest_prefetches():
    reader = alone()
    made = [store(rows=2, reader=reader) for _ in range(WAITING + 5)]
    for one in made:
        one.prefetch([1])
    reader.serve()
    ordered = [at for at, _ in reader._work.pages.ordered]
    assert ordered == [one._table.data_ptr() + one.record_bytes for one in made[5:]]
    made[0].fetch([1])
    assert made[0].traffic.foreseen == 0 and made[0].traffic.needed == 1


def test_a_dropped_store_is_not_read_and_not_kept():
    reader = alone()
    dropped, gone, changed = store(reader=reader), store(reader=reader), store(reader=reader)
    for one in (dropped, gone, changed):
        one.prefetch([1, 2])
    dropped.demand_read([3], (GRADS,))
    dropped.drop()
    changed.changed([4])
    there = weakref.ref(gone)
    del gone, one
    gc.collect()
    assert there() is None
    reader.serve()
    assert reader._work.pages.ordered == []


# --- the thread -----------------------------------------------------------------------------------------------------


def test_the_thread_starts_when_asked_and_ends_when_closed_or_forgotten():
    before = running()
    made = store(reader=Reader())
    assert running() == before
    made.fetch([1, 2, 3])
    assert running() == before, "all is in memory"
    made.prefetch([4])
    (thread,) = set(running()) - set(before)
    made.reader.close()
    assert not thread.is_alive()
    made.prefetch([5])
    made.reader.close()
    assert running() == before, "what is closed stays closed"
    made.reader = Reader()
    made.prefetch([1])
    (thread,) = set(running()) - set(before)
    made.reader = None
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_dropping_stores_while_the_thread_reads():
    class Cold(prefetch._Pages):
        """As if no page were ever in memory."""

        asked = 0

        def resident(self, start, length):
            return False

        def request(self, start, length):
            self.asked += 1
            super().request(start, length)

    before, reader = running(), Reader()
    pages = reader._work.pages = Cold()
    for round_ in range(60):
        made = store(rows=40, reader=reader)
        plain = made.whole().clone()
        made.prefetch(range(40))
        if round_ % 2:
            assert all(torch.equal(row, plain[at]) for at, row in zip([1, 39], made.fetch([1, 39]), strict=True))
        made.drop()
    kept = store(rows=40, reader=reader)
    asked = reader.request(kept, range(40))
    (thread,) = set(running()) - set(before)
    for _ in range(10**6):
        if asked.done == 40 or not thread.is_alive():
            break
        thread.join(0.001)
    assert asked.done == 40 and pages.asked >= 40, "the thread still reads"
    reader.close()
    assert not thread.is_alive()


LEFT = """
import os, sys, torch
from trimtab.tiered.prefetch import Reader
from trimtab.tiered.store import TieredStore
made = TieredStore("table", 500, (64, 256), slow="disk", folder=sys.argv[1], reader=Reader())
for _ in range(5):
    made.fetch(range(0, 500, 3))
    made.prefetch(range(500))
if sys.argv[2] == "fork":
    child = os.fork()
    made.fetch(range(500))
    made.prefetch(range(500))
    if not child:
        made.reader.close()
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
if sys.argv[2] == "kill":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how,code", [("exit", 0), ("fork", 0), ("kill", -9)])
def test_a_process_ends_whatever_is_being_read(how, code, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", LEFT, tmp_path, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, "") and not list(tmp_path.iterdir())


def test_workers_that_are_forked_do_not_hang():
    made = store(reader=Reader())
    made.prefetch([1, 2])
    rows = list(DataLoader(list(range(8)), num_workers=1, multiprocessing_context="fork"))
    assert len(rows) == 8
    if not (child := os.fork()):
        made.prefetch([3])  # what the parent's thread holds is not waited for
        os._exit(0 if made.reader._thread is not None and made.reader._pid == os.getpid() else 1)
    assert os.waitpid(child, 0)[1] == 0
    made.reader.close()
