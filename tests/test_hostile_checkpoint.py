"""A checkpoint from a stranger, its checksums made right: pickles in it are refused, and none of their code runs."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from helpers_run import make_world, prompts, run, tree
from trimtab.artifacts.checkpoint_files import write_sums
from trimtab.errors import BadInput

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sign}",)


def plain(payload: Payload) -> bytes:
    return pickle.dumps(payload)


def old_form(payload: Payload) -> bytes:
    made = io.BytesIO()
    torch.save({"state": payload}, made, _use_new_zipfile_serialization=False)
    return made.getvalue()


def zipped(payload: Payload) -> bytes:
    made = io.BytesIO()
    torch.save({"state": {}, "param_groups": payload}, made)
    return made.getvalue()


def scripted(payload: Payload) -> bytes:
    """As TorchScript's archives are laid out, which torch.load opens by another way."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"archive/{name}", pickle.dumps(payload, 2))
        archive.writestr("archive/version", "3\n")
    return made.getvalue()


FORMS = (plain, old_form, zipped, scripted)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def ran(world) -> dict[str, Any]:
    """The recipes of two finished runs, one of which rewards replies."""
    made = {"sft": tree(world, world / "sft", {"paca": {"r": 2}}, **STEPS),
            "grpo": prompts(world, world / "grpo", {"lora": {"r": 2}}, objective="grpo", **STEPS)}  # fmt: skip
    for keys in made.values():
        run(keys)
    return made


def resumed(keys: dict[str, Any], folder: Path, change: Any) -> Path:
    """A copy of the run in `folder`, with `change(checkpoint)` made and the checksums right; -> the copy."""
    copy = Path(shutil.copytree(keys["output"], folder / "run"))
    (copy / "recipe.yaml").unlink()
    change(copy / "checkpoint-2")
    write_sums(copy / "checkpoint-2")
    return copy


@pytest.mark.parametrize(
    "name, form",
    [
        *(("optimizer.pt", form) for form in FORMS),
        ("scheduler.pt", zipped),
        ("rng_state.pth", plain),
        ("rng_state.pth", zipped),
        ("rollouts.pt", zipped),
    ],
)
def test_a_pickle_that_runs_code_is_refused(name, form, ran, tmp_path):
    keys, sign = ran["grpo" if name == "rollouts.pt" else "sft"], tmp_path / "ran"

    def change(checkpoint: Path) -> None:
        assert (checkpoint / name).is_file()
        (checkpoint / name).write_bytes(form(Payload(sign)))

    copy = resumed(keys, tmp_path, change)
    with pytest.raises(BadInput, match="checkpoint-2"):
        run({**keys, "output": str(copy), "training": {**keys["training"], "max_steps": 3}}, resume=True)
    assert not sign.exists() and not (copy / "checkpoint-3").exists()


def test_a_pickle_that_nothing_needs_is_not_opened(ran, tmp_path):
    keys, sign = ran["sft"], tmp_path / "ran"

    def change(checkpoint: Path) -> None:
        for name in ("training_args.bin", "pytorch_model.bin", "adapter_model.bin", "optimizer.bin"):
            (checkpoint / name).write_bytes(plain(Payload(sign)))

    copy = resumed(keys, tmp_path, change)
    made = run({**keys, "output": str(copy), "training": {**keys["training"], "max_steps": 3}}, resume=True)
    assert made["steps"] == 3 and not sign.exists()


def test_the_payload_works(tmp_path):
    """It would write the file if it were loaded without care."""
    for form in (plain, zipped, old_form):
        sign = tmp_path / form.__name__
        file = io.BytesIO(form(Payload(sign)))
        pickle.load(file) if form is plain else torch.load(file, weights_only=False)
        assert sign.exists()


def test_no_module_unpickles():
    """trimtab has torch.load only with weights_only=True, and no other way to a pickle."""
    calls = []
    for path in Path(trimtab.__file__).parent.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert "import pickle" not in line and "allow_pickle=True" not in line, path
            assert "pickle.load" not in line and "joblib" not in line and "cloudpickle" not in line, path
            if "torch.load(" in line:
                calls.append(line)
                assert "weights_only=True" in line, f"{path}: {line}"
    assert calls
