"""Optimizers of `training.optim` that are not PyTorch's own: what they need, and how transformers makes them."""

from __future__ import annotations

import importlib.util
from typing import Any

from transformers import Trainer

from ..errors import BadInput

# a part of the optimizer's name, the module that it needs, and what installs it
LIBRARIES = (
    ("galore", "galore_torch", "pip install galore-torch"), ("apollo", "apollo_torch", "pip install apollo-torch"),
    ("lomo", "lomo_optim", "pip install lomo-optim"), ("grokadamw", "grokadamw", "pip install grokadamw"),
    ("schedule_free", "schedulefree", "pip install schedulefree"),
    ("stable_adamw", "optimi", "pip install torch-optimi"), ("anyprecision", "torchdistx", "pip install torchdistx"),
    ("adamw_torch_4bit", "torchao", "pip install torchao"), ("adamw_torch_8bit", "torchao", "pip install torchao"),
)  # fmt: skip
DEVICES = {"adamw_torch_xla": "XLA", "adamw_torch_npu_fused": "Ascend NPU"}
CUDA_ONLY = {"adalomo": "its step fails on a CPU"}


def name_of(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


def require_library(args: Any, device: Any) -> None:
    """BadInput if `training.optim` needs a library that is not installed, or another device."""
    name = name_of(args)
    asked = f"training: optim: {name}"
    for part, module, install in LIBRARIES:
        if part in name and importlib.util.find_spec(module) is None:
            raise BadInput(asked, f"the library {module} is not installed", f"{install}, or leave optim out")
    if name in DEVICES:
        raise BadInput(asked, f"it is for {DEVICES[name]} devices", "Leave optim out")
    if device.type == "cpu" and name in CUDA_ONLY:
        raise BadInput(f"{asked} on a CPU", CUDA_ONLY[name], "Use a GPU, or another optimizer")


class _Maker(Trainer):
    """Only the part of the library's trainer that creates an optimizer."""

    def __init__(self, model: Any, args: Any):
        self.model, self.args = model, args
        self.optimizer = self.optimizer_cls_and_kwargs = None


def make_optimizer(model: Any, args: Any) -> Any:
    """The optimizer that transformers' Trainer creates for `model` and `args`."""
    return _Maker(model, args).create_optimizer()
