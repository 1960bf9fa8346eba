"""Measures the rates of this machine (cost/rates.py) under the allocator that training uses.

Each figure is the median of a few repeats, taken in two rounds some seconds apart of which the faster counts: another
program's burst then spoils neither. In a hurry the largest products are left out. Results are written into
memory that was used before, as in a step of training that is not the first.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import TorchDispatchMode
from .rates import LAYOUTS, SMALLEST, Rates
from .roofline import Clock

AXIS = (
    SMALLEST,
    64,
    512,
    2048,
    32768,
)  # dimensions of the products that are measured, below the next line
MOST, MOST_QUICK = 1.1e9, 1.4e8  # multiplications in one of them
SIZES = (2**18, 2**22, 2**26)  # bytes of the operand in the traffic: in a core's cache, in all caches, in memory
FILE_BYTES = 128 * 2**20
DTYPES = (torch.float32, torch.bfloat16)


def measure(machine: dict[str, Any], folder: Path | None = None, quick: bool = False) -> Rates:
    """The rates of this machine now; `machine`: `rates.key(...)`. `folder`: where the disk is measured (None: not)."""
    began = time.perf_counter()
    device = torch.device(machine["device"])
    rounds = [_one_round(device, MOST_QUICK if quick else MOST) for _ in range(2)]
    products, traffic = (
        {name: [max(pair) for pair in zip(rows, second[name], strict=True)] for name, rows in first.items()}
        for first, second in ((rounds[0][part], rounds[1][part]) for part in range(2))
    )
    attention = {name: max(rounds[0][2][name], rounds[1][2][name]) for name in rounds[0][2]}
    update = max(_update(device) for _ in range(2))
    partly = Rates(machine, products, traffic, attention, update, overhead=1e-9)
    return Rates(
        machine, products, traffic, attention, update,
        overhead=_overhead(partly, device), disk=disk(folder) if folder else {}, link=_link(device),
        quantised=_quantised(device), page_bytes=mmap.PAGESIZE, seconds=round(time.perf_counter() - began, 2),
        quick=quick,
    )  # fmt: skip


def median(work: Callable[[], Any], device: torch.device, least: int = 3, seconds: float = 2e-3) -> float:
    """Seconds of `work()`, repeated at least so often and for so long after one time that does not count."""
    times: list[float] = []
    work()
    _wait(device)
    while len(times) < least or (sum(times) < seconds and len(times) < 64):
        began = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- products, traffic, attention ------------------------------------------------------------------------------------


def _one_round(device: torch.device, most: float) -> tuple[dict, dict, dict]:
    products: dict[str, list[list[float]]] = {}
    traffic: dict[str, list[list[float]]] = {}
    attention: dict[str, float] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for shape in _shapes(most):
            for layout in LAYOUTS:
                products.setdefault(f"{name} {layout}", []).append([*shape, _product(shape, layout, dtype, device)])
        for size in SIZES:
            for kind, (moved, seconds) in _traffic(size, dtype, device):
                traffic.setdefault(f"{name} {kind}", []).append([moved, moved / seconds])
        attention |= {f"{name} {way}": rate for way, rate in _attention(dtype, device)}
    for layout in LAYOUTS:  # without instructions of its own for fp16 a CPU takes up to a hundred times as long
        shape = (64, 512, 512)
        products[f"float16 {layout}"] = [[*shape, _product(shape, layout, torch.float16, device)]]
    return products, traffic, attention


def _shapes(most: float = MOST) -> Iterator[tuple[int, int, int]]:
    return ((m, k, n) for m, k, n in itertools.product(AXIS, AXIS, AXIS) if m * k * n <= most)


def _product(shape: tuple[int, int, int], layout: str, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of (m, k) times (k, n), an operand turned as `layout` says."""
    m, k, n = shape
    a = _halves((k, m) if layout == "TN" else (m, k), dtype, device)
    b = _halves((n, k) if layout == "NT" else (k, n), dtype, device)
    a, b = a.t() if layout == "TN" else a, b.t() if layout == "NT" else b
    least = 3 if m * k * n < 100e6 else 1  # the large ones take long, and hardly vary
    return 2 * m * k * n / median(lambda: torch.mm(a, b), device, least, seconds=4e-4)


def _halves(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, 0.5, dtype=dtype, device=device)


