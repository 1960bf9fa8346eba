"""`trimtab doctor`: what this machine has, how fast it is, and what could be improved.

Measurements are kept, and plans predict from them (planning/calibrate.py): a quick one takes about 20 seconds,
`--thorough` takes five minutes and predicts better.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

from .cost.machine import machine, versions
from .memory import allocator
from .memory.budget import gib, ram
from .memory.meter import GIB
from .planning.calibrate import calibrate
from .tiered.mapped_file import in_ram

MOST_EFFICIENCY = 1.25  # of a step, compared with its operations measured one by one


def doctor(
    fresh: bool = False, thorough: bool = False, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Facts and rates: FLOP/s and bytes/s, memory and disk (bytes), allocator, advice. Arguments: see `calibrate`."""
    found: dict[str, Any] = {"machine": machine(), "versions": versions()}
    rates, beside, kept = calibrate(fresh, thorough, say)
    found["rates_were_kept"] = kept
    found["quick"] = beside.quick
    found["process"] = {
        "process_bytes": beside.process, "fixed_bytes": beside.fixed, "share": round(beside.share, 4),
        "autocast_overhead": round(beside.autocast_overhead, 4), "efficiency": round(beside.efficiency, 4),
        "measured": beside.measured,
    }  # fmt: skip
    found["disk_free_bytes"] = shutil.disk_usage(".").free
    found["disk_is_ram"] = in_ram(".")
    found["memory_free_bytes"] = ram().get("MemAvailable", 0)
    found["page_bytes"] = rates.page_bytes
    found["gflops"] = {name: round(large / 1e9, 1) for name, (_, large) in rates.products.items()}
    found["attention_gflops"] = {name: round(rate / 1e9, 1) for name, rate in rates.attention.items()}
    found["memory_bytes_per_second"] = round(rates.bandwidth)
    found["disk_bytes_per_second"] = {way: round(rate) for way, rate in rates.disk.items()}
    found["link_bytes_per_second"] = {way: round(rate) for way, rate in rates.link.items()}
    found["seconds_per_operation"] = rates.overhead
    found["seconds_measured"] = rates.seconds
    found["allocator_found"] = (allocator.find() or ("none", ""))[0]
    found["advice"] = list(_advice(found))
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What `doctor` found, as text."""
    facts, each = found["machine"], lambda rates: ", ".join(f"{way} {gib(rate)}/s" for way, rate in rates.items())
    measured = "kept from earlier; --fresh measures again" if found["rates_were_kept"] else "kept for later plans"
    measured += "; --thorough takes five minutes and makes plans more accurate" if found["quick"] else ""
    yield f"processor   {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads"
    free, pages = gib(found["memory_free_bytes"]), found["page_bytes"]
    yield f"memory      {gib(facts['memory_bytes'])}, {free} free, pages of {pages:,} bytes"
    kind = ", which is in RAM (tmpfs)" if found["disk_is_ram"] else ""
    yield f"disk        {gib(found['disk_free_bytes'])} free in this folder{kind}"
    yield f"gpu         {facts.get('gpu', 'none')}"
    yield f"measured    in {found['seconds_measured']:.0f} s, {measured}"
    yield "products    " + ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in found["gflops"].items())
    yield "attention   " + ", ".join(f"{name} {rate:,.0f}" for name, rate in found["attention_gflops"].items())
    yield f"traffic     memory {gib(found['memory_bytes_per_second'])}/s, disk {each(found['disk_bytes_per_second'])}"
    if found["link_bytes_per_second"]:
        yield f"link        {each(found['link_bytes_per_second'])}"
    yield f"operation   {found['seconds_per_operation'] * 1e6:.1f} us to start one"
    beside = found["process"]
    more = f"{gib(beside['fixed_bytes'])} and {beside['share']:.0%} of its tensors' growth"
    more += f" ({beside['share'] + beside['autocast_overhead']:.0%} under autocast)"
    yield f"efficiency  a step reaches {beside['efficiency']:.0%} of the speed of its operations measured one by one"
    yield f"process     a run begins with {gib(beside['process_bytes'])} and uses {more} beside its tensors"
    yield f"allocator   {facts['allocator']} now, {found['allocator_found']} for training"
    yield "versions    " + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    for line in found["advice"]:
        yield f"advice      {line}"


def _advice(found: dict[str, Any]) -> Iterator[str]:
    if not found["process"]["measured"]:
        yield "A small training failed here: what a process uses beside its tensors is assumed from another machine"
    if found["process"]["efficiency"] > MOST_EFFICIENCY:
        yield "The machine was busy during the measurement: whole steps were faster. Measure again with --fresh"
    if found["allocator_found"] == "none":
        yield "No mimalloc, jemalloc or tcmalloc was found: `pip install cmeel-mimalloc` makes training on a CPU faster"
    if found["gflops"]["bfloat16"] < found["gflops"]["float32"]:
        yield "bf16 is slower than fp32 on this processor: set model: {precision: fp32} if memory allows"
    if found["disk_is_ram"]:
        yield "This folder is in RAM (tmpfs): tables in files here save no memory. Name another folder in place: folder"
    if found["disk_free_bytes"] < 2 * GIB:
        yield "Less than 2 GiB of disk are free here: checkpoints may not fit"
