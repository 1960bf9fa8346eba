"""Adapter folders from elsewhere are data: a damaged or hostile one is a message, never a crash or an escape."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab
from conftest import MODELS, logits, tiny_batch
from test_laws import CASES, make, snapshot, train
from trimtab.adapter import CONFIG, OURS, WEIGHTS, Base, load_adapter, save_adapter
from trimtab.errors import BadInput
from trimtab.model.load import base_hash

PLACE = trimtab.Place(fast="cpu")


def saved(folder: Path, name: str, steps: int = 2, **fields) -> Path:
    model = MODELS["llama"]()
    base = Base("llama", base_hash(model))
    surgery = make(name, **fields).apply(model, PLACE)
    train(model, surgery, steps)
    return save_adapter(folder / "adapter", [surgery], base)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    return {name: saved(tmp_path_factory.mktemp(name), name) for name in CASES}


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def refused(folder: Path, *words: str) -> None:
    """BadInput that says so, and a model that is as it was."""
    model = MODELS["llama"]()
    batch, before = tiny_batch(model), snapshot(model)
    outputs = logits(model, batch)
    with pytest.raises(BadInput) as error:
        load_adapter(model, folder, PLACE)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert snapshot(model) == before and torch.equal(logits(model, batch), outputs)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", CASES)
def test_a_round_trip(name, good):
    model = MODELS["llama"]()
    (surgery,) = load_adapter(model, good[name], PLACE)
    assert {k: t.detach() for k, t in surgery.own_tensors().items()}.keys() == {
        key.removeprefix("base_model.model.") for key in load_file(good[name] / WEIGHTS)
    }
    surgery.revert()


def test_a_lora_is_a_plain_peft_lora(good):
    from peft import PeftModel

    batch = tiny_batch(MODELS["llama"]())
    model = MODELS["llama"]()
    load_adapter(model, good["lora"], PLACE)
    assert torch.allclose(logits(PeftModel.from_pretrained(MODELS["llama"](), good["lora"]).eval(), batch),
                          logits(model, batch), atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
@pytest.mark.parametrize("name", CASES)
def test_truncated_tensors(name, keep, good, tmp_path):
    folder = copied(good[name], tmp_path)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    refused(folder, WEIGHTS, "damaged")


@pytest.mark.parametrize("header", [
    b"{", b"[]", b"null", b'{"a": 5}', b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 9999]}}',
    b'{"a": {"dtype": "F32", "shape": [1000000000000, 1000000000000], "data_offsets": [0, 16]}}',
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}', b"\xff\xfe" * 8,
])  # fmt: skip
def test_hostile_headers(header, good, tmp_path):
    folder = copied(good["paca"], tmp_path)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(folder, WEIGHTS)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + header)
    refused(folder, WEIGHTS)


def test_wrong_shapes_and_names(good, tmp_path):
    for index, change in enumerate([
        lambda t: {k: v[:1] for k, v in t.items()}, lambda t: dict(list(t.items())[:-1]), lambda t: {},
        lambda t: {**t, "more": torch.zeros(1)}, lambda t: {k: v[None] for k, v in t.items()},
    ]):  # fmt: skip
        for name in CASES:
            folder = copied(good[name], tmp_path / f"{index}-{name}")
            save_file({k: v.contiguous() for k, v in change(load_file(folder / WEIGHTS)).items()}, folder / WEIGHTS)
            refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", CASES)
def test_numbers_that_are_none(name, value, good, tmp_path):
    folder = copied(good[name], tmp_path)
    tensors = load_file(folder / WEIGHTS)
    key = next(k for k, t in tensors.items() if t.is_floating_point() and t.numel())
    tensors[key].view(-1)[0] = value
    save_file(tensors, folder / WEIGHTS)
    refused(folder, "NaN or infinity")


@pytest.mark.parametrize("columns", [
    [-1, 0, 1, 2], [0, 1, 2, 200], [10**12, 10**12 + 1, 10**12 + 2, 10**12 + 3],
    [3, 2, 1, 0], [0, 5, 2, 3], [1, 1, 2, 3],
])  # fmt: skip
def test_columns_that_are_not_there(columns, good, tmp_path):
    folder = copied(good["paca"], tmp_path)
    tensors = load_file(folder / WEIGHTS)
    key = next(k for k in tensors if k.endswith(".indices"))
    tensors[key] = torch.tensor(columns)
    save_file(tensors, folder / WEIGHTS)
    refused(folder)


def test_held_columns_that_are_not_there(tmp_path):
    folder = saved(tmp_path, "paca", reselect_every=2, steps=4)
    for index, (suffix, change) in enumerate([
        ("held_indices", lambda t: t + 1000), ("held_indices", lambda t: t[:1]), ("held_indices", lambda t: t[None]),
        ("held_delta", lambda t: t[:, :1]), ("held_delta", lambda t: t[:1]),
        ("held_delta", lambda t: torch.zeros(1).expand(t.shape[0], 4000)),
    ]):  # fmt: skip
        copy = copied(folder, tmp_path / str(index))
        tensors = load_file(copy / WEIGHTS)
        key = next(k for k in tensors if k.endswith(suffix))
        tensors[key] = change(tensors[key]).contiguous()
        save_file(tensors, copy / WEIGHTS)
        refused(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '"x"', "{}", '{"base": 5}', '{"base": {}}', "[" * 100_000,
                                  '{"base": {"name": 5, "hash": "x"}, "patch": "paca"}', "\x00"])  # fmt: skip
def test_damaged_json(text, good, tmp_path):
    folder = copied(good["paca"], tmp_path)
    (folder / OURS).write_text(text)
    refused(folder, OURS)
    (folder / OURS).write_bytes(b"\xff\xfe\x00")
    refused(folder, OURS)


@pytest.mark.parametrize("change,words", [
    (lambda m: m.update(patch="pacca"), ["pacca", 'Did you mean "paca"']),
    (lambda m: m.update(patch="causal_lm"), ["causal_lm"]),
    (lambda m: m.update(patch="os:system"), ["os:system"]),
    (lambda m: m.update(patch=["paca"]), []),
    (lambda m: m.update(config={"q": 1}), ["q"]),
    (lambda m: m.update(config=[1]), []),
    (lambda m: m["config"].update(r="x"), ["r"]),
    (lambda m: m["config"].update(r=-1), []),
    (lambda m: m["config"].update(targets="nose"), ["nose"]),
    (lambda m: m["config"].update(targets="((("), []),
    (lambda m: m["base"].update(hash="0" * 32), ["hash"]),
    (lambda m: m["base"].update(labels=5), []),
    (lambda m: m["base"].update(more=5), []),
])  # fmt: skip
def test_wrong_meta(change, words, good, tmp_path):
    folder = copied(good["paca"], tmp_path)
    edit(folder / OURS, change)
    refused(folder, *words)


@pytest.mark.parametrize("name", ["paca", "lora", "parallel_adapter", "meft"])
def test_a_rank_beyond_its_tensors(name, good, tmp_path):
    folder = copied(good[name], tmp_path)
    edit(folder / OURS, lambda m: m["config"].update(r=10**9))
    refused(folder)


@pytest.mark.parametrize("parts", [["../other"], ["/etc"], ["."], [""], ["a/../../other"], ["gone"], "paca", [], [5],
                                   ["inner", "../../x"], [".."]])  # fmt: skip
def test_parts_stay_inside(parts, good, tmp_path):
    shutil.copytree(good["paca"], tmp_path / "other")
    folder = copied(good["paca"], tmp_path)
    shutil.copytree(good["paca"], folder / "inner")
    edit(folder / OURS, lambda m: (m.pop("patch"), m.update(parts=parts)))
    refused(folder)


def test_links_out_of_the_folder_are_not_followed(good, tmp_path):
    folder = copied(good["paca"], tmp_path)
    (folder / "inner").symlink_to(good["paca"])
    edit(folder / OURS, lambda m: (m.pop("patch"), m.update(parts=["inner"])))
    refused(folder, "outside")


class Trap:
    def __reduce__(self):
        return (open, ("trap-was-sprung", "w"))


def test_pickles_are_never_opened(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copied(good["paca"], tmp_path)
    for name in ("adapter_model.bin", "pytorch_model.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    load_adapter(MODELS["llama"](), folder, PLACE)
    (folder / WEIGHTS).write_bytes(pickle.dumps(Trap()))
    refused(folder, WEIGHTS)
    (folder / WEIGHTS).unlink()
    refused(folder, WEIGHTS)
    assert not (tmp_path / "trap-was-sprung").exists()


def test_missing_files(good, tmp_path):
    refused(tmp_path / "nowhere", OURS)
    folder = copied(good["paca"], tmp_path)
    (folder / OURS).unlink()
    refused(folder, OURS)
    (folder / OURS).mkdir()
    refused(folder, OURS)


def test_nothing_of_the_machine_is_written(good):
    for name in CASES:
        for file in (OURS, CONFIG, "README.md"):
            assert str(Path.home()) not in (good[name] / file).read_text()
