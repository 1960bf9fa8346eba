"""A run that is killed, or whose disk is full: earlier checkpoints stay whole, and the run continues exactly."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from helpers_run import PATCHES, TABLES, die, forked, interrupt, left, make_world, run, same, tree
from trimtab.artifacts import adapter, adapter_weights
from trimtab.artifacts.adapter_weights import WEIGHTS
from trimtab.engine import trainers as engine
from trimtab.errors import BadInput, DoesNotFit, Interrupted
from trimtab.tiered import checkpoint, mapped_file
from trimtab.training import train as train_verb
from world import at_step

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


# --- killed ----------------------------------------------------------------------------------------------------------

KILLED = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
# function of the engine's, and how often it is called before the process is killed, before or after its work
INSTANTS = [
    (torch, "save", 1, True), (torch, "save", 4, False), (torch, "save", 5, True), (torch, "save", 12, False),
    (adapter_weights, "write_tensors", 1, False), (adapter_weights, "write_tensors", 3, True),
    (adapter, "_write_json", 4, True),
    (engine, "sync", 2, True), (engine, "sync", 2, False), (os, "replace", 4, False), (os, "replace", 4, True),
    (engine, "discard", 2, True), (engine, "discard", 2, False), (engine.shutil, "rmtree", 13, True),
    (engine.shutil, "rmtree", 15, True), (engine.shutil, "rmtree", 20, True),
]  # fmt: skip


def dying(owner, name: str, nth: int, before: bool):
    """`owner.name`, killed at its n-th call."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def wrapped(*args, **kwargs):
        last = next(calls) == nth
        if last and before:
            die()
        result = real(*args, **kwargs)
        if last:
            die()
        return result

    return wrapped


