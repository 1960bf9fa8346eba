"""Sizes as people write them, and what is no size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trimtab.errors import BadInput
from trimtab.memory.budget import Budget, fast_bytes, free_bytes, gib, parse, ram, slow_bytes

GIB = 2**30
TOTAL = 16 * GIB


@pytest.mark.parametrize(
    "text,size",
    [
        ("6GiB", 6 * GIB), ("6 gib", 6 * GIB), ("6GB", 6 * 10**9), ("512MiB", 512 * 2**20), ("1.5GiB", 3 * GIB // 2),
        ("500MB", 500 * 10**6), ("64KiB", 65536), ("1000B", 1000), (2_000_000_000, 2_000_000_000),
        ("80%", TOTAL * 4 // 5), ("100 %", TOTAL), ("-2GiB", 14 * GIB), ("-500MB", TOTAL - 500 * 10**6),
        ("0.01TiB", 10995116277),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse(text, TOTAL) == size


@pytest.mark.parametrize(
    "text,said",
    [
        ("plenty", "not a size"), ("", "not a size"), ("GiB", "not a size"), ("1e3MiB", "no"), ("6", "no unit"),
        ("6Gib/s", "not a size"), ("6Gigs", 'Did you mean "GiB"'), ("6 XB", "not a unit"), ("0GiB", "zero"),
        ("0%", "zero"), (0, "zero"), ("120%", "0 to 100"), ("-20%", "0 to 100"),
        ("-16GiB", "nothing would be left of 16.00 GiB"), ("17GiB", "this machine has 16.00 GiB"), (True, "a number"),
        (1.5, "a number"), (None, "a number"), (["6GiB"], "a number"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(text, said):
    with pytest.raises(BadInput, match=said):
        parse(text, TOTAL)


def test_a_budget_of_two_tiers():
    budget = Budget.of({"fast": "50%", "slow": "-1GiB"}, TOTAL, 100 * GIB)
    assert (budget.fast, budget.slow) == (8 * GIB, 99 * GIB)
    assert Budget.of(None, TOTAL, TOTAL) == Budget() == Budget.of({}, TOTAL, TOTAL)
    with pytest.raises(BadInput, match='"fats".*Did you mean "fast"'):
        Budget.of({"fats": "1GiB"}, TOTAL, TOTAL)
    with pytest.raises(BadInput, match="budget: slow: 101GiB: this machine has 100.00 GiB"):
        Budget.of({"slow": "101GiB"}, TOTAL, 100 * GIB)


@pytest.mark.parametrize(
    "limit", ["max\n", f"{GIB // 4}\n", f"{2**60}\n", None], ids=["max", "less", "more", "no file"]
)
def test_this_machine(limit, monkeypatch, tmp_path):
    """RAM is what the kernel says, or less if the control group has a limit; the slow tier is the folder's disk."""
    physical, read = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), Path.read_text

    def limited(path: Path, *args, **kwargs) -> str:
        if path != Path("/sys/fs/cgroup/memory.max"):
            return read(path, *args, **kwargs)
        if limit is None:
            raise FileNotFoundError(path)
        return limit

    monkeypatch.setattr(Path, "read_text", limited)
    assert fast_bytes() == (GIB // 4 if limit == f"{GIB // 4}\n" else physical)
    assert ram()["MemTotal"] == physical and 0 < ram()["MemAvailable"] < physical
    assert slow_bytes(folder=str(tmp_path / "not" / "there")) == shutil.disk_usage(tmp_path).total
    assert 0 < free_bytes(tmp_path / "not" / "there") <= slow_bytes(folder=str(tmp_path))
    assert slow_bytes(torch.device("cuda")) == fast_bytes(), "under a GPU, RAM is the slow tier"


def test_sizes_are_shown_in_gib():
    small = {0: "0 B", 1: "1 B", 0.4: "0 B", 1023: "1023 B", 1024: "1.0 KiB", -2048: "-2.0 KiB", 50_000: "48.8 KiB"}
    assert {size: gib(size) for size in small} == small and gib(2**20 // 10 + 1) == "0.1 MiB"
    for power in range(0, 50):  # no size is shown as nothing, or as more than a few digits
        number, unit = gib(2**power).split()
        assert float(number) > 0 and len(number) <= 8 and parse(f"{number}{unit}", None, "x") == 2**power or power > 16
    assert gib(3 * GIB) == "3.00 GiB" and gib(50 * 2**20) == "50.0 MiB" and gib(6 * 10**9) == "5.59 GiB"


def test_it_loads_no_torch():
    code = "import sys, trimtab.memory.budget as b; b.fast_bytes(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
