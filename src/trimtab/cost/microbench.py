"""Measures the rates of this machine (cost/rates.py) under the allocator that training uses.

Each figure is the best of many repeats in two rounds some seconds apart, so that other programs' bursts do not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import TorchDispatchMode
from .rates import Rates
from .roofline import Clock

SIDES = (64, 512)  # of the square matrices in a small and a large product
LARGE = 2**26  # bytes of an operand that no cache can keep
FILE_BYTES = 128 * 2**20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measure(machine: dict[str, Any], folder: Path | None = None) -> Rates:
    """Measures the rates of this machine. `machine`: `rates.key(...)`; `folder`: where to measure the disk, or None."""
    began = time.perf_counter()
    device = torch.device(machine["device"])
    one, two = (_one_round(device) for _ in range(2))
    best = {name: max(one[name], two[name]) for name in one}
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    found = Rates(
        machine, {name: [best[f"{name} {side}"] for side in SIDES] for name in names},
        {name: best[f"{name} attention"] for name in names}, best["bandwidth"], best["random"], best["update"],
        overhead=1e-9,
    )  # fmt: skip
    return dataclasses.replace(
        found, overhead=_overhead(found, device), disk=disk(folder) if folder else {}, link=_link(device),
        unpacking=_unpacking(device), page_bytes=mmap.PAGESIZE, seconds=round(time.perf_counter() - began, 2),
    )  # fmt: skip


def least_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 5, seconds: float = 0.1) -> float:
    """The shortest time of `work()` in seconds. After a warm-up, it runs at least `repeats` times and for `seconds`."""
    times: list[float] = []
    work()
    _wait(device)
    while len(times) < repeats or (sum(times) < seconds and len(times) < 1000):
        began = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- products, attention, traffic ------------------------------------------------------------------------------------


def _one_round(device: torch.device) -> dict[str, float]:
    found: dict[str, float] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for side in SIDES:
            a, b = _halves((side, side), dtype, device), _halves((side, side), dtype, device)
            found[f"{name} {side}"] = 2 * side**3 / least_seconds(lambda a=a, b=b: a @ b.t(), device)
        query = _halves((4, 8, 256, 64), dtype, device)  # rows, heads, tokens, width of a head
        attend = lambda query=query: nn.functional.scaled_dot_product_attention(query, query, query)  # noqa: E731
        found[f"{name} attention"] = 4 * query.numel() * query.shape[2] / least_seconds(attend, device)
    x = _halves((LARGE // 4,), torch.float32, device)
    y = torch.ones_like(x)
    works = [(lambda: x + y, 3), (lambda: x * 0.5, 2), (lambda: y.mul_(x), 3), (lambda: x.clone(), 2)]
    found["bandwidth"] = sum(many for _, many in works) * LARGE / sum(least_seconds(work, device) for work, _ in works)
    few = x[: x.numel() // 16]
    found["random"] = few.numel() / least_seconds(lambda: few.bernoulli_(0.9), device)  # as in dropout
    found["update"] = _update(device)
    return found


def _halves(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, 0.5, dtype=dtype, device=device)


def _update(device: torch.device) -> float:
    """Bytes/s of fused AdamW: 7 numbers of 4 bytes are read or written for each parameter."""
    weights = [nn.Parameter(torch.ones(2**19, device=device)) for _ in range(8)]
    optimizer = torch.optim.AdamW(weights, fused=True)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return 28 * sum(w.numel() for w in weights) / least_seconds(optimizer.step, device)


# --- the overhead of an operation ------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.clock.add("", func, args, kwargs or {}, out)
        return out


def _overhead(rates: Rates, device: torch.device) -> float:
    """Seconds that each operation of a training step takes beside its work.

    Trains a very small transformer: the time of a step beyond the prediction of the other rates, divided by the number
    of its operations.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model: torch.nn.Module = LlamaForCausalLM(config)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.ones(2, 8, dtype=torch.int64, device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = least_seconds(step, device, repeats=18)
    clock = Clock(rates)
    with _Watch(clock):
        step()
    return max(1e-7, (seconds - sum(clock.phases.values())) / clock.operations)


# --- disk, link, quantised weights -----------------------------------------------------------------------------------


def disk(folder: Path) -> dict[str, float]:
    """Bytes/s of writing and reading a temporary file in `folder`; empty if it cannot be written.

    The file is written to the disk (fsync) and dropped from the page cache before it is read. A virtual disk may still
    be served from the host's memory.
    """
    block = os.urandom(2**20)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            began = time.perf_counter()
            for _ in range(FILE_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())
            found = {"write": FILE_BYTES / (time.perf_counter() - began)}
            if hasattr(os, "posix_fadvise"):  # elsewhere the page cache would answer
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(0)
                into = bytearray(len(block))
                began = time.perf_counter()
                while file.readinto(into):  # type: ignore[attr-defined]
                    pass
                found["read"] = FILE_BYTES / (time.perf_counter() - began)
            return found
    except OSError:
        return {}


def _link(device: torch.device) -> dict[str, float]:
    """Bytes/s between pinned memory and the GPU; empty without one."""
    if device.type != "cuda":
        return {}
    here = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(2**26, dtype=torch.uint8, device=device)
    return {
        "up": 2**26 / least_seconds(lambda: there.copy_(here, non_blocking=True), device),
        "down": 2**26 / least_seconds(lambda: here.copy_(there, non_blocking=True), device),
    }


def _unpacking(device: torch.device) -> float:
    """4-bit weights per second that bitsandbytes unpacks to bf16; 0 if it is not installed or fails."""
    with contextlib.suppress(ImportError, RuntimeError, NotImplementedError, AttributeError):
        from bitsandbytes import functional as bnb

        weight = _halves((1024, 1024), torch.bfloat16, device)
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return weight.numel() / least_seconds(lambda: bnb.dequantize_4bit(packed, state), device)
    return 0.0
