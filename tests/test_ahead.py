"""Rows read ahead: what is asked for and when, what is counted, that nothing depends on it, and how the thread ends."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch.utils.data import DataLoader

from conftest import MODELS, tiny_batch
from trimtab.contracts import Place
from trimtab.engine.tables import traffic
from trimtab.methods.meft import Meft
from trimtab.tiered import prefetch
from trimtab.tiered.adam import RowAdam
from trimtab.tiered.checkpoint import load_rows, save_rows
from trimtab.tiered.prefetch import PATIENCE, WAITING, Reader
from trimtab.tiered.record import PAGE, layout, spans
from trimtab.tiered.store import GRADS, SAMPLED, VALUES, TieredStore
from world import gradients

SHAPE = (4, 256)  # a page of values
DISK = Place(fast="cpu", slow="disk")


class Pages:
    """A kernel that has the pages that were ordered, or, if it `forgets`, none."""

    def __init__(self, forgets: bool = False):
        self.ordered, self.brought, self.held, self.forgets = [], [], set(), forgets

    def resident(self, start, length):
        return start in self.held and not self.forgets

    def request(self, start, length):
        self.ordered.append((start, length))
        self.held.add(start)

    def map_in(self, start, length):
        self.brought.append((start, length))


class AtOnce(Reader):
    """A reader without a thread that has read what it is asked for when the call returns; all is always missing."""

    cold = True

    def __init__(self, **fields):
        super().__init__(alone=True, **fields)
        self._work.pages = Pages(forgets=True)

    def request(self, *args, **fields):
        asked = super().request(*args, **fields)
        self.serve()
        return asked


def store(rows: int = 12, reader: Reader | None = None, kind: type[TieredStore] = TieredStore, **fields) -> TieredStore:
    made = kind("table", rows, SHAPE, reader=reader, **{"slow": "disk", **fields})
    made.whole().normal_(generator=torch.Generator().manual_seed(0))
    return made


def alone() -> Reader:
    reader = Reader(alone=True)
    reader._work.pages = Pages()
    return reader


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


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "trimtab-reader"]


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


# --- a model --------------------------------------------------------------------------------------------------------

FIELDS = {"r": 256, "experts": 64, "probes": 2, "k": 6}


def patched(reader: Reader | None = None, place: Place = DISK, **fields):
    model = MODELS["llama"]()
    surgery = Meft(**FIELDS, **fields).apply(model, place)
    for one in surgery.stores:
        if reader is not None:
            one.reader.close()
            one.reader = reader
    return model.train(), surgery


def accumulated(model, steps: int = 3) -> None:
    """Steps of two micro-batches each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(2):
            model(**tiny_batch(model, seed=2 * step + part)).loss.backward()
        optimizer.step()


CASES = {
    "plain": {}, "union": {"semantics": "union", "router": "centroid"}, "exact": {"adam": "exact"},
    "hot rows": {"cache": 60000 / 2**30},
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "again", "again, reentrant"])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_reading_ahead_changes_nothing(fields, checkpointing, monkeypatch):
    """Bit for bit, over steps of several micro-batches; and the bytes moved are counted alike."""
    ends, moved = [], []
    monkeypatch.setattr(Reader, "cold", True)  # prefetch all the time
    for ahead in ("none", "known"):
        model, surgery = patched(prefetch=ahead, **fields)
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        accumulated(model)
        moved.append([(t.hits, t.misses, t.up, t.down) for t in (one.traffic for one in surgery.stores)])
        ends.append({key: tensor.detach().clone() for key, tensor in surgery.own_tensors().items()})
        assert (surgery.stores[0].traffic.needed > 0) == (ahead != "none")
        surgery.revert()
    assert moved[0] == moved[1]
    assert all(torch.equal(ends[0][key], end[key]) for end in ends[1:] for key in ends[0])


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "again", "again, reentrant"])
@pytest.mark.parametrize("fields", [{}, {"semantics": "union", "router": "fixed"}], ids=str)
def test_the_backward_pass_is_known(fields, checkpointing):
    """The lower layer's rows are all requested before its backward pass, and no others."""
    model, surgery = patched(AtOnce(), **fields)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    low = next(iter(surgery.adapters.values())).store
    losses = [model(**tiny_batch(model, seed=seed)).loss for seed in (1, 2)]  # two passes that both wait
    if checkpointing is not None:
        losses = losses[1:]  # the layers that are computed again are those of the newest pass
    low.traffic = type(low.traffic)()
    for loss in losses:
        loss.backward()
    found = low.traffic
    assert found.needed == found.misses == found.foreseen > 0 and found.unused == 0


def test_nothing_is_prefetched_for_a_forward_pass():
    model, surgery = patched(AtOnce())
    second = list(surgery.adapters.values())[1].store
    loss = model(**tiny_batch(model)).loss
    assert second.traffic.foreseen == 0 < second.traffic.needed
    low = surgery.stores[0]
    low.traffic = type(low.traffic)()
    loss.backward()
    assert low.traffic.foreseen == low.traffic.needed > 0


