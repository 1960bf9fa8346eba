"""How fast this machine is: what `trimtab doctor` measured once (cost/microbench.py), kept for later plans.

A handful of rates: matrix products and attention by type, memory traffic, random numbers, the optimizer's update, the
cost of starting an operation, disk and link. They are kept (cache_file.py) in one file for each processor, number of
threads, torch and allocator: any of these changes them. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import cache_file

FORM = 3  # of the file; a file of another form is measured again
SMALL = 3e7  # floating-point operations; a product of fewer reaches the lower of its type's rates


@dataclass(frozen=True)
class Rates:
    """What was measured. Rates are per second."""

    machine: dict[str, Any]  # what it is valid for: `key(...)`
    products: dict[str, list[float]]  # type -> FLOP/s of [small, large] products
    attention: dict[str, float]  # type -> FLOP/s of a fused attention over the full square of scores
    bandwidth: float  # bytes read and written by operations on tensors that no cache can keep
    random: float  # random numbers
    update: float  # bytes read and written by fused AdamW
    overhead: float  # seconds that any operation takes: Python, autograd, dispatch
    disk: dict[str, float] = field(default_factory=dict)  # "read", "write": bytes, past the page cache
    link: dict[str, float] = field(default_factory=dict)  # "up" (to the GPU), "down": bytes; empty without one
    unpacking: float = 0.0  # 4-bit weights that are brought to 16 bits; 0 where that was not measured
    page_bytes: int = 4096
    seconds: float = 0.0  # that measuring took

    def product_seconds(self, dtype: str, flops: float) -> float:
        small, large = self.products.get(dtype) or self.products["float32"]
        return flops / (small if flops < SMALL else large)

    def attention_seconds(self, dtype: str, flops: float) -> float:
        return flops / (self.attention.get(dtype) or self.attention["float32"])

    def transfer_seconds(self, size: float) -> float:
        """Of reading and writing `size` bytes in all."""
        return size / self.bandwidth


def key(machine: dict[str, Any], torch_version: str, device: str) -> dict[str, Any]:
    """What the rates depend on: some of `run_folder.machine()`, and which `device` ("cpu", "cuda") computes."""
    names = ("cpu", "cores", "threads", "allocator", "gpu")
    return {**{name: machine[name] for name in names if name in machine}, "torch": torch_version, "device": device}


def path_of(machine: dict[str, Any], folder: Path) -> Path:
    """The file of `machine` (a `key`) under the cache folder."""
    name = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "rates" / f"{name}.json"


def load(machine: dict[str, Any], folder: Path) -> Rates | None:
    """What was measured on `machine` before; None where nothing was, or where the file cannot be used."""
    found = cache_file.read(path_of(machine, folder), FORM, machine)
    if found is None:
        return None
    try:
        rates = Rates(**found)
        return rates if _sound(rates) else None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def save(rates: Rates, folder: Path) -> bool:
    """False where the cache cannot be written (the rates then serve this process only)."""
    return cache_file.write(path_of(rates.machine, folder), FORM, asdict(rates))


def _sound(rates: Rates) -> bool:
    """Every rate a positive number, and none missing that a plan divides by."""
    tables = (rates.attention, rates.disk, rates.link)
    numbers = [rate for pair in rates.products.values() for rate in pair] + [r for t in tables for r in t.values()]
    numbers += [rates.bandwidth, rates.random, rates.update, rates.overhead, rates.page_bytes]
    whole = "float32" in rates.attention and "float32" in rates.products
    whole = whole and all(len(pair) == 2 for pair in rates.products.values()) and 0 <= rates.unpacking < math.inf
    return whole and all(isinstance(x, int | float) and 0 < x < math.inf for x in numbers)
