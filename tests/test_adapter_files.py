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
from trimtab.artifacts import adapter_weights
from trimtab.artifacts.adapter import CONFIG, OURS, Base, load_adapter, save_adapter
from trimtab.artifacts.adapter_weights import CHECKSUMS, INDEX, WEIGHTS, read_weights
from trimtab.errors import BadInput
from trimtab.memory.meter import Meter
from trimtab.model.load import base_hash
from trimtab.tiered import checkpoint
from world import CASES, make, snapshot, train

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


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As a stranger would: without checksums."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CHECKSUMS).unlink()


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
        lambda t: {**t, "more": torch.zeros(1)}, lambda t: {**t, "none": torch.tensor(0.0)},
        lambda t: {k: v[None] for k, v in t.items()},
    ]):  # fmt: skip
        for name in CASES:
            folder = copied(good[name], tmp_path / f"{index}-{name}")
            rewrite(folder, change(load_file(folder / WEIGHTS)))
            refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", CASES)
def test_numbers_that_are_none(name, value, good, tmp_path):
    folder = copied(good[name], tmp_path)
    tensors = load_file(folder / WEIGHTS)
    key = next(k for k, t in tensors.items() if t.is_floating_point() and t.numel())
    tensors[key].view(-1)[0] = value
    rewrite(folder, tensors)
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
    rewrite(folder, tensors)
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
        tensors[key] = change(tensors[key])
        rewrite(copy, tensors)
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


@pytest.mark.parametrize("name", ["paca", "lora", "edora", "parallel_adapter", "meft"])
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


# --- checksums, shards, pieces ---------------------------------------------------------------------------------------


def flip(path: Path, key: str, at: int) -> None:
    """One bit of a tensor in a file, `at` bytes from the tensor's begin."""
    whole = bytearray(path.read_bytes())
    size = struct.unpack("<Q", whole[:8])[0]
    whole[8 + size + json.loads(whole[8 : 8 + size])[key]["data_offsets"][0] + at] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize("name", CASES)
def test_a_flipped_bit_is_told(name, good, tmp_path):
    folder = copied(good[name], tmp_path)
    key, tensor = max(load_file(folder / WEIGHTS).items(), key=lambda item: item[1].numel())
    flip(folder / WEIGHTS, key, tensor.nbytes - 1)
    refused(folder, WEIGHTS, key, "not what was written")


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_of_a_table_the_damaged_rows_are_named(kind, good, tmp_path):
    folder = copied(good["meft"], tmp_path)
    key = next(k for k in load_file(folder / WEIGHTS) if k.endswith(kind))
    rows = load_file(folder / WEIGHTS)[key]
    for row in (2, 5):
        flip(folder / WEIGHTS, key, row * rows[0].nbytes + 9)
    refused(folder, WEIGHTS, f"{key} in", "in rows 2, 5.")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"crc32": 5}', b'{"crc32": {"a": 5}}', b'{"crc32": {}}',
                                     b'{"crc32": {"a": "zz"}}', b"[" * 100_000, b"\xff"])  # fmt: skip
def test_damaged_checksums(content, good, tmp_path):
    folder = copied(good["paca"], tmp_path)
    (folder / CHECKSUMS).write_bytes(content)
    refused(folder, CHECKSUMS)


def test_checksums_of_other_parts(good, tmp_path):
    folder = copied(good["meft"], tmp_path)
    edit(folder / CHECKSUMS, lambda found: found["crc32"].update({k: v + "0" * 56 for k, v in found["crc32"].items()}))
    refused(folder, WEIGHTS)


@pytest.fixture
def sharded(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(adapter_weights, "SHARD", 20_000)  # bytes
    return saved(tmp_path, "meft")


def test_large_adapters_are_sharded_as_transformers_shards_models(sharded, good):
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert not (sharded / WEIGHTS).exists() and len(files) > 1 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"adapter_model-00001-of-{len(files):05d}.safetensors"
    whole = load_file(good["meft"] / WEIGHTS)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert all(key in load_file(sharded / file) for key, file in index["weight_map"].items())
    parts = read_weights(sharded)
    assert parts.keys() == whole.keys() and all(torch.equal(parts[key], whole[key]) for key in whole)
    one, two = (MODELS["llama"]() for _ in range(2))
    load_adapter(one, sharded, PLACE), load_adapter(two, good["meft"], PLACE)
    batch = tiny_batch(one)
    assert torch.equal(logits(one, batch), logits(two, batch))


def test_transformers_own_reader_reads_the_shards(sharded):
    from transformers.utils.hub import get_checkpoint_shard_files

    files, found = get_checkpoint_shard_files(str(sharded), str(sharded / INDEX))
    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert set(found["all_checkpoint_keys"]) == tensors.keys() == read_weights(sharded).keys()


@pytest.mark.parametrize("change", [
    lambda m: m.update({next(iter(m)): "../x.safetensors"}), lambda m: m.update({next(iter(m)): "/etc/passwd"}),
    lambda m: m.update({next(iter(m)): 5}), lambda m: m.update(more=next(iter(m.values()))), lambda m: m.clear(),
    lambda m: m.pop(next(iter(m))), lambda m: m.update({next(iter(m)): "gone.safetensors"}),
    lambda m: m.update({next(iter(m)): "."}),
])  # fmt: skip
def test_hostile_indexes(change, sharded, tmp_path):
    shutil.copy(next(sharded.glob("*00001*")), tmp_path / "x.safetensors")
    edit(sharded / INDEX, lambda found: change(found["weight_map"]))
    refused(sharded)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": {}}}', "[" * 100_000])
def test_damaged_indexes(content, sharded):
    (sharded / INDEX).write_text(content)
    refused(sharded)


def test_a_missing_shard(sharded):
    path = next(sharded.glob("*00002*"))
    path.unlink()
    refused(sharded, path.name)


def test_a_tall_adapter_is_written_and_read_in_pieces(tmp_path, monkeypatch):
    """The process's anonymous memory hardly grows, however large the tables are."""
    monkeypatch.setattr(checkpoint, "PIECE", 2**20)
    model = MODELS["llama"]()
    base = Base("llama", base_hash(model))
    surgery = make("meft", r=2**17).apply(model, PLACE)
    size = sum(tensor.nbytes for tensor in surgery.own_tensors().values())
    folder, saving = grown(lambda: save_adapter(tmp_path / "adapter", [surgery], base))
    surgery.revert()
    (surgery,), loading = grown(lambda: load_adapter(model, folder, PLACE))
    surgery.revert()
    assert size > 2**27 and max(saving, loading) < size / 8, "one tensor is a quarter"


def grown(work) -> tuple:
    """-> what `work` gives, and the bytes by which the process grew on the way."""
    meter = Meter(seconds=0.001).start()
    found = work()
    meter.stop()
    return found, meter.peak["anon"] - meter.baseline["anon"]


def test_nothing_of_the_machine_is_written(good):
    for name in CASES:
        for file in (OURS, CONFIG, "README.md"):
            assert str(Path.home()) not in (good[name] / file).read_text()
