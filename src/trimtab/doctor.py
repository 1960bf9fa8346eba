"""`trimtab doctor`: what this machine has, how fast it is, and what could be better.

What is measured is kept (cost/rates.py, cost/overhead.py), and plans predict from it: in a hurry at first, in about
20 seconds; `--thorough` takes five minutes and predicts better.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from .cost import overhead, rates
from .cost.machine import machine, versions
from .cost.overhead import Overhead
from .cost.rates import Rates
from .memory import allocator
from .memory.budget import gib, ram
from .memory.meter import GIB
from .model.hub import cache_root
from .quiet import hushed
from .subprocess_call import apart
from .tiered.mapped_file import in_ram

Say = Callable[[str], None]
MOST_PACE = 1.25  # of a step, beside its operations measured one by one


def doctor(fresh: bool = False, thorough: bool = False, say: Say | None = None) -> dict[str, Any]:
    """Facts and rates: FLOP/s and bytes/s, memory and disk (bytes), allocator, advice; see `know` for the rest."""
    found: dict[str, Any] = {"machine": machine(), "versions": versions()}
    held, beside, kept = know(fresh, thorough, say)
    found["rates_were_kept"] = kept
    found["quick"] = held.quick or beside.quick
    found["process"] = {
        "process_bytes": beside.process, "fixed_bytes": beside.fixed, "share": round(beside.share, 4),
        "cast": round(beside.cast, 4), "pace": round(beside.pace, 4), "measured": beside.measured,
    }  # fmt: skip
    found["disk_free_bytes"] = shutil.disk_usage(".").free
    found["disk_is_ram"] = in_ram(".")
    found["memory_free_bytes"] = ram().get("MemAvailable", 0)
    found["page_bytes"] = held.page_bytes
    found["gflops"] = {name: round(held.peak(name) / 1e9, 1) for name in ("bfloat16", "float32", "float16")}
    found["attention_gflops"] = {name: round(rate / 1e9, 1) for name, rate in held.attention.items()}
    found["memory_bytes_per_second"] = round(held.bandwidth)
    found["disk_bytes_per_second"] = {way: round(rate) for way, rate in held.disk.items()}
    found["link_bytes_per_second"] = {way: round(rate) for way, rate in held.link.items()}
    found["seconds_per_operation"] = held.overhead
    found["seconds_measured"] = held.seconds
    found["allocator_found"] = (allocator.find() or ("none", ""))[0]
    found["advice"] = list(_advice(found))
    return found


def know(fresh: bool = False, thorough: bool = False, say: Say | None = None) -> tuple[Rates, Overhead, bool]:
    """The rates of this machine, what a process holds on it, and whether the rates were kept from before.

    What is not kept yet is measured now: in a hurry (about 20 seconds), or `thorough` (about five minutes), which
    replaces what was measured in a hurry, and is never replaced by it. `fresh`: measure again, as thoroughly as before.
    `say` gets a line for each part.
    """
    say = say or (lambda line: None)
    rates_kept, beside = known_rates(), known_overhead()
    thorough = thorough or (rates_kept is not None and not rates_kept.quick) and fresh
    thorough = thorough or (beside.measured and not beside.quick) and fresh
    new_rates = fresh or rates_kept is None or (thorough and rates_kept.quick)
    new_beside = fresh or not beside.measured or (thorough and beside.quick)
    if new_rates or new_beside:
        say(f"Measuring this machine, once: about {'five minutes' if thorough else '20 seconds'} if nothing else runs")
    if new_rates:
        say("  products, memory, disk ...")
    held = measured_rates(fresh=True, thorough=thorough) if new_rates or rates_kept is None else rates_kept
    if new_beside:
        from .planning import calibrate

        found = calibrate.measure(thorough, lambda line: say(f"  {line}"))
        if found.measured:
            overhead.save(found, _key("cpu"), cache_root())
        beside = found
    return held, beside, not new_rates


def known_rates(device: str = "auto") -> Rates | None:
    """The rates of "cpu" or "cuda" under the allocator and threads of this process, if they were measured before."""
    return rates.load(_key(device), cache_root())


def measured_rates(device: str = "auto", fresh: bool = False, thorough: bool = False) -> Rates:
    """The rates that are kept, or those measured now and kept. The disk is that of the cache folder."""
    if not fresh and (known := known_rates(device)) is not None:
        return known
    found = Rates(**apart(_measure_here, _key(device), thorough))
    rates.save(found, cache_root())
    return found


def _measure_here(machine: dict[str, Any], thorough: bool) -> dict[str, Any]:
    """Apart, for what the products leave in an allocator would count against the budget of the run that asks."""
    import torch

    from .cost.microbench import measure

    torch.set_num_threads(machine["threads"])
    with hushed():
        return asdict(measure(machine, cache_root(), quick=not thorough))


def known_overhead() -> Overhead:
    """What a training process holds beside its tensors on this machine's CPU, or the default where it is not known."""
    return overhead.load(_key("cpu"), cache_root())


def _key(device: str) -> dict[str, Any]:
    import torch

    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return rates.key(machine(), version("torch"), auto if device == "auto" else device)


def lines(found: dict[str, Any]) -> Iterator[str]:
    """For people, from what `doctor` found."""
    facts, each = found["machine"], lambda rates: ", ".join(f"{way} {gib(rate)}/s" for way, rate in rates.items())
    measured = "kept from before; --fresh measures again" if found["rates_were_kept"] else "kept for plans to come"
    measured += "; in a hurry: --thorough takes five minutes, and plans are closer then" if found["quick"] else ""
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
    more += f" ({beside['share'] + beside['cast']:.0%} under autocast)"
    yield f"pace        a step reaches {beside['pace']:.0%} of what its operations reach one by one"
    yield f"process     a run begins with {gib(beside['process_bytes'])} and holds {more} beside its tensors"
    yield f"allocator   {facts['allocator']} now, {found['allocator_found']} for training"
    yield "versions    " + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    for line in found["advice"]:
        yield f"advice      {line}"


def _advice(found: dict[str, Any]) -> Iterator[str]:
    if not found["process"]["measured"]:
        yield "A small training did not come to its end here: what a process holds beside tensors is another machine's"
    if found["process"]["pace"] > MOST_PACE:
        yield "The machine was busy while its operations were measured: steps were faster. --fresh measures again"
    if found["allocator_found"] == "none":
        yield "No mimalloc, jemalloc or tcmalloc was found: `pip install cmeel-mimalloc` makes training on a CPU faster"
    if found["gflops"]["bfloat16"] < found["gflops"]["float32"]:
        yield "bf16 is slower than fp32 on this processor: set model: {precision: fp32} if memory allows"
    if found["disk_is_ram"]:
        yield "This folder is in RAM (tmpfs): tables in its files would save no memory; name another in place: folder"
    if found["disk_free_bytes"] < 2 * GIB:
        yield "Less than 2 GiB of disk is free here: checkpoints may not fit"
