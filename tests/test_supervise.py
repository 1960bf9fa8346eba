"""A run under a hard limit that a library crashes ends with a message and code 4, as every run over its budget does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trimtab
from helpers_run import make_world, tree


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hard")
    path = folder / "r.yaml"
    keys = tree(make_world(folder), folder / "run", {"paca": {"r": 4}}, max_steps=2)
    path.write_text(yaml.safe_dump({**keys, "budget": {"fast": "8GiB"}}))
    return path


def started(recipe: Path, how: str) -> subprocess.Popen:
    """`trimtab train RECIPE --hard` in a fresh process, whose training is `how` instead."""
    code = f"""
import os, signal, sys, types
import trimtab
def training(*args, **kwargs):
    {how}
made = types.ModuleType("trimtab.training.train")
made.train = training
sys.modules["trimtab.training.train"] = made
from trimtab import cli
sys.argv = ["trimtab", "train", {str(recipe)!r}, "--hard", "-q"]
cli.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(trimtab.__file__).parents[1]), "TRIMTAB_ALLOCATOR": "none"}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_crash_is_told_and_ends_with_4(recipe, name):
    process = started(recipe, f"os.kill(os.getpid(), signal.{name})")
    _, err = process.communicate()
    assert process.returncode == 4 and "Traceback" not in err
    assert f"8GiB of the fast tier (--hard): a library was refused memory and ended the process ({name})" in err
    assert "no checkpoint had been written yet. Begin again with overwrite=true" in err


@pytest.mark.parametrize("code", [0, 3, 130])
def test_other_ends_stay_as_they_are(recipe, code):
    process = started(recipe, f"sys.exit({code})")
    process.communicate()
    assert process.returncode == code


def test_sigterm_reaches_the_run(recipe):
    how = "signal.signal(signal.SIGTERM, lambda *_: os._exit(7)); print('ready', file=sys.stderr, flush=True)"
    how += "\n    while True: signal.sigtimedwait([], 0.1)"  # pause() would miss a signal that comes just before it
    process = started(recipe, how)
    assert process.stderr is not None
    while "ready" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 7


def test_a_real_run_is_not_changed_by_it(recipe):
    environment = {**os.environ, "PYTHONPATH": str(Path(trimtab.__file__).parents[1]), "TRIMTAB_ALLOCATOR": "none"}
    done = subprocess.run(
        [sys.executable, "-m", "trimtab.cli", "train", str(recipe), "--hard", "-q"], capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (recipe.parent / "run" / "adapter").is_dir()