def _traffic(size: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple[float, float]]]:
    """kind -> (bytes read and written, seconds), over the operations that a kind stands for."""
    wide = 512
    x = _halves((size // dtype.itemsize // wide, wide), dtype, device)
    y, row = torch.ones_like(x), torch.arange(len(x), device=device)
    flag = x > 0.5
    few = x.flatten()[: x.numel() // 8].view(-1, wide)  # these kinds are slow, and alike at all sizes
    kinds: dict[str, list[tuple[Callable[[], Any], float]]] = {
        "plain": [(lambda: x + y, 3), (lambda: x * 0.5, 2), (lambda: y.mul_(x), 3), (lambda: x.clone(), 2)],
        "turned": [(lambda: few.t().contiguous(), 2 / 8)],
        "function": [(lambda: nn.functional.silu(few), 2 / 8), (lambda: few.softmax(-1), 2 / 8)],
        "reduction": [(lambda: x.sum(-1), 1), (lambda: torch.linalg.vector_norm(x, dim=-1), 1)],
        "select": [(lambda: few.masked_fill(flag[: len(few)], 0.0), 2 / 8 + 1 / 8 / dtype.itemsize)],
        "index": [(lambda: x.index_select(0, row), 2)],
        "random": [(lambda: few.bernoulli_(0.9), 1 / 8)],  # what dropout draws
    }
    for kind, works in kinds.items():
        seconds = sum(median(work, device, seconds=1e-3) for work, _ in works)
        yield kind, (sum(share for _, share in works) * size, seconds)


def _attention(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, float]]:
    """FLOP/s of the fused kernels, of a full square of scores: 4 rows of 256 tokens, 8 heads of 64."""
    query = _halves((4, 8, 256, 64), dtype, device).requires_grad_()
    flops = 4 * query.numel() * 256
    for name, causal in (("", False), ("causal ", True)):
        attend = lambda causal=causal: nn.functional.scaled_dot_product_attention(  # noqa: E731
            query, query, query, is_causal=causal
        )
        out = attend()
        slope = torch.ones_like(out)
        with torch.no_grad():
            yield f"{name}forward", flops / median(attend, device)
        back = lambda out=out, slope=slope: torch.autograd.grad(out, query, slope, retain_graph=True)  # noqa: E731
        yield f"{name}backward", 2.5 * flops / median(back, device)


def _update(device: torch.device) -> float:
    """Bytes/s of fused AdamW: 7 numbers of 4 bytes are read or written for each that is trained."""
    weights = [nn.Parameter(torch.ones(2**19, device=device)) for _ in range(8)]
    optimizer = torch.optim.AdamW(weights, fused=True)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return 28 * sum(w.numel() for w in weights) / median(optimizer.step, device)


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
    """Seconds that each operation of a training step costs beside its work.

    A transformer so small that it hardly computes is trained with and without a watch: what a step takes beyond what
    the watch predicts from the other rates, shared out over its operations.
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

    seconds = min(median(step, device, least=9) for _ in range(2))
    clock = Clock(rates)
    with _Watch(clock):
        step()
    return max(1e-7, (seconds - sum(clock.phases.values())) / clock.operations)


# --- disk, link, quantised weights -----------------------------------------------------------------------------------


def disk(folder: Path) -> dict[str, float]:
    """Bytes/s to and from a new file in `folder`, which is removed; empty where it cannot be written.

    Written through to the disk (fsync), then put out of the page cache before it is read. A disk that is itself a file
    of a host may still answer from the host's memory.
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
            if hasattr(os, "posix_fadvise"):  # elsewhere the page cache would answer: then nothing is said
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
        "up": 2**26 / median(lambda: there.copy_(here, non_blocking=True), device),
        "down": 2**26 / median(lambda: here.copy_(there, non_blocking=True), device),
    }


def _quantised(device: torch.device) -> dict[str, float]:
    """Weights a second that bitsandbytes unpacks to bf16; empty where it is not installed or cannot."""
    with contextlib.suppress(ImportError, RuntimeError, NotImplementedError, AttributeError):
        from bitsandbytes import functional as bnb

        weight = _halves((1024, 1024), torch.bfloat16, device)
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return {"nf4": weight.numel() / median(lambda: bnb.dequantize_4bit(packed, state), device)}
    return {}
