"""Budgets ("6GiB", "80%", "-2GiB") and the memory of this machine. Imports no torch except for a GPU.

A budget limits the fast tier (the memory where the model computes: a GPU's, or RAM) and optionally the slow tier below
it (RAM or disk). "80%" is a share of the machine's memory, "-2GiB" all but 2 GiB of it. GB means 10^9 bytes in input;
output is in GiB (2^30 bytes), or less if it is small.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput, nearest

UNITS = {"b": 1} | {
    f"{letter}{kind}".lower(): base**power
    for power, letter in enumerate("KMGT", 1)
    for kind, base in (("iB", 1024), ("B", 1000))
}
MOST = 10**15  # of any unit
EXAMPLES = 'Write for example "6GiB", "512MiB", "80%" or "-2GiB"'
_FORM = re.compile(r"(?P<minus>-?)\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|[a-z]*)", re.IGNORECASE)


def parse(text: str | int, total: int | None, where: str = "budget") -> int:
    """-> bytes. `total`: the machine's memory, the base of "80%" and "-2GiB" and the largest size allowed; None: this
    machine has no such device, and only a plain size is allowed.
    """
    asked = f"{where}: {text}"
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise BadInput(asked, "a size is a number with a unit", EXAMPLES)
    if isinstance(text, int):
        text = f"{text}B"
    found = _FORM.fullmatch(text.strip())
    if not found:
        raise BadInput(asked, "it is not a size", EXAMPLES)
    number, unit = float(found["number"]), found["unit"].lower()
    if total is None and (unit == "%" or found["minus"]):
        raise BadInput(asked, "this machine has no such device", 'Write a size, for example "24GiB"')
    if number > MOST:
        raise BadInput(asked, "it is more than any machine has", EXAMPLES)
    total = sys.maxsize if total is None else total
    if not unit and number:
        raise BadInput(asked, "it has no unit", f'Write "{found["number"]}GiB", or a whole number of bytes unquoted')
    if unit == "%":
        if found["minus"] or number > 100:
            raise BadInput(asked, "a share is from 0 to 100 %", 'Write "80%"')
        size = int(total * number / 100)
    elif unit and unit not in UNITS:
        raise BadInput(asked, f'"{found["unit"]}" is not a unit of memory', nearest(found["unit"], _names()))
    else:
        size = int(number * UNITS.get(unit, 1))
        size = total - size if found["minus"] else size
    if size <= 0:
        raise BadInput(asked, f"nothing would be left of {gib(total)}" if found["minus"] else "it is zero", EXAMPLES)
    if size > total:
        raise BadInput(asked, f"this machine has {gib(total)}", "Name at most that size")
    return size


def _names() -> list[str]:
    return ["B", *(f"{letter}{kind}" for letter in "KMGT" for kind in ("iB", "B"))]


def gib(size: float) -> str:
    """Formats bytes: "1.25 GiB", "12.5 MiB", "3.2 KiB", "256 B"."""
    if abs(size) >= 2**30 / 10:
        return f"{size / 2**30:.2f} GiB"
    if abs(size) >= 2**20 / 10:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**10:.1f} KiB" if abs(size) >= 2**10 else f"{size:.0f} B"


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may use in each tier; None: no limit."""

    fast: int | None = None
    slow: int | None = None

    @classmethod
    def of(cls, values: dict[str, Any] | None, fast_total: int | None, slow_total: int) -> Budget:
        """From a recipe's `budget:` keys and the sizes of this machine's tiers."""
        values = values or {}
        for key in values:
            if key not in ("fast", "slow"):
                raise BadInput(f'budget: "{key}"', "there is no such tier", nearest(str(key), ("fast", "slow")))
        totals = {"fast": fast_total, "slow": slow_total}
        sizes = {k: parse(v, totals[k], f"budget: {k}") for k, v in values.items() if v is not None}
        return cls(sizes.get("fast"), sizes.get("slow"))


def fast_bytes(device: Any = None) -> int | None:
    """Size of the fast tier: a GPU's memory, else RAM (or this process's control group limit). None: this machine does
    not have `device`.
    """
    if device is not None and device.type == "cuda":
        import torch

        if not torch.cuda.is_available():
            return None
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = ram().get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())  # "max": no limit
    except (OSError, ValueError):
        limit = total
    return min(total, limit)


def available_memory() -> int | None:
    """Bytes that can still be allocated on this machine (or in the control group) before the kernel kills a process;
    None: unknown."""
    system = ram()
    left = [system["MemAvailable"] + system.get("SwapFree", 0)] if "MemAvailable" in system else []
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = sum(int(size) for name, size in pairs if name in ("inactive_file", "active_file"))  # can be dropped
        left.append(limit - used + files)
    except (OSError, ValueError):
        pass  # no control group, or "max"
    return min(left, default=None)


def slow_bytes(device: Any = None, folder: str | None = None) -> int:
    """Size of the slow tier: RAM below a GPU, the disk below RAM."""
    if device is not None and device.type == "cuda":
        return fast_bytes() or 0
    return shutil.disk_usage(nearest_folder(folder or ".")).total


def free_bytes(folder: str | Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(nearest_folder(folder)).free


def nearest_folder(folder: str | Path) -> Path:
    """`folder`, or the nearest existing folder above it."""
    at = Path(folder).absolute()
    return next(place for place in (at, *at.parents) if place.is_dir())


def ram() -> dict[str, int]:
    """/proc/meminfo in bytes (MemTotal, MemAvailable, ...); empty if there is none."""
    found: dict[str, int] = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            words = rest.split()
            if words and words[0].isdigit():
                found[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    except OSError:
        pass
    return found