@pytest.fixture(scope="module")
def unkilled(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("unkilled") / "run"
    run(tree(world, output, PATCHES["paca reselect"], **KILLED))
    return left(output)


def finish(keys: dict, unkilled) -> None:
    """Start again as a user would, and compare with the run that nothing happened to."""
    output = Path(keys["output"])
    for found in engine.checkpoints(output):
        assert {p.name for p in found.iterdir()} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth", WEIGHTS}
    run(keys, **({"resume": True} if engine.checkpoints(output) else {"overwrite": True}))
    same(left(output), unkilled)
    assert not list(output.glob(".*")), "leftovers"
    assert len(engine.checkpoints(output)) in (2, 3)  # 3: killed after the last save, before the last removal


@pytest.mark.parametrize("instant", INSTANTS, ids=lambda i: f"{i[1]}-{i[2]}-{'before' if i[3] else 'after'}")
def test_killed_while_writing_a_checkpoint(instant, world, tmp_path, unkilled, monkeypatch):
    owner, name, nth, before = instant
    keys = tree(world, tmp_path / "run", PATCHES["paca reselect"], **KILLED)

    def child():
        monkeypatch.setattr(owner, name, dying(owner, name, nth, before))
        run(keys)

    assert forked(child) == -signal.SIGKILL
    finish(keys, unkilled)


MEFT = {"meft": {**TABLES, "r": 256, "experts": 128, "probes": 1, "k": 2, "moments": "int8"}}  # few rows change a step
# 2 tables, a delta each in each of 4 checkpoints, from the second on with links to the deltas before
TABLE_INSTANTS = [
    (checkpoint, "write_tensors", 2, False), (checkpoint, "write_tensors", 5, True), (checkpoint, "link", 3, False),
    (torch, "save", 6, True), (engine, "sync", 3, True), (os, "replace", 6, False), (engine, "discard", 2, True),
]  # fmt: skip


@pytest.fixture(scope="module")
def unkilled_tables(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("unkilled") / "run"
    run(tree(world, output, MEFT, **KILLED))
    return left(output)


@pytest.mark.parametrize("instant", TABLE_INSTANTS, ids=lambda i: f"{i[1]}-{i[2]}-{'before' if i[3] else 'after'}")
def test_killed_while_writing_tables(instant, world, tmp_path, unkilled_tables, monkeypatch):
    owner, name, nth, before = instant
    keys = tree(world, tmp_path / "run", MEFT, **KILLED)

    def child():
        monkeypatch.setattr(owner, name, dying(owner, name, nth, before))
        run(keys)

    assert forked(child) == -signal.SIGKILL
    finish(keys, unkilled_tables)


def test_killed_at_any_time(world, tmp_path, unkilled):
    draw = random.Random(0)
    for index in range(4):
        keys = tree(world, tmp_path / f"run{index}", PATCHES["paca reselect"], **KILLED)
        delay = draw.uniform(0.15, 0.9)

        def child(delay=delay, keys=keys):
            threading.Thread(target=lambda: (time.sleep(delay), die()), daemon=True).start()
            run(keys)

        forked(child)
        finish(keys, unkilled)


# --- full disk -------------------------------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("owner,name", [(adapter_weights, "write_tensors"), (torch, "save"), (adapter, "_write_json")])
def test_a_full_disk_in_a_checkpoint_leaves_the_earlier_one(owner, name, world, tmp_path, unkilled, monkeypatch):
    keys = tree(world, tmp_path / "run", PATCHES["paca reselect"], **KILLED)
    with monkeypatch.context() as patched, pytest.raises(BadInput, match="No space left"):
        with at_step(4, lambda: patched.setattr(owner, name, full)):
            run(keys)
    assert [p.name for p in engine.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob(".*"))
    finish(keys, unkilled)


@pytest.mark.parametrize("where", ["save_adapter", "write_json"])
def test_a_full_disk_at_the_end(where, world, tmp_path, monkeypatch):
    keys = tree(world, tmp_path / "run", PATCHES["paca"], max_steps=2, save_strategy="steps", save_steps=2)
    with monkeypatch.context() as patched, pytest.raises(BadInput, match="No space left"):
        writer = (adapter_weights, "write_tensors") if where == "save_adapter" else (train_verb, "write_json")
        patched.setattr(*writer, full)
        if where == "save_adapter":
            keys["training"]["save_strategy"] = "no"
        run(keys)
    assert not (tmp_path / "run" / "run.json").exists() and not list((tmp_path / "run").glob(".*"))


def test_a_folder_that_is_taken_away(world, tmp_path):
    keys = tree(world, tmp_path / "run", PATCHES["paca"], max_steps=4, logging_steps=1)
    with (
        at_step(2, lambda: shutil.rmtree(tmp_path / "run")),
        pytest.raises(BadInput, match="the folder was removed"),
    ):
        run(keys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("limit", [2_000, 12_000, 30_000])
def test_files_that_cannot_grow(limit, world, tmp_path):
    """The kernel's own refusal, through safetensors and torch.save as they are."""
    keys = tree(world, tmp_path / "run", {"paca": {"r": 8}}, max_steps=2, save_strategy="steps", save_steps=1)

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        run(keys)

    assert forked(child) == 2
    assert not engine.checkpoints(tmp_path / "run") and not list((tmp_path / "run").glob(".*"))


def test_a_checkpoint_of_tables_that_does_not_fit_leaves_the_earlier_one(world, tmp_path, unkilled_tables):
    """The kernel's own refusal, in the middle of a table's file."""
    keys = tree(world, tmp_path / "run", MEFT, **KILLED)

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with at_step(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))):
            run(keys)

    assert forked(child) == 2
    assert [p.name for p in engine.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    finish(keys, unkilled_tables)


def test_tables_that_the_disk_cannot_hold_are_refused_before_anything_is_made(world, tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_file, "free_bytes", lambda folder: 10_000)
    keys = tree(world, tmp_path / "deep" / "run", MEFT, max_steps=1)
    with monkeypatch.context() as patched, pytest.raises(DoesNotFit, match="9.8 KiB are free there") as error:
        patched.setattr(mapped_file, "map_file", lambda *args: pytest.fail("a table was made"))
        run(keys)
    assert error.value.exit_code == 3 and not (tmp_path / "deep").exists()


def test_a_damaged_table_is_told_when_the_run_goes_on(world, tmp_path):
    keys = tree(world, tmp_path / "run", MEFT, **KILLED)
    with at_step(4, interrupt), pytest.raises(Interrupted):
        run(keys)
    path = next((tmp_path / "run" / "checkpoint-4" / "rows").glob("*/1.safetensors"))
    whole = bytearray(path.read_bytes())
    whole[-1000] ^= 1
    path.write_bytes(whole)
    with pytest.raises(BadInput, match="not what was written") as error:
        run(keys, resume=True)
    assert str(path) in str(error.value)


def test_a_run_is_not_resumed_on_another_base(world, tmp_path):
    from helpers_load import tiny_llama

    keys = tree(world, tmp_path / "run", PATCHES["paca"], max_steps=4, save_strategy="steps", save_steps=2)
    keys["model"] = str(tiny_llama(tmp_path / "llama", dtype=torch.float32))
    with at_step(2, interrupt), pytest.raises(Interrupted):
        run(keys)
    tiny_llama(tmp_path / "llama", seed=1, dtype=torch.float32)
    with pytest.raises(BadInput, match="this model is another one"):
        run(keys, resume=True)
