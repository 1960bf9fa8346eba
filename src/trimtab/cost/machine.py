"""Describes this machine and the versions of libraries. Importing it loads no torch."""

from __future__ import annotations

import contextlib
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("trimtab", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")


def machine() -> dict[str, Any]:
    """Processor, memory, threads, system, allocator and GPU, without names that identify the machine."""
    import torch

    from ..memory import allocator

    cpu, memory = platform.processor(), 0
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    with contextlib.suppress(ValueError, OSError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory_bytes": memory,
        "system": platform.system(), "python": platform.python_version(), "allocator": allocator.active(),
    }  # fmt: skip
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return found


def versions() -> dict[str, str]:
    """Versions of the installed libraries."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
