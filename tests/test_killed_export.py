"""An export, or the conversion of a GGUF base, that is killed at any instant: run again, it leaves the same files.

Until then there is nothing under the final name, or the earlier export: nothing half-written is taken for whole.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers_faults import content
from helpers_gguf import make_folder
from helpers_run import die, forked, make_world, tree
from trimtab.inference.export import MARK, export
from trimtab.model import hub
from trimtab.process.call import subprocess_call
from trimtab.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")
FORMS = ("peft", "merged", "gguf", "gguf-lora")


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """The folder of a run whose model can be exported in each form."""
    world = make_world(tmp_path_factory.mktemp("world"))
    model = make_folder(world / "model", "llama")
    keys = tree(world, world / "run", {"lora": {"r": 4}}, max_steps=2, max_length=128)
    Recipe.from_dict({**keys, "model": model}).train()
    return world / "run"


def killed(work: Callable[[], object], delay: float) -> bool:
    """Do `work` in a process that is killed after `delay` seconds; -> False if it was done before."""

    def child() -> None:
        threading.Thread(target=lambda: (time.sleep(delay), die()), daemon=True).start()
        work()

    code = forked(child)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def exports(ran: Path, folder: Path, to: str, kills: range, later: bool) -> None:
    """`later`: an earlier export is replaced, which stays whole until then."""
    recipe, out = Recipe.load(ran), folder / "out"
    export(recipe, to, out)
    whole, began = content(out), time.monotonic()
    export(recipe, to, out, overwrite=True)
    took, done = time.monotonic() - began, 0
    assert content(out) == whole, "two exports are the same"
    for number in kills:
        draw = random.Random(f"{to} {number}")
        if not later:
            export(recipe, to, out, overwrite=True)
            for path in out.iterdir():
                path.unlink()
        while not killed(lambda: export(recipe, to, out, overwrite=True), draw.uniform(0, took)):
            if not later:
                for path in out.iterdir():
                    path.unlink()
        if out.exists() and any(out.iterdir()):
            assert content(out) == whole, "half an export"
        else:
            assert not later or (folder / ".out.old").exists(), "the earlier export is lost"
        export(recipe, to, out, overwrite=True)
        assert content(out) == whole
        assert {path.name for path in folder.iterdir()} == {"out"}, "leftovers"
        done += 1
    print(f"{to}: {done} of {len(kills)} kills")


@pytest.mark.parametrize("to", FORMS)
def test_an_export_killed_at_any_time(to, ran, tmp_path):
    exports(ran, tmp_path, to, range(1), later=to != "gguf")


@pytest.mark.long
@pytest.mark.parametrize("to", FORMS)
def test_an_export_killed_often(to, ran, tmp_path):
    exports(ran, tmp_path, to, range(1, 6), later=True)
    exports(ran, tmp_path / "new", to, range(6, 11), later=False)


# --- converting ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(ran, tmp_path_factory) -> Path:
    """A GGUF file to convert."""
    export(Recipe.load(ran), "gguf", tmp_path_factory.mktemp("base") / "base")
    return next(path for path in tmp_path_factory.getbasetemp().glob("base*/base/*.gguf"))


def converts(base: Path, folder: Path, monkeypatch, kills: range) -> None:
    silent = lambda line: None  # noqa: E731
    monkeypatch.setenv("TRIMTAB_CACHE", str(folder / "whole"))
    began = time.monotonic()
    made = hub.cached_folder(str(base), say=silent)
    took, whole = time.monotonic() - began, content(made)
    for number in kills:
        draw, cache = random.Random(number), folder / str(number)
        monkeypatch.setenv("TRIMTAB_CACHE", str(cache))
        while not killed(lambda: hub.cached_folder(str(base), say=silent), draw.uniform(0, took)):
            pass
        found = cache / made.name
        assert not found.exists() or content(found) == whole, "half a model"
        assert content(hub.cached_folder(str(base), say=silent)) == whole
        assert not [path.name for path in cache.iterdir() if "partial" in path.name], "leftovers"


def test_a_conversion_killed_at_any_time(base, tmp_path, monkeypatch):
    here = lambda work, *arguments, **rest: work(*arguments)  # noqa: E731
    monkeypatch.setattr(hub, "subprocess_call", here)
    converts(base, tmp_path, monkeypatch, range(2))


@pytest.mark.long
def test_a_conversion_killed_often(base, tmp_path, monkeypatch):
    converts(base, tmp_path, monkeypatch, range(2, 11))


def lasting(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)


def test_a_child_ends_with_the_process_that_started_it(tmp_path):
    """Else it would go on writing into a folder that the next process makes anew."""
    file = tmp_path / "pid"

    def kill() -> None:
        while not file.is_file() or not file.read_text():
            time.sleep(0.01)
        die()

    def work() -> None:
        threading.Thread(target=kill, daemon=True).start()
        subprocess_call(lasting, str(file))

    assert forked(work) == -signal.SIGKILL
    child, until = int(file.read_text()), time.monotonic() + 10
    while time.monotonic() < until and Path(f"/proc/{child}/exe").exists():  # gone, or waiting to be collected
        time.sleep(0.02)
    assert not Path(f"/proc/{child}/exe").exists()


def test_an_export_marks_itself_last(ran, tmp_path):
    """What has the mark is whole: the mark names every file."""
    import json

    for to in FORMS:
        out = export(Recipe.load(ran), to, tmp_path / to)
        assert {*json.loads((out / MARK).read_text())["files"], MARK} == set(content(out))
