"""Rates of this machine, measured once by `trimtab doctor` (cost/microbench.py) and cached for plans.

They are those of matrix products and attention by dtype, memory traffic, random numbers, the optimizer's update, the
start of an operation, disk and link. The cache (cache_file.py) has one file per processor, number of threads, torch
version and allocator, since each changes them. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import cache_file

FORM = 3  # of the file; rates in a file of another format are measured again
SMALL = 3e7  # floating-point operations; a product with fewer has the rate of small products


@dataclass(frozen=True)
class Rates:
    """Measured rates, per second."""

    machine: dict[str, Any]  # the machine they are valid for: `key(...)`
    products: dict[str, list[float]]  # dtype -> FLOP/s of [small, large] products
    attention: dict[str, float]  # dtype -> FLOP/s of a fused attention over the full square of scores
    bandwidth: float  # bytes read and written by operations on tensors too large for caches
    random: float  # random numbers
    update: float  # bytes read and written by fused AdamW
    overhead: float  # seconds that any operation takes: Python, autograd, dispatch
    disk: dict[str, float] = field(default_factory=dict)  # "read", "write": bytes, past the page cache
    link: dict[str, float] = field(default_factory=dict)  # "up" (to the GPU), "down": bytes; empty without one
    unpacking: float = 0.0  # 4-bit weights unpacked to 16 bits; 0 if not measured
    page_bytes: int = 4096
    seconds: float = 0.0  # duration of the measurement

    def product_seconds(self, dtype: str, flops: float) -> float:
        small, large = self.products.get(dtype) or self.products["float32"]
        return flops / (small if flops < SMALL else large)

    def attention_seconds(self, dtype: str, flops: float) -> float:
        return flops / (self.attention.get(dtype) or self.attention["float32"])

    def transfer_seconds(self, size: float) -> float:
        """Seconds of reading and writing `size` bytes in total."""
        return size / self.bandwidth


def key(machine: dict[str, Any], torch_version: str, device: str) -> dict[str, Any]:
    """What the rates depend on: some of `machine.machine()`, the torch version, and the `device` ("cpu", "cuda")."""
    names = ("cpu", "cores", "threads", "allocator", "gpu")
    return {**{name: machine[name] for name in names if name in machine}, "torch": torch_version, "device": device}


def path_of(machine: dict[str, Any], folder: Path) -> Path:
    """The file of `machine` (a `key`) under the cache folder."""
    name = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "rates" / f"{name}.json"


def load(machine: dict[str, Any], folder: Path) -> Rates | None:
    """The rates measured on `machine` before; None if there are none, or if the file cannot be used."""
    found = cache_file.read(path_of(machine, folder), FORM, machine)
    if found is None:
        return None
    try:
        rates = Rates(**found)
        return rates if _sound(rates) else None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def save(rates: Rates, folder: Path) -> bool:
    """-> False if the cache cannot be written."""
    return cache_file.write(path_of(rates.machine, folder), FORM, asdict(rates))


def _sound(rates: Rates) -> bool:
    """Whether every rate is a positive number and none that a plan needs is missing."""
    tables = (rates.attention, rates.disk, rates.link)
    numbers = [rate for pair in rates.products.values() for rate in pair] + [r for t in tables for r in t.values()]
    numbers += [rates.bandwidth, rates.random, rates.update, rates.overhead, rates.page_bytes]
    whole = "float32" in rates.attention and "float32" in rates.products
    whole = whole and all(len(pair) == 2 for pair in rates.products.values()) and 0 <= rates.unpacking < math.inf
    return whole and all(isinstance(x, int | float) and 0 < x < math.inf for x in numbers)
