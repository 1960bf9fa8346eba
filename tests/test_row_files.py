"""Checkpoints of tables: by what changed, whole by themselves, and never trusted."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from test_store import SHAPE, store
from trimtab.errors import BadInput
from trimtab.memory.row_adam import Rates, RowAdam
from trimtab.memory.row_files import PIECE, load_rows, pieces_of, save_rows, write_tensors
from trimtab.memory.store import VALUES, M, TieredStore, V


def trained(mode: str = "exact", **fields) -> TieredStore:
    made = store(**fields)
    RowAdam(made, mode)
    return made


def step(made: TieredStore, *rows: int) -> None:
    made.fetch(rows)
    made.accumulate(rows, torch.randn(len(rows), *SHAPE, generator=torch.Generator().manual_seed(sum(rows))))
    made.optimiser.step(Rates(0.01, weight_decay=0.01))


def same(one: TieredStore, two: TieredStore) -> bool:
    tables = all(torch.equal(one.whole(kind), two.whole(kind)) for kind in (VALUES, M, V))
    states = (made.optimiser.state() for made in (one, two))
    return tables and all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))


@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("fields", [{}, {"slow": "disk"}, {"slots": 3}, {"moments": torch.bfloat16}], ids=str)
def test_each_checkpoint_gives_its_table_back_and_training_goes_on_the_same(mode, fields, tmp_path):
    made, then = trained(mode, **fields), {}
    for at, rows in enumerate([(1, 2), (2, 3), (7,)]):
        step(made, *rows)
        save_rows(made, tmp_path / str(at), tmp_path / str(at - 1) if at else None)
        then[at] = trained(mode, **fields)
        load_rows(then[at], tmp_path / str(at))
        assert same(then[at], made)
    again = trained(mode, **fields)
    load_rows(again, tmp_path / "1")
    step(again, 7)
    assert same(again, made)


def test_a_checkpoint_stands_without_those_before_it(tmp_path):
    made = trained("lazy")
    for at in range(3):
        step(made, at)
        save_rows(made, tmp_path / str(at), tmp_path / str(at - 1))
    for at in (0, 1):
        for path in (tmp_path / str(at)).iterdir():
            path.unlink()
    again = trained("lazy")
    load_rows(again, tmp_path / "2")
    assert same(again, made)
    assert [len(load_file(tmp_path / "2" / f"{at}.safetensors")["rows"]) for at in range(3)] == [1, 1, 1]


def test_a_checkpoint_that_never_became_whole_is_not_built_upon(tmp_path):
    """The dirty rows count from a file that is gone: all rows are written."""
    made = trained("lazy")
    step(made, 0)
    save_rows(made, tmp_path / "kept")
    step(made, 1)
    save_rows(made, tmp_path / "lost", tmp_path / "kept")
    step(made, 2)
    save_rows(made, tmp_path / "next", tmp_path / "kept")
    again = trained("lazy")
    load_rows(again, tmp_path / "next")
    assert same(again, made)


def test_deltas_do_not_outgrow_the_table(tmp_path):
    made = trained("lazy")
    for at in range(12):
        step(made, 3, 4, 5)
        save_rows(made, tmp_path / str(at), tmp_path / str(at - 1))
        files = [load_file(path) for path in (tmp_path / str(at)).iterdir()]
        assert sum(len(file["rows"]) for file in files) <= made.rows
    again = trained("lazy")
    load_rows(again, tmp_path / "11")
    assert same(again, made)


def damaged(path, how: str) -> None:
    whole, tensors = path.read_bytes(), load_file(path)
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "rows":
        save_file({**tensors, "rows": torch.tensor([99, 100])}, path)
    elif how == "shape":
        save_file({**tensors, "values": torch.zeros(2, 3, 11)}, path)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "rows", "shape", "gone"])
def test_a_damaged_checkpoint_is_refused(how, tmp_path):
    made = trained()
    step(made, 1, 2)
    save_rows(made, tmp_path / "0")
    damaged(tmp_path / "0" / "0.safetensors", how)
    with pytest.raises(BadInput, match="table"):
        load_rows(trained(), tmp_path / "0")


def test_files_written_in_pieces_are_safetensors(tmp_path):
    big = torch.randn(3 * PIECE // 4 // 1000, 1000)
    tensors = {
        "big": big, "strided": big[:100, ::2], "half": torch.randn(3).bfloat16(), "none": torch.zeros(0, 5),
        "one": torch.tensor(4.0), "flags": torch.tensor([True, False]), "ids": torch.tensor([2**40]),
    }  # fmt: skip
    write_tensors(tmp_path / "file", {name: pieces_of(t) for name, t in tensors.items()}, {"format": "pt"})
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k], t) and read[k].dtype == t.dtype for k, t in tensors.items())
