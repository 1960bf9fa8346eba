"""The meter: exact on a known sequence of tensors, and never below what was held."""

from __future__ import annotations

import gc
import json

import torch

from helpers_run import forked
from trimtab.memory.meter import LiveTensors, Meter, process_memory

KIB = 1024


def test_live_tensors_are_counted_exactly():
    kept = torch.zeros(KIB, dtype=torch.float32)  # 4 KiB
    with LiveTensors([kept, kept.view(2, -1)]) as live:
        assert live.live == live.peak_bytes == 4 * KIB, "a view is no second storage"
        one = torch.zeros(2 * KIB)  # 8
        two = one + 1  # 8
        assert live.live == 20 * KIB
        view = two[:10]
        del two
        assert live.live == 20 * KIB, "the view holds the storage"
        del view
        assert live.live == 12 * KIB
        one.mul_(2)
        assert live.live == 12 * KIB, "in place"
        three = one.to(torch.bfloat16)  # 4
        del one, three
        assert live.live == 4 * KIB and live.peak_bytes == 20 * KIB
    torch.zeros(KIB)
    assert live.peak_bytes == 20 * KIB, "nothing is counted outside"


def test_live_tensors_see_backward():
    weight = torch.zeros(KIB, requires_grad=True)
    with LiveTensors([weight]) as live:
        (weight * 2).exp().sum().backward()
        gc.collect()
        assert live.live == 8 * KIB, "the weight and its gradient"
        assert live.peak_bytes >= 12 * KIB


def test_live_tensors_see_views_of_views_and_splits():
    with LiveTensors() as live:
        parts = torch.zeros(4 * KIB).split(KIB)
        assert live.live == 16 * KIB
        first = parts[0]
        del parts
        assert live.live == 16 * KIB
        del first
        assert live.live == 0


def test_mapped_tensors_are_counted_apart(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(64 * KIB)}, path)
    mapped = torch.from_file(str(path), shared=False, size=64 * KIB)
    ours = torch.zeros(KIB)
    with LiveTensors([mapped, ours]) as live:
        assert (live.mapped, live.live) == (256 * KIB, 4 * KIB)
        copy = mapped.clone()
        assert (live.mapped, live.live, copy.numel()) == (256 * KIB, 260 * KIB, 64 * KIB), "a copy is not in the file"


def test_the_peak_is_at_least_what_was_held(tmp_path):
    """In a process of its own, whose pages no one else has touched."""

    def child():
        meter = Meter(tmp_path / "memory.jsonl", seconds=0.001).start()
        meter.mark("big")
        block = torch.ones(64 * 2**20 // 4)
        while meter.peak["anon"] - meter.baseline["anon"] < 60 * 2**20:
            pass  # until the thread has sampled it; a hang would be the failure
        del block
        meter.stop()
        found = meter.result()
        assert found["fast_growth_bytes"] >= 60 * 2**20
        assert found["fast_peak_bytes"] >= found["fast_growth_bytes"] + 1

    assert forked(child) == 0
    lines = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert lines and {"seconds", "phase", "anon", "file"} <= lines[0].keys()


def test_a_meter_outlives_its_folder_and_stops_twice(tmp_path):
    meter = Meter(tmp_path / "gone" / "memory.jsonl", seconds=0.001).start()
    meter.stop()
    meter.stop()
    assert meter.timeline is None and meter.result()["fast_peak_bytes"] > 0


def test_process_memory():
    held = process_memory()
    assert held["anon"] > 0 and held["file"] > 0
    assert process_memory(2**30) == {"anon": 0, "file": 0, "data": 0}
