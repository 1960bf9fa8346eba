"""Bad input for MEFT, through the verbs: what is said, with which code, and that nothing of it is left behind."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from helpers_load import tiny_llama
from helpers_run import make_world, tree
from trimtab.errors import BadInput, DoesNotFit, Interrupted
from trimtab.memory.meter import process_memory
from trimtab.methods.meft import Meft
from trimtab.planning.fit import require_fit
from trimtab.planning.plan import plan
from trimtab.recipe import Recipe
from trimtab.tiered import mapped_file
from trimtab.training.progress import StopOnInterrupt

pytestmark = pytest.mark.filterwarnings("ignore")
MEFT = {"r": 64, "k": 16}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), torch.bfloat16)


@pytest.fixture
def recipe(world, tmp_path):
    def make(fields=None, place=None, budget=None, **training):
        keys = tree(world, tmp_path / "deep" / "run", {"meft": {**MEFT, **(fields or {})}}, **training)
        return Recipe(**keys, place={"slow": "disk", **(place or {})}, budget=budget)

    return make


@pytest.fixture
def no_tables(monkeypatch):
    monkeypatch.setattr(Meft, "apply", _only_planned(Meft.apply))


def _only_planned(apply):
    def checked(patch, model, place):
        assert all(p.is_meta for p in model.parameters()), "a table was made"
        return apply(patch, model, place)

    return checked


# --- what is not taken as it is written is said ----------------------------------------------------------------------

NOTES = [
    ({"r": 100, "experts": 7, "probes": 4}, "r 100 is rounded up to 105: 7 experts of 15 pairs"),
    ({"experts": 4, "k": 64}, "probes 8: there are 4 experts, and each token probes all of them"),
    ({"experts": 32, "k": 17}, "k 17: a token has 16 candidates (8 x 2 pairs), and all count"),
]


@pytest.mark.parametrize("fields,said", NOTES, ids=str)
def test_a_plan_and_a_run_say_what_is_taken_otherwise(fields, said, recipe):
    heard = []
    made = recipe(fields, max_steps=1)
    assert [note for note in plan(made).notes if note.startswith("meft: ")] == [f"meft: {said}"]
    made.train(say=heard.append)
    assert f"meft: {said}" in heard
    assert not any(note.startswith("meft") for note in plan(recipe()).notes)


def test_a_folder_in_ram_is_said(recipe, tmp_path, monkeypatch):
    heard = []
    assert not any("RAM" in note for note in plan(recipe()).notes)
    monkeypatch.setattr(mapped_file, "RAM", (_file_system(tmp_path),))
    made = recipe(place={"folder": str(tmp_path)}, max_steps=1)
    made.train(say=heard.append)
    for said in (heard, plan(made).notes):
        assert any(f"{tmp_path} is in RAM" in line for line in said)
    for place in ({"slow": "ram"}, {"slow": "ram", "folder": str(tmp_path)}):
        assert not any("is in RAM" in note for note in plan(recipe(place=place)).notes)


def _file_system(folder) -> str:
    """The type of the file system of `folder`, by the longest mount point above it."""
    lines = [line.partition(" - ") for line in open("/proc/self/mountinfo")]
    points = [(first.split()[4], last.split()[0]) for first, _, last in lines]
    above = [(len(point), kind) for point, kind in points if str(folder).startswith(point)]
    return max(above)[1]


# --- places that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind,why", [("missing", "no such folder"), ("a file", "not a folder"), ("locked", "be written")]
)
def test_a_folder_that_cannot_hold_tables(kind, why, recipe, tmp_path, monkeypatch):
    folder = tmp_path / "tables"
    if kind == "a file":
        folder.touch()
    elif kind == "locked":
        folder.mkdir()
        monkeypatch.setattr(os, "access", lambda *args: False)  # who runs the tests may be allowed everything
        monkeypatch.setattr(mapped_file.tempfile, "TemporaryFile", _refusing(errno.EACCES))
    with pytest.raises(BadInput, match=why) as error:
        plan(recipe(place={"folder": str(folder)}))
    assert str(folder) in str(error.value)
    with pytest.raises(BadInput, match="place: folder"):
        recipe(place={"folder": str(folder)}, max_steps=1).train()
    assert not (tmp_path / "deep").exists()


def _refusing(number: int):
    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return call


def test_a_file_system_that_maps_no_files_ends_a_run_before_it_begins(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_file.mmap, "mmap", _refusing(errno.ENODEV))
    with pytest.raises(BadInput, match="its file system does not map files. .*slow: ram"):
        recipe(max_steps=1).train()
    assert not (tmp_path / "deep").exists()


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"fast": "1MiB"}, {"slow": "0.1MiB"}])
def test_a_budget_below_the_least_is_refused_before_tables_are_made(budget, recipe, tmp_path, no_tables):
    few = {"per_device_train_batch_size": 1, "activation_checkpointing": True}  # changes that are left to try
    made = recipe({"r": 64, "probes": 1}, budget=budget, max_steps=1, **few)
    with pytest.raises(DoesNotFit, match=r"(1\.0 MiB|102\.4 KiB) of the .* tier for this run") as error:
        made.train()
    assert error.value.exit_code == 3 and not (tmp_path / "deep").exists()
    assert not plan(made).fits


def test_what_would_fit_names_fields_of_the_patch(recipe):
    wide = recipe({"r": 256, "probes": 8}, per_device_train_batch_size=1, activation_checkpointing=True)
    wide = Recipe(**{**vars(wide), "engine": {"recompute": "ffn"}})  # nothing else is left to save
    need = plan(wide, process=0)
    slow = Recipe(**{**vars(wide), "budget": {"slow": need.slow_bytes * 6 // 10}})
    with pytest.raises(DoesNotFit, match=r"or use patches\.meft\.r=128"):
        require_fit(plan(slow, process=0), slow)
    fast = Recipe(**{**vars(wide), "budget": {"fast": need.fast_peak_bytes - 1}})
    with pytest.raises(DoesNotFit, match=r"It would fit with patches\.meft\.(probes|r)=\d+ "):
        require_fit(plan(fast, process=0), fast)
    cached = recipe({"cache": 1.0})
    cached = Recipe(**{**vars(cached), "budget": {"fast": plan(recipe(), process=0, tokens=48).fast_peak_bytes + 1000}})
    with pytest.raises(DoesNotFit, match=r"It would fit with patches\.meft\.cache=0\.0"):
        require_fit(
            plan(cached, process=0, tokens=48),
            Recipe(**{**vars(cached), "training": {**wide.training, "max_length": 48}}),
        )
    on_disk = Recipe(**{**vars(wide), "patches": [{"meft": {**MEFT, "r": 4096}}]})
    budget = {"fast": plan(on_disk, process=0).fast_peak_bytes}
    in_ram = Recipe(**{**vars(on_disk), "place": {"slow": "ram"}, "budget": budget})
    with pytest.raises(DoesNotFit, match=r"It would fit with place\.slow=disk"):
        require_fit(plan(in_ram, process=0), in_ram)


def test_tables_beyond_ram_are_refused_before_the_kernel_kills(recipe, tmp_path):
    before = process_memory()["anon"]
    with pytest.raises(DoesNotFit, match=r"GiB of RAM for 2 tables .* are free. Set place: slow: disk"):
        recipe({"r": 10**9}, place={"slow": "ram"}, max_steps=1).train()
    assert process_memory()["anon"] - before < 2**28 and not (tmp_path / "deep").exists()
    assert not plan(recipe({"r": 10**9}, place={"slow": "ram"})).fits


def test_a_run_that_its_budget_holds_is_not_kept_from_starting(recipe):
    run = recipe(budget={"fast": "90%", "slow": "1GiB"}, max_steps=1).train()
    assert run["steps"] == 1


# --- a run that goes on, an adapter that is loaded -------------------------------------------------------------------


@pytest.fixture
def stopped(world, tmp_path, monkeypatch):
    """A run on a base of its own, stopped with checkpoint 2 of 4; -> its keys."""
    keys = tree(world, tmp_path / "run", {"meft": MEFT}, max_steps=4, save_strategy="steps", save_steps=2)
    keys["model"] = str(tiny_llama(tmp_path / "llama", dtype=torch.float32))
    end = StopOnInterrupt.on_step_end

    def stop(self, args, state, control, **kwargs):
        self.requested = state.global_step == 2
        return end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(StopOnInterrupt, "on_step_end", stop)
        Recipe.from_dict(keys).train()
    return keys


def test_tables_of_another_base_are_refused(stopped, tmp_path):
    tiny_llama(tmp_path / "llama", seed=1, dtype=torch.float32)
    with pytest.raises(BadInput, match="checkpoint-2.*this model is another one"):
        Recipe.from_dict({**stopped, "resume": True}).train()


def test_tables_of_another_shape_are_refused(stopped, tmp_path):
    wider = {**stopped, "patches": [{"meft": {**MEFT, "r": 128, "experts": 43}}], "resume": True}
    with pytest.raises(BadInput, match="the run was started with"):
        Recipe.from_dict(wider).train()
    (tmp_path / "run" / "recipe.yaml").unlink()  # nothing says how it was begun
    with pytest.raises(BadInput, match=r"they are of a table of 32 rows of 2 x 128, and this one has 43 rows of 3 x"):
        Recipe.from_dict(wider).train()
