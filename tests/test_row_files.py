"""Checkpoints of tables: by what changed, whole by themselves, and never trusted."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trimtab.errors import BadInput
from trimtab.tiered.adam import Rates, RowAdam
from trimtab.tiered.checkpoint import PIECE, SUMS, cut, load_rows, pieces_of, save_rows, write_tensors
from trimtab.tiered.checksums import bytes_of, of_parts
from trimtab.tiered.store import GRADS, VALUES, M, TieredStore
from world import SHAPE, store


def trained(mode: str = "exact", **fields) -> TieredStore:
    made = store(**fields)
    RowAdam(made, mode)
    return made


def step(made: TieredStore, *rows: int) -> None:
    made.fetch(rows)
    made.accumulate(rows, torch.randn(len(rows), *SHAPE, generator=torch.Generator().manual_seed(sum(rows))))
    made.optimizer.step(Rates(0.01, weight_decay=0.01))


def same(one: TieredStore, two: TieredStore) -> bool:
    tables = all(torch.equal(one.whole(kind), two.whole(kind)) for kind in one.parts if kind != GRADS)
    states = (made.optimizer.state() for made in (one, two))
    return tables and all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))


@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("fields", [{}, {"slow": "disk"}, {"slots": 3}, {"moments": torch.bfloat16},
                                    {"moments": torch.int8, "slow": "disk"}], ids=str)  # fmt: skip
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


def test_a_checkpoint_after_which_nothing_changed(tmp_path):
    made = trained("lazy")
    step(made, 3)
    for at in range(2):
        save_rows(made, tmp_path / str(at), tmp_path / str(at - 1) if at else None)
    again = trained("lazy")
    load_rows(again, tmp_path / "1")
    assert same(again, made) and len(load_file(tmp_path / "1" / "1.safetensors")["rows"]) == 0


def saved(folder, *rows: int, **fields):
    """A checkpoint of these rows, and its file."""
    made = trained(**fields)
    step(made, *rows)
    save_rows(made, folder)
    return folder / "0.safetensors"


def flip(path, name: str, at: int = 0) -> None:
    """One bit of one byte of a tensor in a file, `at` bytes from its begin."""
    whole = bytearray(path.read_bytes())
    size = int.from_bytes(whole[:8], "little")
    begin = 8 + size + json.loads(whole[8 : 8 + size])[name]["data_offsets"][0]
    whole[begin + at] ^= 4
    path.write_bytes(whole)


ROW = 3 * 10 * 4  # bytes


@pytest.mark.parametrize("name,at,words", [
    (VALUES, 0, "values of row 1 "), (VALUES, 2 * ROW + 7, "values of row 7 "), (M, ROW, "m of row 4 "),
    ("v", 3 * ROW - 1, "v of row 7 "), ("rows", 8, "rows is not what was written"), ("state.last", 4, "state.last"),
    (SUMS + VALUES, 4, "values of row 4 "), (SUMS + "rows", 0, "rows is not"),
])  # fmt: skip
def test_a_flipped_bit_is_told_by_file_and_row(name, at, words, tmp_path):
    path = saved(tmp_path / "0", 1, 4, 7)
    flip(path, name, at)
    with pytest.raises(BadInput) as error:
        load_rows(trained(), tmp_path / "0")
    assert str(path) in str(error.value) and words in str(error.value) and error.value.exit_code == 2


def test_damage_in_an_older_delta_is_told(tmp_path):
    made = trained()
    for at, rows in enumerate([(1, 2), (3,)]):
        step(made, *rows)
        save_rows(made, tmp_path / str(at), tmp_path / str(at - 1) if at else None)
    flip(tmp_path / "1" / "0.safetensors", VALUES, ROW)
    with pytest.raises(BadInput, match="0.safetensors.*values of row 2 "):
        load_rows(trained(), tmp_path / "1")


def rewritten(path, change) -> None:
    with safe_open(path, "pt") as file:
        tensors, metadata = file.get_tensors(), file.metadata()
    change(tensors)
    whole = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in list(whole):
        if SUMS + name in whole:  # a stranger's file has sums that fit
            parts = len(whole[SUMS + name])
            sums = of_parts(whole[name], parts)
            sums.add(bytes_of(whole[name]))
            whole[SUMS + name] = torch.tensor(sums.found).view(-1, 1).view(torch.uint8)[:, :4].contiguous()
    save_file(whole, path, metadata)


@pytest.mark.parametrize("change", [
    lambda t: t.update(rows=torch.tensor([1, 12])), lambda t: t.update(rows=torch.tensor([-1, 2])),
    lambda t: t.update(rows=torch.tensor([1.0, 2.0])), lambda t: t.update(rows=torch.tensor([[1, 2]])),
    lambda t: t.update(values=torch.zeros(2, 3, 11)), lambda t: t.update(values=torch.zeros(2, 3, 10).double()),
    lambda t: t.pop("m"), lambda t: t.pop("rows"), lambda t: t.pop("state.last"), lambda t: t.pop(SUMS + "v"),
    lambda t: t.update({SUMS + "v": torch.zeros(3, 4, dtype=torch.uint8)}),
    lambda t: t.update({"state.last": torch.zeros(3, dtype=torch.int32)}),
    lambda t: t.update({"state.history": torch.zeros(1, 5)}), lambda t: t.update({"state.more": torch.zeros(1)}),
])  # fmt: skip
def test_a_hostile_checkpoint_is_refused(change, tmp_path):
    path = saved(tmp_path / "0", 1, 2)
    rewritten(path, change)
    with pytest.raises(BadInput, match="table"):
        load_rows(trained(), tmp_path / "0")


@pytest.mark.parametrize("how", ["cut", "gone", "a pickle"])
def test_a_damaged_file_is_refused(how, tmp_path):
    path = saved(tmp_path / "0", 1, 2)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if how == "cut" else pickle.dumps([1]))
    with pytest.raises(BadInput, match="table"):
        load_rows(trained(), tmp_path / "0")


@pytest.mark.parametrize("theirs,mine,words", [
    ({"rows": 12}, {"rows": 13}, "12 rows of 3 x 10, and this one has 13 rows"),
    ({"moments": torch.bfloat16}, {}, "m is torch.float32 here and torch.bfloat16 in it"),
    ({"moments": torch.int8}, {"moments": torch.bfloat16}, "m is torch.bfloat16 here and torch.uint8 in it"),
])  # fmt: skip
def test_a_checkpoint_of_another_table_is_refused_and_said_which(theirs, mine, words, tmp_path):
    saved(tmp_path / "0", 1, 2, **theirs)
    with pytest.raises(BadInput) as error:
        load_rows(trained(**mine), tmp_path / "0")
    assert words in str(error.value)


def test_going_back_to_an_earlier_checkpoint_draws_later_rows_again(tmp_path):
    """What `load_best_model_at_end` does: the table is no longer as it was drawn."""
    drawn = trained("lazy")
    made = trained("lazy", initial=lambda: before)
    before = list(drawn.whole().clone())
    step(made, 1, 2)
    save_rows(made, tmp_path / "0")
    step(made, 2, 5)
    save_rows(made, tmp_path / "1", tmp_path / "0")
    step(made, 9)
    load_rows(made, tmp_path / "0")
    load_rows(drawn, tmp_path / "0")
    assert same(made, drawn)
    for one in (made, drawn):
        step(one, 5)
        save_rows(one, tmp_path / f"next-{one is made}", tmp_path / "0")
    again = trained("lazy")
    load_rows(again, tmp_path / "next-True")
    assert same(made, drawn) and same(again, made)


def test_pieces_are_views_in_order_and_small():
    deep = torch.randn(2, 3, PIECE // 8)  # a row is larger than a piece
    pieces = list(cut(deep[:, :, ::2]))
    assert all(piece.nbytes <= PIECE for piece in pieces) and len(pieces) > 1
    assert torch.equal(torch.cat([piece.flatten() for piece in pieces]), deep[:, :, ::2].flatten())
    assert all(piece.untyped_storage().data_ptr() == deep.untyped_storage().data_ptr() for piece in pieces)


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