def test_there_is_no_reader_where_nothing_is_read():
    for fields, place in (({"prefetch": "none"}, DISK), ({}, Place(fast="cpu", slow="ram"))):
        _, surgery = patched(place=place, **fields)
        assert all(one.reader is None for one in surgery.stores)
        assert all(adapter.prefetcher is None for adapter in surgery.adapters.values())
    with torch.device("meta"):
        model = MODELS["llama"]()
    assert all(one.reader is None for one in Meft(**FIELDS).apply(model, DISK).stores)


def test_a_revert_ends_the_thread():
    before = running()
    model, surgery = patched()
    surgery.stores[0].prefetch([1])
    assert len(running()) == len(before) + 1
    surgery.revert()
    assert running() == before


def test_what_was_read_ahead_is_told():
    model, surgery = patched(AtOnce())
    gradients(model, surgery, tiny_batch(model))
    told = traffic([surgery], 2)
    kinds = ("needed", "foreseen", "unused")
    needed, foreseen, unused = (sum(getattr(one.traffic, kind) for one in surgery.stores) for kind in kinds)
    assert told["store_prefetch_hit_rate"] == round(foreseen / needed, 4) > 0
    assert told["store_prefetch_unused_bytes_per_step"] == unused // 2
    _, still = patched(place=Place(fast="cpu", slow="ram"))
    assert "store_prefetch_hit_rate" not in traffic([still], 2)


# --- before an accelerator ------------------------------------------------------------------------------------------


class Apart(TieredStore):
    """A store whose rows are copied before they are computed with, as before an accelerator."""

    in_place = False


class Copier:
    """Copies as a device does, without one."""

    def __init__(self, device):
        self.copied, self.arrived = [], 0

    def buffer(self, count, row):
        return torch.full((count, *row.shape), float("nan"))

    def mark(self):
        return None

    def copy(self, row, to, mark):
        to.copy_(row)
        self.copied.append(to.data_ptr())

    def arrive(self, buffer, mark):
        self.arrived += 1


@pytest.mark.parametrize("fields", [{"slow": "ram"}, {"slow": "disk"}, {"slots": 3}], ids=str)
def test_rows_on_their_way_to_a_device_are_taken_and_the_others_copied(fields):
    reader = Reader(alone=True, carrier=Copier)
    slots = fields.pop("slots", 0)
    made = store(reader=reader, kind=Apart, cache_bytes=slots * 4 * PAGE, **fields)
    plain = made.whole().clone()
    made.prefetch([3, 1, 8])
    reader.serve()
    rows = [1, 2, 3]
    held = made.fetch(rows)
    (carrier,) = reader._work.carriers.values()
    assert all(torch.equal(tensor, plain[row]) for tensor, row in zip(held, rows, strict=True))
    assert held[0].data_ptr() == carrier.copied[1] and held[2].data_ptr() == carrier.copied[0]
    assert held[1].data_ptr() not in carrier.copied and carrier.arrived == 1
    found, size = made.traffic, made.parts[VALUES].nbytes
    assert (found.needed, found.foreseen, found.unused, found.misses, found.up) == (3, 2, size, 3, 3 * size)


def test_rows_that_changed_since_they_were_copied_are_copied_again():
    reader = Reader(alone=True, carrier=Copier)
    made = store(reader=reader, kind=Apart)
    made.prefetch([1, 2])
    reader.serve()
    made.part(VALUES, 1).fill_(7.0)
    made.changed([1])
    assert torch.equal(made.fetch([1])[0], torch.full(SHAPE, 7.0)) and made.traffic.foreseen == 0
    made.prefetch([1, 2])
    reader.serve()
    made.whole().zero_()
    assert not made.fetch([1])[0].any()


def test_rows_that_were_copied_before_a_checkpoint_is_loaded_are_copied_again(tmp_path):
    made = store(reader=Reader(alone=True, carrier=Copier), kind=Apart)
    RowAdam(made)
    made.changed([1])
    save_rows(made, tmp_path / "kept")
    plain = made.whole()[1].clone()
    made.whole()[1] = 7.0
    made.changed([1])
    made.prefetch([1])
    made.reader.serve()
    load_rows(made, tmp_path / "kept")
    assert torch.equal(made.fetch([1])[0], plain) and made.traffic.foreseen == 0


def test_no_more_is_carried_than_a_device_is_given(monkeypatch):
    monkeypatch.setattr(prefetch, "CARRIED", 2 * PAGE)
    reader = Reader(alone=True, carrier=Copier)
    made = store(reader=reader, kind=Apart)
    plain = made.whole().clone()
    made.prefetch([5, 6, 7])
    reader.serve()
    assert all(torch.equal(tensor, plain[row]) for tensor, row in zip(made.fetch([5, 6, 7]), (5, 6, 7), strict=True))
    assert made.traffic.foreseen == 2
    RowAdam(made, "exact")
    made.prefetch([5])
    reader.serve()
    made.fetch([5])
    assert made.traffic.foreseen == 2, "a row that has steps to make up is not copied before"
