"""Writes a GGUF file tensor by tensor, a few rows at a time: the weights of a model are never in memory together."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput, nearest

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
CHUNK = 1 << 21  # values that are converted at a time
ENDS = ("token_embd.weight", "output.weight")  # they stay in 8 bits where the blocks have 4 or 5


@dataclass
class Entry:
    """A tensor of the file. `values`: its values, called when it is written; `order` of its rows, and what is added."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Tensor]
    order: Tensor | None = None
    shift: float = 0.0


def checked_type(outtype: str, types: tuple[str, ...] = TYPES) -> str:
    """`outtype` in lower case; BadInput if it is none of `types`."""
    if outtype.lower() not in types:
        raise BadInput(f"--outtype {outtype}", f"it is none of {', '.join(types)}", nearest(outtype.lower(), types))
    return outtype.lower()


def type_of(entry: Entry, outtype: str) -> Any:
    """The type (gguf.GGMLQuantizationType) in which a tensor is written if most are of `outtype`.

    Vectors are F32, as llama.cpp requires. A row that is no multiple of a quantiser's block becomes F16.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[outtype.upper()]
    if len(entry.shape) < 2:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if entry.shape[-1] % block:
        return gguf.GGMLQuantizationType.F16
    small = outtype.startswith(("q4", "q5")) and entry.name in ENDS
    return gguf.GGMLQuantizationType.Q8_0 if small else kind


def write_file(path: Path, writer: Any, entries: list[Entry], outtype: str) -> None:
    """Write `entries` behind the keys of `writer`, a gguf.GGUFWriter of `path`. BadInput without room on the disk."""
    import gguf
    import numpy

    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"])
    if outtype.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds, total = {}, 0
    for entry in entries:
        kinds[entry.name] = kind = type_of(entry, outtype)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = torch.Size(entry.shape).numel() // block * size
        total += count
        writer.add_tensor_info(entry.name, entry.shape, numpy.dtype(numpy.float32), count, raw_dtype=kind)
    free = shutil.disk_usage(path.parent).free
    if total > free:
        have = f"it takes {total / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free"
        raise BadInput(
            f"write {path.name}", have, "Free some space, choose a smaller --outtype, or name another folder"
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for entry in entries:
            size = 0
            for part in _packed(entry, kinds[entry.name]):
                size += file.write(part)
            writer.write_padding(file, size)
    finally:
        with contextlib.suppress(OSError):  # of a full disk, which the write has told already
            writer.close()


def _packed(entry: Entry, kind: Any) -> Iterator[memoryview]:
    """The bytes of a tensor, a few rows at a time."""
    values = entry.values().detach()
    if tuple(values.shape) != entry.shape:
        raise AssertionError(f"{entry.name}: {tuple(values.shape)} for {entry.shape}")
    rows = values.shape[0]
    most = max(1, CHUNK // max(1, values[0].numel()))
    for start in range(0, rows, most):
        part = values[start : start + most] if entry.order is None else values[entry.order[start : start + most]]
        part = part.to("cpu", torch.float32) + entry.shift
        yield memoryview(_bytes(entry.name, part, kind)).cast("B")


def _bytes(name: str, values: Tensor, kind: Any) -> Any:
    """`values` as a numpy array of the bytes of `kind`."""
    import gguf

    types = gguf.GGMLQuantizationType
    packed = {types.F16: torch.float16, types.BF16: torch.bfloat16}.get(kind)
    found = values if packed is None else values.to(packed)
    if not found.isfinite().all():
        if values.isfinite().all():
            raise BadInput(
                f"write {name} as {kind.name.lower()}", "it has values beyond its range", "Use --outtype bf16"
            )
        raise BadInput(f"export {name}", "it has NaN or infinity", "Use an earlier checkpoint")
    if packed is not None:
        return found.view(torch.int16).numpy()
    if kind == types.F32:
        return found.contiguous().numpy()
    return gguf.quants.quantize(found.contiguous().numpy(), kind)
