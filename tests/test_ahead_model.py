"""Rows read ahead in a model, and before an accelerator: nothing depends on it, and what is counted."""

from __future__ import annotations

import pytest
import torch

from conftest import MODELS, tiny_batch
from helpers_prefetch import DISK, SHAPE, AtOnce, running, store
from trimtab.contracts import Place
from trimtab.engine.tables import traffic
from trimtab.methods.meft import Meft
from trimtab.tiered import prefetch
from trimtab.tiered.adam import RowAdam
from trimtab.tiered.checkpoint import load_rows, save_rows
from trimtab.tiered.prefetch import Reader
from trimtab.tiered.record import PAGE
from trimtab.tiered.store import VALUES, TieredStore
from world import gradients

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
