"""The tensors of an adapter folder: written and read piece by piece, in one file or several, with checksums.

    adapter_model.safetensors                   all tensors, if they are less than SHARD bytes; else
    adapter_model-00001-of-00003.safetensors    some of them
    adapter_model.safetensors.index.json        which file has which: the layout of transformers' large models
    checksums.json                              CRC-32 of each tensor, for tables of each row

Tensors are mapped from the files when they are read: at most one piece at a time is in anonymous memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import BadInput
from ..tiered.checkpoint import cut, pieces_of, write_tensors
from ..tiered.checksums import Checksums, bytes_of, differing, of_parts, some
from ..validation import read_json

WEIGHTS, CHECKSUMS = "adapter_model.safetensors", "checksums.json"
INDEX = f"{WEIGHTS}.index.json"
SHARD = 5 * 10**9  # bytes of one file, as huggingface_hub splits models; a larger tensor has a file of its own
INTACT = "Use an intact copy"
Hex = Annotated[str, Field(pattern="^([0-9a-f]{8})*$")]  # CRC-32s, one after the other


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], is_table: Callable[[Tensor], bool], shard: int | None = None
) -> None:
    """Write `tensors` into `folder`. Those for which `is_table` is true get a checksum for each row."""
    shapes = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items()}
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="adapter_model{suffix}.safetensors", max_shard_size=shard or SHARD
    )
    sums = {key: of_parts(t, len(t) if is_table(t) else 1) for key, t in tensors.items()}
    files = split.filename_to_tensors or {WEIGHTS: []}  # a checkpoint may have all its tensors in tables
    for file, keys in files.items():
        write_tensors(folder / file, {key: pieces_of(tensors[key], sums[key]) for key in keys}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    text = {key: "".join(f"{crc:08x}" for crc in of.found) for key, of in sums.items()}
    (folder / CHECKSUMS).write_text(json.dumps({"crc32": text}, indent=2) + "\n", encoding="utf-8")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors in `folder`, mapped from its files; checksums are compared if there are any.

    BadInput names the damaged file, and the damaged rows of a table. A tensor with NaN or infinity is refused too.
    """
    kept = _checksums(folder)
    tensors: dict[str, Tensor] = {}
    for file, keys in _files(folder).items():
        try:
            held = load_file(folder / file)
        except (SafetensorError, OSError) as error:
            raise _damaged(folder, f"{file} is damaged ({error})") from None
        if keys is not None and held.keys() != set(keys):
            raise _damaged(folder, f"{file} has other tensors than {INDEX} says")
        for key, tensor in held.items():
            _check(folder, file, key, tensor, kept.get(key) if kept is not None else None)
        tensors |= held
    if kept is not None and kept.keys() != tensors.keys():
        odd = sorted(kept.keys() ^ tensors.keys())[0]
        raise _damaged(folder, f"{odd} is in only one of {CHECKSUMS} and {WEIGHTS}")
    return tensors


def _files(folder: Path) -> dict[str, list[str] | None]:
    """The files of tensors, and the names of their tensors if there is an index."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return {_inside(folder, WEIGHTS): None}
    found = read_json(folder / INDEX, dict[str, dict[str, Any]])
    if not found or "weight_map" not in found:
        raise _damaged(folder, f"{INDEX} is damaged")
    files: dict[str, Any] = {}
    for key, file in found["weight_map"].items():
        files.setdefault(_inside(folder, str(file)), []).append(key)
    return files


def _inside(folder: Path, file: str) -> str:
    path = folder / file
    if not path.is_file() or path.resolve().parent != folder.resolve():
        raise _damaged(folder, f"it has no {file}")
    return file


def _checksums(folder: Path) -> dict[str, list[int]] | None:
    """The checksums of each tensor's parts; None for a folder without any (not ours, or changed by hand)."""
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    found = read_json(path, dict[Literal["crc32"], dict[str, Hex]])
    if not found:
        raise _damaged(folder, f"{CHECKSUMS} is damaged")
    return {key: [int(text[at : at + 8], 16) for at in range(0, len(text), 8)] for key, text in found["crc32"].items()}


def _check(folder: Path, file: str, key: str, tensor: Tensor, kept: list[int] | None) -> None:
    parts = len(kept) if kept else 1
    if tensor.nbytes % parts:
        raise _damaged(folder, f"{key} in {file} cannot have {parts} parts")
    sums = Checksums(parts, tensor.nbytes // parts)
    finite = True
    for piece in cut(tensor):
        if kept:
            sums.add(bytes_of(piece))
        finite = finite and (not piece.is_floating_point() or bool(piece.isfinite().all()))
    if kept and (bad := differing(sums.found, kept)):
        where = f" in {some(bad)}" if parts > 1 else ""
        raise _damaged(folder, f"{key} in {file} is not what was written{where}")
    if not finite:
        raise BadInput(f"adapter {folder}", f"{key} has NaN or infinity", "Use an earlier checkpoint")


def _damaged(folder: Path, how: str) -> BadInput:
    return BadInput(f"adapter {folder}", how, INTACT)
