"""Disks that are full, fail or cannot be written, for each verb that writes: a sentence, and nothing half-written."""

from __future__ import annotations

import errno
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers_faults import content, failing
from helpers_gguf import make_folder
from helpers_run import forked, left, make_world, run, same, tree
from trimtab.artifacts import checkpoint_files
from trimtab.artifacts.adapter import read_meta
from trimtab.artifacts.adapter_weights import read_weights
from trimtab.artifacts.run_folder import checkpoints
from trimtab.data import audit
from trimtab.errors import TrimtabError
from trimtab.inference.export import export
from trimtab.planning import search
from trimtab.recipe import Recipe
from trimtab.report.report import report

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = {"max_steps": 4, "max_length": 128, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
PATCH = {"paca": {"r": 4, "reselect_every": 2}}
CODES = {"full": errno.ENOSPC, "broken": errno.EIO}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    made = make_world(tmp_path_factory.mktemp("world"))
    make_folder(made / "llama", "llama")  # one that can be written as GGUF
    return made


@pytest.fixture(scope="module")
def ran(world) -> Path:
    run(tree(world, world / "ran", PATCH, **STEPS))
    return world / "ran"


def says(error: TrimtabError) -> None:
    assert error.exit_code == 2 and 20 < len(str(error)) < 2000 and error.do, error


# --- train -----------------------------------------------------------------------------------------------------------


def train_on(disk_code: int, nth: int, world: Path, output: Path, whole: dict[str, Any]) -> bool:
    """Train on a disk that fails from its `nth` change on, look at what is left, and finish; -> whether it failed."""
    keys = tree(world, output, PATCH, **STEPS)
    with failing(output, nth, disk_code) as disk:
        try:
            run(keys)
        except TrimtabError as error:
            says(error)
        else:
            assert not disk.failed or (output / "run.json").is_file()
    for found in checkpoints(output):
        checkpoint_files.check_files(found)
    if (output / "adapter").exists():
        read_meta(output / "adapter")
        read_weights(output / "adapter")
    if output.exists():
        assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
    if not (output / "run.json").exists():
        run(keys, **({"resume": True} if checkpoints(output) else {"overwrite": True}))
    now = left(output)
    for what in whole.keys() - {"metrics"}:  # lines of metrics.jsonl that the disk did not take are lost
        same({what: now[what]}, {what: whole[what]})
    return disk.failed


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("nth", [1, 4, 9, 17, 26, 35])
def test_training_on_a_disk_that_fails(nth, code, world, ran, tmp_path):
    assert train_on(CODES[code], nth, world, tmp_path / "run", left(ran))


@pytest.mark.long
@pytest.mark.parametrize("code", CODES)
def test_training_on_a_disk_that_fails_at_every_write(code, world, ran, tmp_path):
    whole, nth = left(ran), 1
    while train_on(CODES[code], nth, world, tmp_path / f"run-{nth}", whole):
        nth += 1
    assert nth > 30


# --- the other verbs -------------------------------------------------------------------------------------------------


def recipe_of(folder: Path) -> Recipe:
    return Recipe.load(folder / "run", ["data.test=" + str(folder / "world" / "facts.jsonl")])


def exporting(to: str) -> Callable[[Path], Any]:
    return lambda folder: export(recipe_of(folder), to, folder / "out" / to, overwrite=True)


def search_and_write(folder: Path) -> None:
    made = search.Candidate("paca", 2, False, "auto", None, recipe_of(folder))
    search.write(search.Found([made], []), folder / "best.yaml", overwrite=True)


def cleaned(folder: Path) -> None:
    name = str(folder / "rows.jsonl")
    audit.write_clean(audit.audit([name]), folder / "clean", overwrite=True)


VERBS: dict[str, Callable[[Path], Any]] = {
    "report": lambda folder: report([folder / "run"]),
    "eval": lambda folder: recipe_of(folder).evaluate(),
    "audit": cleaned,
    "plan": search_and_write,
    **{to: exporting(to) for to in ("peft", "merged", "gguf", "gguf-lora")},
}


@pytest.fixture
def place(ran, world, tmp_path, monkeypatch) -> Path:
    """A folder with a copy of the run, and rows."""
    monkeypatch.setattr(search.Found, "require_fit", lambda found: found.candidates[0])
    shutil.copytree(ran, tmp_path / "run")
    (tmp_path / "world").symlink_to(world)
    shutil.copy(world / "facts.jsonl", tmp_path / "rows.jsonl")
    return tmp_path


def attempts(verb: str, place: Path, code: int, numbers: Any) -> int:
    """The verb on a disk that fails, for each of `numbers` until one is not reached; -> how often it failed."""
    failures = 0
    VERBS[verb](place)  # what is there already must stay
    before = content(place)
    for nth in numbers:
        with failing(place, nth, code) as disk:
            try:
                VERBS[verb](place)
            except TrimtabError as error:
                says(error)
                assert disk.failed
        failures += disk.failed
        if disk.failed and verb != "eval":
            assert content(place) == before, nth
        elif not disk.failed:
            break
    return failures


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_on_a_disk_that_fails(verb, place):
    assert attempts(verb, place, errno.ENOSPC, [1, 2, 3, 4, 7]) >= 1
    assert attempts(verb, place, errno.EIO, [2]) >= 0


@pytest.mark.long
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_on_a_disk_that_fails_at_every_write(verb, code, place):
    assert attempts(verb, place, CODES[code], range(1, 1000)) >= 1


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_cannot_be_written(verb, place):
    """Of a run that cannot be written, `eval` prints its result all the same."""
    before = content(place)
    with failing(place, 1, errno.EROFS):
        if verb == "eval":
            assert VERBS[verb](place)["metrics"]
        else:
            with pytest.raises(TrimtabError, match="Read-only") as error:
                VERBS[verb](place)
            says(error.value)
    assert content(place) == before


def test_training_into_a_folder_that_cannot_be_written(world, tmp_path):
    with failing(tmp_path, 1, errno.EROFS), pytest.raises(TrimtabError, match="Read-only") as error:
        run(tree(world, tmp_path / "run", PATCH, **STEPS))
    says(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("to", ["peft", "merged", "gguf", "gguf-lora"])
@pytest.mark.parametrize("limit", [0, 100, 1500, 9000])
def test_export_of_files_that_cannot_grow(limit, to, place):
    """The kernel's own refusal, which each library reports in its own way."""
    before = content(place)

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        exporting(to)(place)

    assert forked(child) == 2
    assert content(place) == before
