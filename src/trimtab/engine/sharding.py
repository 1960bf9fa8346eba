"""`place: {shard: true}`: each process of torchrun keeps its share of every weight (FSDP2, torch's `fully_shard`).

The model is loaded, patched and checked whole; on a CPU its weights are mapped from the file then, and are no copies.
Training begins by splitting each parameter by its first dimension, block by block. A block's weights are gathered for
its forward and backward pass and dropped after each; gradients are averaged over the processes as DDP does, and
optimizer states belong to the share of a weight.

transformers' own `DistributedConfig` would split the weights while they are loaded. It is not used: patches choose and
factorise whole weights, and its trainer refuses to resume (transformers 5.23).

A checkpoint has whole tensors, written by the first process, so that any number of processes resumes from it, and
also one without sharding.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..contracts import Stepper
from ..errors import BadInput
from ..model import anatomy
from ..model.load import config_folder
from ..recipe import Recipe

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def require_shardable(recipe: Recipe, args: Any) -> None:
    """BadInput for a recipe whose model cannot be split over processes; needs no model."""
    asked = "place: {shard: true}"
    if args.world_size == 1:
        raise BadInput(asked, "one process trains", "Start several with torchrun, or remove shard")

    def refuse(what: str, have: str, do: str = "Remove shard: each process then keeps a whole copy (DDP)") -> None:
        raise BadInput(f"{asked} with {what}", have, do)

    for patch in recipe.load_patches():
        if not patch.shards:
            name = type(patch).__name__
            refuse(name, f"it reads or writes whole weights while it trains; {name} is not split with these fields")
    stepper = recipe.load_stepper()
    if type(stepper).optimizer is not Stepper.optimizer or not stepper.uses_gradients:
        refuse(type(stepper).__name__, "it steps whole parameters")
    if str(getattr(args.optim, "value", args.optim)) not in OPTIMIZERS:
        refuse(f"training: optim: {recipe.training['optim']}", "it has not been tested", "Set optim: adamw_torch")
    if recipe.data.rewards:
        refuse("rewards", "sampling would gather every weight for each token")
    if recipe.stages or recipe.anchor:
        refuse("stages", "a stage starts from whole weights")
    if recipe.engine.compile:
        refuse("engine: {compile: true}", "compiled blocks are not gathered", "Remove one of the two")
    if args.deepspeed:
        refuse("deepspeed", "both would split the weights", "Remove one of the two")
    if recipe.model.precision in ("nf4", "int8") or _packed(recipe):
        refuse("a quantised base", "packed weights are not split by rows", "Load it in bf16, or remove shard")


def _packed(recipe: Recipe) -> bool:
    config = config_folder(recipe.model) / "config.json"
    return "quantization_config" in json.loads(config.read_text(encoding="utf-8"))


class Sharded:
    """A model whose parameters are split over all processes. Every method is a collective: all processes call it."""

    def __init__(self, model: nn.Module, device: torch.device, offload: bool, main: bool):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        self.model, self.main, self.device = model, main, device
        self.places = [(m, key, p) for m in model.modules() for key, p in m.named_parameters(recurse=False)]
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
        for block in anatomy.blocks(model)[1]:
            fully_shard(block, mesh=mesh, offload_policy=policy)
        fully_shard(model, mesh=mesh, offload_policy=policy)
        self.shards = [module._parameters[key] for module, key, _ in self.places]
        self.trained = {id(whole): (whole, shard) for (*_, whole), shard in zip(self.places, self.shards, strict=True)
                        if whole.requires_grad}  # fmt: skip

        for *_, whole in self.places:
            if whole.requires_grad:
                whole.data = whole.data.new_empty(0)
            elif device.type != "cpu":
                whole.data = whole.data.cpu()

    def _put(self, parameters: list[nn.Parameter]) -> None:
        for (module, key, _), parameter in zip(self.places, parameters, strict=True):
            module._parameters[key] = parameter

    @contextlib.contextmanager
    def whole(self, write: bool = False) -> Iterator[None]:
        """Within it, the model has its own parameters, the trained ones with their values. `write`: what changes in
        them is split again at the end. On processes after the first, values that are only read are left out."""
        self._reshard()
        for whole, shard in self.trained.values():
            value = _whole(shard)
            whole.data = value if self.main or write else value.new_empty(0)
        self._put([parameter for *_, parameter in self.places])
        try:
            yield
            if write:
                for whole, shard in self.trained.values():
                    shard.detach().to_local().copy_(_split(whole.data, shard).to_local())
        finally:
            self._put(self.shards)
            for whole, _ in self.trained.values():
                whole.data = whole.data.new_empty(0)

    @contextlib.contextmanager
    def whole_states(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within it, the states of `optimizer` are whole tensors in the first process."""
        had = [(state, key, value) for state in optimizer.state.values() for key, value in state.items()
               if hasattr(value, "full_tensor")]  # fmt: skip
        for state, key, value in had:
            found = _whole(value)
            state[key] = found if self.main else None
        try:
            yield
        finally:
            for state, key, value in had:
                state[key] = value

    def split_states(self, optimizer: torch.optim.Optimizer) -> None:
        """After whole states were loaded into `optimizer`: keep this process's share of each."""
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and not hasattr(value, "full_tensor") and value.shape == parameter.shape:
                    if value.dim():
                        state[key] = _split(value, parameter)

    def _reshard(self) -> None:
        for module in self.model.modules():
            if reshard := getattr(module, "reshard", None):
                reshard()

    def end(self, complete: bool) -> None:
        """Give the model its own parameters back, with the trained values if `complete`; it is not trained again."""
        self._reshard()
        for whole, shard in self.trained.values():
            if complete:
                whole.data = _whole(shard)
        for *_, whole in self.places:
            whole.data = whole.data.to(self.device)
        self._put([parameter for *_, parameter in self.places])


@contextlib.contextmanager
def sharded(trainer: Any, model: nn.Module, recipe: Recipe, device: torch.device, main: bool) -> Iterator[None]:
    """Within it, `model` is split over the processes if the recipe asks for it, and `trainer` knows."""
    if not recipe.place.shard:
        yield
        return
    trainer.sharded = Sharded(model, device, recipe.place.shard == "offload", main)
    trainer.is_distributed_loading_by_transformers = True  # the library's trainer leaves such a model as it is
    complete = False
    try:
        yield
        complete = not trainer.lost
    finally:
        trainer.sharded.end(complete)
        trainer.sharded = None


def _whole(shard: Any) -> Tensor:
    return shard.detach().full_tensor()


def _split(value: Tensor, like: Any) -> Any:
    """This process's share of `value`, which every process has; nothing is sent."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Shard

    mesh, (placement,) = like.device_mesh, like.placements
    assert isinstance(placement, Shard)
    local = like.detach().to_local()
    size, rank = mesh.size(), mesh.get_local_rank()
    per = -(-value.shape[0] // size)
    mine = value[rank * per : (rank + 1) * per].to(local.device, local.dtype).clone()
    return DTensor.from_local(mine, mesh, [placement], run_check=False, shape=value.shape, stride=value.stride())
