"""A process of several that is killed, and SIGTERM to one or two: a message, no hang, and the run resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trimtab
from helpers_run import metrics, tree
from helpers_torchrun import environment, even_world, torchrun
from trimtab.artifacts.adapter import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINING: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
SCRIPT = Path(__file__).parents[1] / "examples" / "slurm" / "train.sbatch"


def recipe(folder: Path, run: str, shard: bool, **training: Any) -> dict[str, Any]:
    made = tree(folder / "world", folder / run, {"lora": {"r": 4}}, **{**TRAINING, **training})
    made["data"]["train"] = str(folder / "even.jsonl")
    return {**made, "place": {"shard": shard}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return even_world(tmp_path_factory.mktemp("lost"))


@pytest.mark.parametrize("shard", [False, True])
def test_when_one_process_is_killed_the_others_end_and_the_run_resumes(shard: bool, world: Path) -> None:
    lost = recipe(world, f"lost-{shard}", shard)
    killed = world / f"killed-{shard}"
    killed.mkdir()
    began = time.monotonic()
    done = torchrun(killed, [{**lost, "kill": [1, 3]}], timeout=200)
    assert done.returncode == 1
    death = float((killed / "killed-at").read_text())
    assert began < death and time.monotonic() - death < 30, "the other process ends soon after"
    (said,) = json.loads((killed / "said-0.json").read_text())
    assert said.startswith("Stopped: step 4 of 6 in 2 processes: another process has ended"), said
    assert "checkpoint-2 is complete. Start all again with resume=true" in said
    done = torchrun(world, [{**lost, "resume": True}, recipe(world, f"whole-{shard}", shard)])
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_tensors(world / f"{name}-{shard}" / "adapter") for name in ("lost", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in one) and one.keys() == two.keys()
    assert metrics(world / f"lost-{shard}") == metrics(world / f"whole-{shard}")


def signalled(command: list[str], run: Path) -> tuple[int, str]:
    """Starts `command`, sends it SIGTERM once the run has a checkpoint; -> its exit code and standard error."""
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 150
    while not (run / "checkpoint-2").is_dir():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1][-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_with_a_checkpoint(processes: int, world: Path) -> None:
    run = world / f"terminated-{processes}"
    file = world / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(recipe(world, run.name, False, max_steps=2000)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--shutdown-timeout=50"]
    command = [sys.executable, *(torchrun if processes == 2 else []), "-m", "trimtab", "train", str(file), "-q"]
    code, err = signalled(command, run)
    assert "is complete. Continue with resume=true" in err, err[-3000:]
    assert code == (143 if processes == 1 else 1)
    steps = max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))
    state = json.loads((run / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert state["global_step"] == steps and not (run / "run.json").exists()
    result = trimtab.Recipe.load(file, ["resume=true", f"training.max_steps={steps + 1}"]).train()
    assert result["steps"] == steps + 1


def test_the_slurm_script_forwards_sigterm_and_requeues(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands and torchrun: what is called, and in which order."""
    log = tmp_path / "log"
    stands = {
        "scontrol": f'echo "scontrol $*" >> {log}; echo host1',
        "srun": f"echo \"srun $*\" >> {log}; trap 'echo TERM >> {log}; exit 143' TERM; touch {tmp_path}/up; "
        "while true; do sleep 0.05; done",
    }
    for name, text in stands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "host[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    variables = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", str(SCRIPT), "r.yaml", "training.max_steps=9"], env=variables)
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    lines = log.read_text().splitlines()
    assert lines[0].startswith("scontrol show hostnames host[1-2]") and lines[-2:] == ["TERM", "scontrol requeue 7"]
    assert lines[1].endswith("trimtab train r.yaml resume=true training.max_steps=9") and "host1:29500" in lines[1]
