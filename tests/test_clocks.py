"""Two runs on one folder, and a wall clock that is set back or ahead during a run: nothing depends on it."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from pathlib import Path

import pytest

from helpers_run import forked, left, make_world, metrics, run, same, tree
from trimtab.errors import BadInput, Stopped
from trimtab.report.report import report

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "max_minutes": 30}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def jumps(monkeypatch) -> list[float]:
    """The wall clock jumps by up to ten years at each look, either way; one item per look."""
    draw, now, looks = random.Random(0), time.time, []

    def jumped() -> float:
        looks.append(draw.uniform(-3e8, 3e8))
        return now() + looks[-1]

    monkeypatch.setattr(time, "time", jumped)
    return looks


def seconds_of(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "memory.jsonl").read_text().splitlines()]
    return [row["seconds"] for row in rows]


def test_a_clock_that_jumps_changes_nothing(world, tmp_path, jumps):
    made = run(tree(world, tmp_path / "run", {"paca": {"r": 4}}, **STEPS))
    assert jumps and made["steps"] == 6
    assert 0 < made["measured"]["seconds"] < 120 and 0 < made["measured"]["tokens_per_second"]
    found = seconds_of(tmp_path / "run")
    assert found == sorted(found) and 0 <= found[0] and found[-1] < 120
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    times = [line["seconds"] for line in lines]
    assert times == sorted(times) and 0 <= times[0] and times[-1] < 120
    report([tmp_path / "run"])


def test_a_resumed_run_after_a_jump_is_the_same(world, tmp_path, jumps, minutes):
    keys = tree(world, tmp_path / "run", {"paca": {"r": 4}}, **{**STEPS, "max_minutes": 3})
    with pytest.raises(Stopped, match="checkpoint-"):
        run(keys)
    for path in (tmp_path / "run").rglob("*"):  # as if it had been written in a year to come
        os.utime(path, (4e9, 4e9))
    minutes.clear()
    keys["training"]["max_minutes"] = 1000
    run(keys, resume=True)
    run({**keys, "output": str(tmp_path / "whole")})
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert left(tmp_path / "run")["adapter/adapter_model.safetensors"] == left(tmp_path / "whole")[
        "adapter/adapter_model.safetensors"]  # fmt: skip


def test_of_two_runs_on_one_folder_one_is_refused(world, tmp_path):
    """Started at once in two processes, again and again: exactly one trains, and it is as if it had been alone."""
    keys = tree(world, tmp_path / "alone", {"paca": {"r": 4}}, max_steps=2)
    run(keys)
    for number in range(3):
        output = tmp_path / str(number)
        codes: list[int] = []
        both = threading.Barrier(2)
        start = tmp_path / f"start-{number}"

        def child(output: Path = output, start: Path = start) -> None:
            while not start.exists():
                time.sleep(0.001)
            run({**keys, "output": str(output)})

        def one(codes: list[int] = codes, both: threading.Barrier = both) -> None:
            both.wait()
            codes.append(forked(child))

        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        start.touch()
        for thread in threads:
            thread.join()
        assert sorted(codes) == [0, 2], codes
        same(left(output), left(tmp_path / "alone"))
        assert not list(output.glob(".*"))


def test_a_second_run_says_who_is_at_work(world, tmp_path):
    from trimtab.artifacts.run_folder import lock_run

    with lock_run(tmp_path / "run", "train"):
        pass
    child = os.fork()
    if child == 0:
        with lock_run(tmp_path / "run", "train"):
            (tmp_path / "held").touch()
            time.sleep(30)
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.005)
    try:
        with pytest.raises(BadInput, match=f"process {child} is at work"):
            run(tree(world, tmp_path / "run", {"paca": {"r": 4}}, max_steps=1))
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
