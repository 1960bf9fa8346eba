"""`trimtab doctor`: what this machine has, how fast it multiplies, and what could be better."""

from __future__ import annotations

import shutil
import time
from typing import Any

from .memory import allocator
from .memory.meter import GIB
from .runs import machine, versions


def doctor() -> dict[str, Any]:
    """Facts and short measurements: GEMM rates by dtype (GFLOP/s), memory and disk (bytes), allocator, advice."""
    import torch

    found: dict[str, Any] = {"machine": machine(), "versions": versions()}
    found["disk_free_bytes"] = shutil.disk_usage(".").free
    found["memory_free_bytes"] = _available()
    found["gflops"] = {name: round(_gemm_rate(getattr(torch, name)) / 1e9, 1) for name in ("bfloat16", "float32")}
    found["allocator_found"] = (allocator.find() or ("none", ""))[0]
    found["advice"] = list(_advice(found))
    return found


def _gemm_rate(dtype: Any) -> float:
    """FLOP/s of the linear that a small model's step is made of: (1024, 1024) times (1024, 1024), the median of 7."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(1024, 1024, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / sorted(seconds[2:])[3]


def _available() -> int:
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


def _advice(found: dict[str, Any]) -> Any:
    if found["allocator_found"] == "none":
        yield "No mimalloc, jemalloc or tcmalloc was found: `pip install cmeel-mimalloc` makes training on a CPU faster"
    if found["gflops"]["bfloat16"] < found["gflops"]["float32"]:
        yield "bf16 is slower than fp32 on this processor: set model: {precision: fp32} if memory allows"
    if found["disk_free_bytes"] < 2 * GIB:
        yield "Less than 2 GiB of disk is free here: checkpoints may not fit"
