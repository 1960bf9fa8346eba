"""Ray Train runs a recipe in several workers, on one machine or on a cluster of Ray's.

    from trimtab.integrations.ray import train
    train("recipe.yaml", workers=2)

Each worker does what a process of torchrun does: data parallelism (DDP), or `place: {shard: true}`. If a worker dies,
Ray starts all of them again, and they resume from the newest checkpoint in the run's folder, which every machine must
see under the same path. Ray's own checkpoints are not used. Ray would send usage statistics; they are switched off.

Needs the extra: `pip install trimtab[ray]`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..artifacts.run_folder import checkpoints
from ..errors import BadInput
from ..recipe import Recipe
from ..validation import read_json

STATISTICS = "RAY_USAGE_STATS_ENABLED"


def train(
    recipe: Recipe | str | Path,
    workers: int = 2,
    overrides: Iterable[str] = (),
    *,
    max_failures: int = 1,
    gpus: bool = False,
    on_start: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Runs a recipe in `workers` workers; -> the content of run.json.

    `max_failures`: how often the workers are started again after one has died. `gpus`: one for each worker, else it
    computes on CPUs. `on_start`: called in each worker before it trains, to set up logging for example. Connects to
    RAY_ADDRESS if it is set or Ray has been initialised; otherwise it starts Ray on this machine's loopback address.

    Raises BadInput for a mistake in the recipe, before any worker starts, and without Ray.
    """
    ray = _ray()
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, overrides)
    if workers < 1:
        raise BadInput(f"workers: {workers}", "at least one trains", "Give 1 or more")
    if max_failures and recipe.training.get("save_strategy", "no") in ("no", False):
        raise BadInput(
            f"max_failures: {max_failures} with save_strategy: no", "workers that start again have no checkpoint",
            "Set training: {save_strategy: steps, save_steps: 100}, or max_failures=0",
        )  # fmt: skip
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    began = not ray.is_initialized()
    if began and not os.environ.get("RAY_ADDRESS"):
        ray.init(_node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=max(workers + 1, os.cpu_count() or 1))
    output = Path(recipe.output).absolute()
    config = {"keys": recipe.to_dict(), "folder": os.getcwd(), "before": _mark(output), "on_start": on_start}
    try:
        TorchTrainer(
            _work, train_loop_config=config,
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
            run_config=RunConfig(name=output.name, storage_path=str(output.parent / "ray"),
                                 failure_config=FailureConfig(max_failures=max_failures)),
        ).fit()  # fmt: skip
    finally:
        if began:
            ray.shutdown()
    return read_json(output / "run.json")


def _ray() -> Any:
    os.environ[STATISTICS] = "0"
    try:
        import ray
    except ImportError:
        raise BadInput("trimtab.integrations.ray", "Ray is not installed", "pip install trimtab[ray]") from None
    return ray


def _mark(output: Path) -> int | None:
    """Changes when a run begins in the folder."""
    recipe = output / "recipe.yaml"
    return recipe.stat().st_mtime_ns if recipe.exists() else None


def _work(config: dict[str, Any]) -> None:
    """What each worker does. Its process group exists already."""
    import torch

    os.chdir(config["folder"])
    keys = config["keys"]
    output = Path(keys["output"]).absolute()
    if _mark(output) != config["before"]:  # workers before these have begun the run
        left = bool(checkpoints(output))
        keys = {**keys, "resume": left, "overwrite": not left}
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first worker writes into the folder only after all have looked
    if config["on_start"] is not None:
        config["on_start"]()
    Recipe.from_dict(keys).train()
