"""Checks of a checkpoint before a run resumes from it: its files are unchanged, and the states fit the run.

    checkpoint-N/files.json     size in bytes and CRC-32 of each file beside it, except rows/ (tiered/checkpoint.py has
                                checksums of its own for tables)

Damage would not always be noticed later: a fused optimizer step writes past the end of a moment that is too small, and
training continues with a moment that has NaN.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..errors import BadInput
from ..validation import read_json

STATE, SUMS = "trainer_state.json", "files.json"
ROWS = "rows"
PIECE = 2**22  # bytes that are read at a time
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # each has the shape of its parameter
EARLIER = "Remove this checkpoint, so that resume=true continues from the one before, or use an intact copy"


def write_sums(checkpoint: Path) -> None:
    """Write files.json, after all other files of the checkpoint."""
    found = {name: _sum_of(path) for name, path in _files(checkpoint)}
    (checkpoint / SUMS).write_text(json.dumps({"crc32": found}, indent=1) + "\n", encoding="utf-8")


def check_files(checkpoint: Path) -> None:
    """BadInput if a file is missing or differs from what was written, or if the state is of another step."""
    asked = f"resume from {checkpoint}"
    read_state(checkpoint)
    if not (checkpoint / SUMS).is_file():
        raise BadInput(asked, f"it has no {SUMS}, so it cannot be checked", EARLIER)
    kept = read_json(checkpoint / SUMS, dict[Literal["crc32"], dict[str, tuple[int, str]]])
    if not kept:
        raise BadInput(asked, f"{SUMS} is damaged", EARLIER)
    there = dict(_files(checkpoint))
    for name, (size, crc) in kept["crc32"].items():
        if name not in there:
            raise BadInput(asked, f"it has no {name}", EARLIER)
        found = there[name].stat().st_size
        if found != size:
            raise BadInput(asked, f"{name} has {found:,} bytes where {size:,} were written", EARLIER)
        if _sum_of(there[name])[1] != crc:
            raise BadInput(asked, f"{name} is not what was written", EARLIER)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of trainer_state.json; BadInput unless its step is that of the folder's name."""
    asked = f"resume from {checkpoint}"
    state = read_json(checkpoint / STATE) or {}
    if not isinstance(step := state.get("global_step"), int):
        raise BadInput(asked, f"{STATE} is damaged", EARLIER)
    if str(step) != checkpoint.name.rpartition("-")[2]:
        raise BadInput(asked, f"{STATE} says step {str(step)[:20]}", EARLIER)
    return state


def check_optimizer(path: Path, optimizer: Any) -> None:
    """BadInput unless the file has finite states for the parameters of `optimizer`, in their shapes."""
    import torch

    def bad(what: str) -> BadInput:
        return BadInput(f"resume from {path.parent}", f"{path.name}: {what}", EARLIER)

    held = load(path)
    groups = optimizer.state_dict()["param_groups"]
    try:
        states, theirs = held["state"], held["param_groups"]
        fits = [len(g["params"]) for g in theirs] == [len(g["params"]) for g in groups]
        numbers = [value for group in theirs for value in group.values() if isinstance(value, float)]
        places = [place for group in theirs for place in group["params"]]
        keys = {frozenset(state) for state in states.values()}
    except (TypeError, KeyError, AttributeError):
        raise bad("it has no state of an optimizer") from None
    if not fits or len(set(places)) != len(places) or not states.keys() <= set(places):
        raise bad("it is for other parameters than the run trains")
    if not all(map(math.isfinite, numbers)):
        raise bad("a setting is not a finite number")
    if len(keys) > 1 and len({key & set(MOMENTS) for key in keys}) > 1:
        raise bad("the states of some parameters lack a part")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, place in zip(parameters, places, strict=True):
        for name, value in states.get(place, {}).items():
            if not isinstance(value, torch.Tensor):
                continue
            if name in MOMENTS and (value.shape != parameter.shape or not value.is_floating_point()):
                shape, wanted = (" x ".join(map(str, t.shape)) or "one number" for t in (value, parameter))
                kind = str(value.dtype).removeprefix("torch.")
                raise bad(f"{name} of parameter {place} is {shape} of {kind} where the parameter is {wanted}")
            if name == "step" and value.numel() != 1:
                raise bad(f"step of parameter {place} is not a single number")
            if value.is_floating_point() and not _finite(value):
                raise bad(f"{name} of parameter {place} has NaN or infinity")


def check_scheduler(path: Path, scheduler: Any, step: int) -> None:
    """BadInput unless the file has a state of the same kind of `scheduler`, at the checkpoint's `step`."""
    held = load(path)
    asked = f"resume from {path.parent}"
    if not isinstance(held, dict) or not held.keys() >= {"last_epoch", "_last_lr"}:
        raise BadInput(asked, f"{path.name}: it has no state of a scheduler", EARLIER)
    if held.keys() != scheduler.state_dict().keys():
        raise BadInput(asked, f"{path.name}: it is for another kind of scheduler", "Use the recipe in the run's folder")
    numbers = [value for value in (*held.values(), *held["_last_lr"]) if isinstance(value, float)]
    if held["last_epoch"] != step or not all(map(math.isfinite, numbers)):
        raise BadInput(asked, f"{path.name}: it is not of step {step}, or has NaN", EARLIER)


def load(path: Path) -> Any:
    """The content of a torch.save file of plain values and tensors only; the tensors are mapped from it."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch, zipfile and pickle each raise their own exceptions
        why = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise BadInput(f"resume from {path.parent}", f"{path.name} {why}", EARLIER) from error


@contextlib.contextmanager
def mapped_loads() -> Iterator[None]:
    """Within it, `torch.load` maps tensors from their file rather than reading them into memory."""
    from torch.utils.serialization import config

    before, config.load.mmap = config.load.mmap, True
    try:
        yield
    finally:
        config.load.mmap = before


def _finite(tensor: Any) -> bool:
    flat = tensor.flatten()
    return all(bool(flat[at : at + PIECE].isfinite().all()) for at in range(0, flat.numel(), PIECE))


def _files(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(checkpoint):
        folders[:] = sorted(name for name in folders if name != ROWS)
        for name in sorted(names):
            path = Path(folder) / name
            if path != checkpoint / SUMS:
                yield path.relative_to(checkpoint).as_posix(), path


def _sum_of(path: Path) -> tuple[int, str]:
    crc = size = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    return size, f"{crc:08x}"
