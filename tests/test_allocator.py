"""Starting again under another malloc: the same arguments, once, and not at all where it is not wanted."""

from __future__ import annotations

import os
import sys

import pytest

from trimtab.memory import allocator


@pytest.fixture
def starts(monkeypatch):
    """The process's own restart, recorded instead of done."""
    calls: list[tuple] = []
    monkeypatch.setattr(os, "execve", lambda *a: calls.append(a))
    monkeypatch.setattr(allocator, "find", lambda name="auto": ("mimalloc", "/lib/libmimalloc.so"))
    monkeypatch.delenv(allocator.CHOSEN, raising=False)
    monkeypatch.delenv(allocator.STARTED, raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    return calls


@pytest.mark.parametrize("arguments", [
    ["-m", "trimtab.cli", "train", "my recipe.yaml", "training.max_steps=3", "--json"],
    ["/usr/bin/trimtab", "train", "r"], ["-X", "dev", "-c", "import trimtab"],
])  # fmt: skip
def test_a_restart_keeps_the_arguments(arguments, starts, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", *arguments])
    monkeypatch.setenv("KEPT", "yes")
    allocator.restart_under()
    ((program, argv, environment),) = starts
    assert program == sys.executable and argv == [sys.executable, *arguments]
    assert environment["LD_PRELOAD"] == "/lib/libmimalloc.so" and environment["KEPT"] == "yes"
    monkeypatch.setenv("LD_PRELOAD", environment["LD_PRELOAD"])
    monkeypatch.setenv(allocator.CHOSEN, environment[allocator.CHOSEN])
    allocator.restart_under()
    assert len(starts) == 1 and allocator.active() == "mimalloc", "once"


def test_none_means_none(starts, monkeypatch):
    allocator.restart_under("none")
    monkeypatch.setenv(allocator.CHOSEN, "none")
    allocator.restart_under("mimalloc")
    assert not starts


def test_what_is_preloaded_stays(starts, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/lib/other.so")
    allocator.restart_under()
    assert starts[0][2]["LD_PRELOAD"] == "/lib/other.so /lib/libmimalloc.so"


def test_an_allocator_that_did_not_load_is_not_tried_for_ever(starts, monkeypatch):
    """A launcher that clears LD_PRELOAD must not make the process start itself again and again."""
    allocator.restart_under()
    for name in (allocator.CHOSEN, allocator.STARTED):
        monkeypatch.setenv(name, starts[0][2][name])
    allocator.restart_under()
    assert len(starts) == 1
    monkeypatch.setenv(allocator.STARTED, "1")  # a child of that process
    allocator.restart_under()
    assert len(starts) == 2


def test_none_found_or_another_system(starts, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    allocator.restart_under()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocator, "find", lambda name="auto": None)
    allocator.restart_under()
    assert not starts


def test_finding_one(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages" / "cmeel.prefix" / "lib"
    folder.mkdir(parents=True)
    files = {"jemalloc": "libjemalloc.so.2", "tcmalloc": "libtcmalloc_minimal.so.4", "mimalloc": "libmimalloc.so.3"}
    for file in files.values():
        (folder / file).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    for name, file in files.items():
        assert allocator.find(name) == (name, str(folder / file)), "the packaged one comes before the system's"
    assert allocator.find() == ("mimalloc", str(folder / "libmimalloc.so.3")), "the first of ORDER"
    assert allocator.find("nomalloc") is None
    system = tmp_path / "lib"
    system.mkdir()
    (folder / files["tcmalloc"]).rename(system / files["tcmalloc"])
    monkeypatch.setattr(allocator.glob, "glob", lambda pattern: [str(system)])
    assert allocator.find("tcmalloc") == ("tcmalloc", str(system / files["tcmalloc"]))


def test_under_a_hard_budget_it_maps_what_it_needs(starts, monkeypatch):
    monkeypatch.delenv("MIMALLOC_ARENA_EAGER_COMMIT", raising=False)
    allocator.restart_under("auto", hard=True)
    allocator.restart_under("auto")
    assert [call[2].get("MIMALLOC_ARENA_EAGER_COMMIT") for call in starts] == ["0", None]
