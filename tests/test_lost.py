"""What may never be lost or left running: finished runs, checkpoints, folders of others, and the user's Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import trimtab
from helpers_run import forked, left, make_world, same, tree
from trimtab.artifacts import run_folder
from trimtab.artifacts.checkpoint_files import SUMS, write_sums
from trimtab.artifacts.folder_lock import locked
from trimtab.errors import BadInput, Interrupted
from trimtab.recipe import Recipe
from world import at_step

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def ran(world) -> Path:
    """The folder of a finished run that ended within an epoch."""
    Recipe.from_dict(tree(world, world / "ran", {"paca": {"r": 4}}, **STEPS)).train()
    return world / "ran"


@pytest.fixture
def run(ran, tmp_path) -> Path:
    """A copy of it, whose recipe names the copy."""
    copy = Path(shutil.copytree(ran, tmp_path / "run"))
    keys = Recipe.load(copy).to_dict()
    (copy / "recipe.yaml").write_text(Recipe.from_dict({**keys, "output": str(copy)}).to_yaml())
    return copy


def again(run: Path, **changed) -> dict:
    keys = Recipe.load(run).to_dict()
    training = {**keys["training"], **changed}
    return Recipe.from_dict({**keys, "training": training, "output": str(run), "resume": True}).train()


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- a finished run --------------------------------------------------------------------------------------------------


def test_resuming_a_finished_run_trains_and_writes_nothing(run):
    before = content(run)
    assert again(run) == json.loads(before["run.json"])
    assert again(run, max_steps=3)["steps"] == 4
    assert content(run) == before
    assert again(run, max_steps=6)["steps"] == 6, "a larger max_steps goes on"


@pytest.mark.parametrize("save", ["epoch", "no"])
def test_a_finished_run_of_whole_epochs(save, world, tmp_path):
    keys = tree(world, tmp_path / "run", {"paca": {"r": 4}}, num_train_epochs=1, save_strategy=save)
    Recipe.from_dict(keys).train()
    before = content(tmp_path / "run")
    resumed = Recipe.from_dict({**keys, "resume": True, "budget": {"fast": "90%"}} if save == "epoch" else
                               {**keys, "resume": True})  # fmt: skip
    assert resumed.train()["steps"] == 8 and content(tmp_path / "run") == before


def test_a_run_killed_before_it_wrote_its_adapter_writes_it_without_a_step(run, ran):
    shutil.rmtree(run / "adapter")
    (run / "run.json").unlink()
    assert again(run)["steps"] == 4
    assert {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    same(left(ran), left(run))
    told = [json.loads((folder / "run.json").read_text()) for folder in (ran, run)]
    for key in ("steps", "tokens", "final_loss"):
        assert told[0][key] == told[1][key], key


# --- checkpoints -----------------------------------------------------------------------------------------------------


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def say_step(step: int):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"global_step": step}))


PARTS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trimtab.json")
FILES = {f"{name} {how.__name__}": (name, how) for name in PARTS for how in (Path.unlink, cut_off, one_bit)}
FILES |= {
    "trainer_state.json empty": ("trainer_state.json", lambda path: path.write_text("")),
    "trainer_state.json far": ("trainer_state.json", say_step(10**9)),
    "trainer_state.json negative": ("trainer_state.json", say_step(-5)),
    "files.json missing": (SUMS, Path.unlink),
    "files.json damaged": (SUMS, lambda path: path.write_text('{"crc32": [1]}')),
}


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_checkpoint_is_refused(case, run):
    name, damage = FILES[case]
    damage(run / "checkpoint-4" / name)
    with pytest.raises(BadInput) as refused:
        again(run, max_steps=6)
    assert name in str(refused.value) and "checkpoint-4" in refused.value.asked
    assert refused.value.exit_code == 2 and not (run / "checkpoint-6").exists()


def states(change):
    def damage(path: Path) -> None:
        held = torch.load(path, weights_only=True)
        change(held)
        torch.save(held, path)

    return damage


def moment(value):
    """Put `value` of the first moment in its place."""
    return states(lambda held: held["state"][0].update(exp_avg=value(held["state"][0]["exp_avg"])))


STATES = {  # damage whose checksums agree: the file was written so
    "smaller moment": ("optimizer.pt", moment(lambda m: m.flatten()[:1].clone()), "exp_avg of parameter 0 is 1 of"),
    "turned moment": ("optimizer.pt", moment(lambda m: torch.zeros(*m.shape, 2)), "exp_avg of parameter 0 is"),
    "moment of integers": ("optimizer.pt", moment(lambda m: m.long()), "int64"),
    "moment of NaN": ("optimizer.pt", moment(lambda m: m * float("nan")), "NaN"),
    "state missing": ("optimizer.pt", states(lambda held: held["state"][0].pop("exp_avg_sq")), "lack a part"),
    "a parameter less": ("optimizer.pt", states(lambda h: h["param_groups"][0]["params"].pop()), "other parameters"),
    "rate of NaN": ("optimizer.pt", states(lambda h: h["param_groups"][0].update(lr=float("nan"))), "finite"),
    "no state": ("optimizer.pt", states(lambda held: held.clear()), "no state of an optimizer"),
    "scheduler elsewhere": ("scheduler.pt", states(lambda held: held.update(last_epoch=7)), "step 4"),
    "scheduler of NaN": ("scheduler.pt", states(lambda held: held.update(_last_lr=[float("nan")])), "NaN"),
    "no scheduler": ("scheduler.pt", states(lambda held: held.clear()), "no state of a scheduler"),
    "random numbers": ("rng_state.pth", lambda path: torch.save({"python": 1}, path), "random state"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_does_not_fit_is_refused(case, run):
    name, damage, words = STATES[case]
    damage(run / "checkpoint-4" / name)
    (run / "checkpoint-4" / SUMS).unlink()
    write_sums(run / "checkpoint-4")
    with pytest.raises(BadInput) as refused:
        again(run, max_steps=6)
    assert words in str(refused.value) and not (run / "checkpoint-6").exists()


# --- one process a folder --------------------------------------------------------------------------------------------


def held_elsewhere(file: Path) -> subprocess.Popen:
    """A process that holds the lock of `file` until its standard input is closed."""
    code = "import sys; from pathlib import Path; from trimtab.artifacts.folder_lock import locked\n"
    code += f"with locked(Path({str(file)!r}), 'work'):\n    print('held', flush=True)\n    sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": str(Path(trimtab.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, env=environment)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_folder_at_work_is_refused(call, run):
    before = content(run)
    with held_elsewhere(run / ".lock") as other:
        for verb in (["train", run, "overwrite=true"], ["export", run], ["report", run]):
            code, out, err = call(*verb)
            assert code == 2 and f"process {other.pid} is at work" in err and out == "", err
        other.stdin.close()
    assert content(run) == before
    assert call("report", run)[0] == 0 and not (run / ".lock").exists()


def test_a_lock_ends_with_its_process(run):
    other = held_elsewhere(run / ".lock")
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    assert (run / ".lock").exists()
    with locked(run / ".lock", "train"):
        with pytest.raises(BadInput, match="this process"), locked(run / ".lock", "train"):
            pass
        assert forked(lambda: locked(run / ".lock", "train").__enter__()) == 2, "still held"
    assert not (run / ".lock").exists()


def test_a_lock_leaves_no_folder(tmp_path):
    with locked(tmp_path / "new" / "one" / ".lock", "train"):
        assert (tmp_path / "new" / "one").is_dir()
    assert not (tmp_path / "new").exists()


# --- export ----------------------------------------------------------------------------------------------------------


def test_export_replaces_only_an_export(call, run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("five years of work")
    for flags in ([], ["--overwrite"]):
        code, _, err = call("export", run, "--to", "peft", "--out", mine, *flags)
        assert code == 2 and content(mine) == {"thesis.txt": b"five years of work"}, err
    assert "trimtab did not export it" in err
    made = run / "peft"
    assert call("export", run, "--to", "peft")[0] == 0
    assert call("export", run, "--to", "peft")[0] == 2
    assert call("export", run, "--to", "merged", "--out", made, "--overwrite")[0] == 0
    assert (made / "config.json").is_file() and not (made / "adapter_config.json").exists()
    assert not list(run.glob(".*")), "neither the old one nor a part is left"
    (made / "thesis.txt").write_text("five years of work")
    code, _, err = call("export", run, "--out", made, "--overwrite")
    assert code == 2 and "thesis.txt" in err and (made / "thesis.txt").is_file()


def test_an_export_that_fails_leaves_the_old_one(call, run, monkeypatch):
    assert call("export", run, "--to", "peft")[0] == 0
    before = content(run / "peft")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trimtab.inference.export.json.dumps", full)
    code, _, err = call("export", run, "--to", "peft", "--overwrite")
    assert code == 2 and "No space left" in err
    assert content(run / "peft") == before and not list(run.glob(".*"))


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def recipe_of(world: Path, output: Path) -> Path:
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree(world, output, {"paca": {"r": 4}}, max_steps=4)))
    return path


def interrupt(*_, **__):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "where", ["trimtab.artifacts.run_folder.open_run", "trimtab.model.load.load_model", "trimtab.planning.plan.plan"]
)
def test_an_interrupt_before_training_exits_with_130(where, call, world, tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab.training.train.open_run" if where.endswith("open_run") else where, interrupt)
    code, out, err = call("train", recipe_of(world, tmp_path / "run"), "-q")
    assert (code, out, err.splitlines()[-1]) == (130, "", "trimtab: stopped")
    assert not (tmp_path / "run").exists() and "Traceback" not in err


def test_a_second_interrupt_in_training_exits_with_130(call, world, tmp_path):
    recipe = recipe_of(world, tmp_path / "run")
    with at_step(2, lambda: (interrupt(), interrupt())):
        code, out, err = call("train", recipe, "-q")
    assert (code, out, err.splitlines()[-1]) == (130, "", "trimtab: stopped")
    assert not (tmp_path / "run" / ".lock").exists()
    with at_step(2, interrupt):
        code, out, err = call("train", recipe, "-q", "overwrite=true")
    assert code == 130 and "checkpoint-2 is complete" in err
    assert Interrupted.exit_code == 130 and run_folder.checkpoints(tmp_path / "run")


def test_an_interrupt_that_a_library_swallows_is_asked_for_again():
    code = """
import signal, sys
from trimtab.process.interrupt import stopped_by_interrupt
with stopped_by_interrupt("stopped"):
    for _ in range(2):
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            pass
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(trimtab.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_version_by_option(call):
    assert call("--version") == (0, trimtab.__version__ + "\n", "")
