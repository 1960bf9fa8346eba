"""A mapped base larger than memory: the next block's weights are asked for, in both directions, and nothing changes."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_batch
from tiny import tiny_folder
from trimtab.memory.meter import file_ranges, is_mapped
from trimtab.model import anatomy, weight_prefetch
from trimtab.model.load import load_model
from trimtab.model.surgery import Swaps
from trimtab.model.weight_prefetch import LOOK, Weights, read_weights_ahead
from trimtab.tiered.prefetch import Reader
from trimtab.tiered.record import PAGE
from world import snapshot


class Told(Reader):
    """What it is asked for, in order; `cold` as it is set."""

    cold = True

    def __init__(self):
        super().__init__(alone=True)
        self.asked = []

    def request(self, store, rows, kinds=(), now=False):
        self.asked.append((store, kinds, now))
        return super().request(store, rows, kinds, now)


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """A model whose weights are mapped, on a machine without memory."""
    model, _ = load_model(tiny_folder(tmp_path / "tiny"))
    if not any(is_mapped(p, file_ranges()) for p in model.parameters()):
        pytest.skip("nothing is mapped here")
    monkeypatch.setattr(weight_prefetch, "ram", lambda: {"MemAvailable": 0})
    return model


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "again", "again, reentrant"])
def test_blocks_are_asked_for_before_they_are_reached(mapped, checkpointing):
    model, reader = mapped.train(), Told()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    batch = tiny_batch(model)
    model(**batch).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    before, swaps = snapshot(model), Swaps(model)
    first, second = read_weights_ahead(model, swaps, reader)
    loss = model(**batch).loss
    assert [store for store, *_ in reader.asked] == [second]
    loss.backward()
    assert [store for store, *_ in reader.asked][1:] in ([first], [first, first]) and not reader.asked[-1][-1]
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), plain, strict=True))
    reader.asked.clear()
    with torch.no_grad():
        model.eval()(**batch)
    assert [store for store, *_ in reader.asked] == [second, first], "the next pass begins with the first"
    reader.serve()
    model.train()
    swaps.undo()
    assert snapshot(model) == before and reader.request(first, [0]) is None, "the thread has ended"


def test_where_all_is_in_memory_a_few_pages_are_looked_at(mapped):
    reader, swaps, looked = Told(), Swaps(mapped), []
    reader.cold = False
    first, second = read_weights_ahead(mapped, swaps, reader)
    reader.resident = lambda pages: looked.append(list(pages)) or len(looked) == 1
    mapped(**tiny_batch(mapped))
    assert looked == [[at for at, *_ in second.spans]] and reader.asked == []
    mapped(**tiny_batch(mapped))
    assert [store for store, *_ in reader.asked] == [second], "one was not there"
    swaps.undo()


def test_all_of_a_blocks_weights_are_in_its_pages(mapped):
    for block in anatomy.blocks(mapped)[1]:
        made = Weights(block.parameters())
        held, spans = made.pages([0], ())
        assert all(
            any(at <= p.data_ptr() and p.data_ptr() + p.nbytes <= at + size for at, size, _ in spans) for p in held
        )
        assert all(at % PAGE == 0 for at, *_ in spans)
    large = Weights([torch.empty(3 * LOOK, dtype=torch.uint8), torch.empty(5)])
    ends = sorted((at, at + size) for at, size, _ in large.spans)
    assert all(high <= low for (_, high), (low, _) in zip(ends, ends[1:], strict=False))
    assert large.nbytes >= 3 * LOOK + 20 and len(ends) >= 4


def test_a_base_that_fits_or_is_not_mapped_is_left_alone(mapped, monkeypatch):
    before, swaps = snapshot(mapped), Swaps(mapped)
    monkeypatch.setattr(weight_prefetch, "ram", lambda: {"MemAvailable": 2**40})
    assert read_weights_ahead(mapped, swaps) == []
    monkeypatch.setattr(weight_prefetch, "ram", lambda: {"MemAvailable": 0})
    assert read_weights_ahead(mapped.double(), swaps) == [] and snapshot(mapped)["hooks"] == before["hooks"]
