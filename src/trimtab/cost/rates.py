"""How fast this machine is: what `trimtab doctor` measured once (cost/microbench.py), kept for plans to come.

A handful of rates, each of one kind of work: products by type and shape, memory traffic by kind of operation,
attention, the optimiser's update, the cost of starting an operation at all, disk and link. They are kept
(cache_file.py), one file for each processor, number of threads, torch and allocator: any of these changes them.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import cache_file

FORM = 2  # of the file; another number is measured again
SMALLEST = 8  # of a product's dimensions: thinner ones take as long
LAYOUTS = ("NT", "NN", "TN")  # forward x W^T, pass back dy W, weight gradient dy^T x
TRAFFIC = ("plain", "turned", "function", "reduction", "select", "index", "random")


@dataclass(frozen=True)
class Rates:
    """What was measured. Rates are per second: floating-point operations of products, bytes of everything else."""

    machine: dict[str, Any]  # what it holds for: `key(...)`
    products: dict[str, list[list[float]]]  # "bfloat16 NT" -> [[m, k, n, FLOP/s], ...] of (m, k) times (k, n)
    traffic: dict[str, list[list[float]]]  # "bfloat16 plain" -> [[bytes moved, bytes/s], ...], rising sizes
    attention: dict[str, float]  # "bfloat16 forward", "... backward", "... causal forward" -> FLOP/s of the full square
    update: float  # fused AdamW, bytes/s
    overhead: float  # seconds that an operation takes whatever its size: Python, autograd, dispatch
    disk: dict[str, float] = field(default_factory=dict)  # "read", "write", bytes/s past the page cache
    link: dict[str, float] = field(default_factory=dict)  # "up" (to the GPU), "down", bytes/s; empty without one
    quantised: dict[str, float] = field(default_factory=dict)  # "nf4", "int8" -> weights a second brought to 16 bits
    page_bytes: int = 4096
    seconds: float = 0.0  # that measuring took
    quick: bool = False  # measured in a hurry

    def __post_init__(self):
        object.__setattr__(self, "_grids", {name: _Grid(rows) for name, rows in self.products.items()})

    def product(self, dtype: str, layout: str, m: int, k: int, n: int) -> float:
        """Seconds of (m, k) times (k, n)."""
        m, k, n = (max(size, SMALLEST) for size in (m, k, n))
        grids = self._grids  # type: ignore[attr-defined]
        grid = grids.get(f"{dtype} {layout}") or grids.get(f"float32 {layout}")
        return 2 * m * k * n / grid.rate(m, k, n)

    def moved(self, dtype: str, kind: str, size: float) -> float:
        """Seconds to read and write `size` bytes in all, in an operation of `kind` (TRAFFIC)."""
        if not size:
            return 0.0
        rows = self.traffic.get(f"{dtype} {kind}") or self.traffic[f"float32 {kind}"]
        return size / _between(rows, size)

    def far(self, kind: str, size: float) -> float:
        """Seconds to read and write `size` bytes that no cache holds, as the rows of a table: the rate of the most."""
        return size / self.traffic[f"float32 {kind}"][-1][1]

    def attend(self, dtype: str, causal: bool, backward: bool, flops: float) -> float:
        """Seconds of a fused attention whose whole square of scores takes `flops`."""
        way = f"{'causal ' if causal else ''}{'backward' if backward else 'forward'}"
        return flops / (self.attention.get(f"{dtype} {way}") or self.attention[f"float32 {way}"])

    def peak(self, dtype: str) -> float:
        """The best FLOP/s of any product in `dtype`; 0 where it was not measured."""
        return max((row[3] for layout in LAYOUTS for row in self.products.get(f"{dtype} {layout}", ())), default=0.0)

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a large copy in memory, read and written."""
        return self.traffic["float32 plain"][-1][1]


class _Grid:
    """FLOP/s at measured shapes, and between them: linear in the logarithms of the three dimensions."""

    def __init__(self, rows: list[list[float]]):
        self.known = {tuple(int(size) for size in row[:3]): math.log(row[3]) for row in rows}
        self.axes = [sorted({shape[axis] for shape in self.known}) for axis in range(3)]
        self.asked: dict[tuple[int, int, int], float] = {}

    def rate(self, m: int, k: int, n: int) -> float:
        if (m, k, n) not in self.asked:
            self.asked[m, k, n] = self._rate(m, k, n)
        return self.asked[m, k, n]

    def _rate(self, m: int, k: int, n: int) -> float:
        corners = [_around(axis, size) for axis, size in zip(self.axes, (m, k, n), strict=True)]
        total = 0.0
        for one in corners[0]:
            for two in corners[1]:
                for three in corners[2]:
                    if share := one[1] * two[1] * three[1]:
                        total += share * self._at((one[0], two[0], three[0]))
        return math.exp(total)

    def _at(self, shape: tuple[int, int, int]) -> float:
        """The measured corner, or the closest one that was (the very large ones were left out: they take long)."""
        if shape in self.known:
            return self.known[shape]
        far = lambda other: sum(abs(math.log(a / b)) for a, b in zip(shape, other, strict=True))  # noqa: E731
        return self.known[min(self.known, key=far)]


def _around(axis: list[int], size: int) -> list[tuple[int, float]]:
    """The two points of `axis` beside `size` with their shares; beyond its ends the end alone."""
    if size <= axis[0]:
        return [(axis[0], 1.0)]
    for low, high in zip(axis, axis[1:], strict=False):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return [(low, 1.0 - share), (high, share)]
    return [(axis[-1], 1.0)]


def _between(rows: list[list[float]], size: float) -> float:
    """The rate at `size`: between two measured sizes linear in the logarithms, beyond them that of the end."""
    if size <= rows[0][0]:
        return rows[0][1]
    for (low, slow), (high, fast) in zip(rows, rows[1:], strict=False):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(slow) + share * math.log(fast))
    return rows[-1][1]


# --- the cache -------------------------------------------------------------------------------------------------------


def key(machine: dict[str, Any], torch_version: str, device: str) -> dict[str, Any]:
    """What the rates hang on: some of `runs.machine()`, and which `device` ("cpu", "cuda") computes."""
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
    tables = [*rates.products.values(), *rates.traffic.values()]
    numbers = [row[-1] for table in tables for row in table] + [size for t in tables for row in t for size in row[:-1]]
    numbers += [*rates.attention.values(), *rates.disk.values(), *rates.link.values(), *rates.quantised.values()]
    numbers += [rates.update, rates.overhead, rates.page_bytes]
    needed = [f"float32 {layout}" in rates.products for layout in LAYOUTS]
    needed += [f"float32 {kind}" in rates.traffic for kind in TRAFFIC]
    ways = ("forward", "backward", "causal forward", "causal backward")
    needed += [f"float32 {way}" in rates.attention for way in ways]
    return all(needed) and all(tables) and all(isinstance(x, int | float) and 0 < x < math.inf for x in numbers)
