"""`python helpers_torchrun.py JOBS FOLDER` under torchrun trains each recipe of JOBS in turn; `torchrun` starts it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import trimtab
from helpers_run import make_world, rows, write_rows
from trimtab.errors import TrimtabError

ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3}


def torchrun(folder: Path, jobs: list[dict[str, Any]], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Trains `jobs` in two processes. A job is a recipe's keys; "kill": (rank, step) of a process that is killed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "--max-restarts=0", __file__, str(folder / "jobs.json"), str(folder)]  # fmt: skip
    with open(folder / "stderr.txt", "w+") as err:
        process = subprocess.Popen(command, env=environment(), stdout=err, stderr=err)
        try:
            process.wait(timeout)
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers
                process.wait(60)
        err.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, "", err.read())


def even_world(folder: Path) -> Path:
    """`folder` with `make_world` in "world", and rows that two processes share evenly."""
    (folder / "world").mkdir()
    make_world(folder / "world")
    write_rows(folder / "even.jsonl", rows(16))
    return folder


def runs_of_two(recipe: Callable[..., dict[str, Any]], folder: Path, name: str) -> list[dict[str, Any]]:
    """Jobs for two processes: a run ("two"), one with Adam ("adam"), and the same stopped and resumed ("again")."""
    half = recipe(folder, name, "again", 2, **ADAM)
    return [
        recipe(folder, name, "two", 2), recipe(folder, name, "adam", 2, **ADAM),
        {**half, "training": {**half["training"], "max_steps": 2}}, {**half, "resume": True},
    ]  # fmt: skip


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(Path(trimtab.__file__).parents[1]), str(Path(__file__).parent)])
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, "PYTHONPATH": paths + os.pathsep + os.environ.get("PYTHONPATH", ""), **threads}


@contextlib.contextmanager
def killed(rank: int, step: int, file: str | Path) -> Any:
    """Within it, the process `rank` is killed at the end of `step`, and writes when into `file`."""
    from trimtab.training.progress import StopOnInterrupt

    had = StopOnInterrupt.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step and args.process_index == rank:
            Path(file).write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        return had(self, args, state, control, **kwargs)

    StopOnInterrupt.on_step_end = on_step_end  # type: ignore[method-assign]
    try:
        yield
    finally:
        StopOnInterrupt.on_step_end = had  # type: ignore[method-assign]


def train(keys: dict[str, Any]) -> str:
    """-> "" or, of a run that is refused, the message."""
    if dist.is_initialized():
        dist.barrier()  # else one process could write a run's folder before the other has looked at it
    kill = keys.pop("kill", None)
    try:
        with killed(*kill, Path(sys.argv[2]) / "killed-at") if kill else contextlib.nullcontext():
            trimtab.Recipe.from_dict(keys).train()
    except TrimtabError as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    said = [train(keys) for keys in json.loads(Path(sys.argv[1]).read_text())]
    (Path(sys.argv[2]) / f"said-{os.environ['RANK']}.json").write_text(json.dumps(said))
    if dist.is_initialized():
        dist.destroy_process_group()
