"""Tables that are worked on at once: nothing but the clock tells."""

from __future__ import annotations

import threading

import pytest
import torch

from conftest import MODELS
from trimtab import Place
from trimtab.methods.meft import Meft
from trimtab.tiered import threads
from trimtab.tiered.threads import parallel_map
from world import PLACE, plain


@pytest.fixture
def several():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_work_is_done_at_once_and_comes_back_in_order(several):
    together, found = threading.Barrier(3), []

    def do(item: int) -> tuple[int, int]:
        together.wait(timeout=30)  # passed by three at a time only
        found.append(torch.get_num_threads())
        return item, len(found)

    given = parallel_map(do, range(6))
    assert [item for item, _ in given] == list(range(6))
    assert sorted(at for _, at in given) == list(range(1, 7))
    assert found == [1] * 6 and torch.get_num_threads() == 3


def test_where_pytorch_has_one_thread_none_is_started():
    assert torch.get_num_threads() == 1, "conftest.py says so"
    assert parallel_map(lambda _: threading.current_thread(), [1, 2]) == [threading.current_thread()] * 2


def test_no_more_than_so_many_are_worked_on(several):
    torch.set_num_threads(16)
    assert threads.max_workers() == threads.MOST
    assert len(set(parallel_map(lambda _: threading.get_ident(), range(64)))) <= threads.MOST


def test_what_is_raised_is_raised_and_all_that_was_begun_has_ended(several):
    together, ended = threading.Barrier(3), []

    def do(item: int) -> None:
        together.wait(timeout=30)
        if item == 1:
            raise OSError(28, "no room")
        ended.append(item)

    with pytest.raises(OSError, match="no room"):
        parallel_map(do, range(3))
    assert sorted(ended) == [0, 2] and torch.get_num_threads() == 3


@pytest.mark.parametrize("slow", ["disk", "ram"])
@pytest.mark.parametrize("fields", [{}, {"adam": "exact"}, {"moments": "int8"}, {"cache": 2e-5}], ids=str)
def test_tables_that_step_at_once_come_to_the_same_bits(slow, fields, several):
    rows = []
    for many in (1, 3):
        torch.set_num_threads(many)
        model = MODELS["llama"]()
        surgery = Meft(r=64, k=16, scale=1.0, **fields).apply(model, Place(fast=PLACE.fast, slow=slow))
        plain(model, surgery)
        rows.append([store.whole(kind).clone() for store in surgery.stores for kind in store.parts if kind != "grads"])
        assert all(store.optimizer.steps for store in surgery.stores)
        surgery.revert()
    assert len(rows[0]) == len(rows[1]) > 6
    assert all(torch.equal(one, three) for one, three in zip(*rows, strict=True))
