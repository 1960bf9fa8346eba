"""The private names of other libraries that trimtab imports, calls or sets, under names of its own.

tests/test_foreign.py checks them against the installed libraries, with the methods of the trainers that trimtab
overrides and the private attributes that it reads: an upgrade that changes one of them fails there, by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.nn.modules.conv import _ConvNd as AnyConvolution  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_iter as tree_iter

softmax_backward = torch._softmax_backward_data  # (gradient, softmax, dim, dtype) -> gradient of softmax's input
fused_adam, fused_adamw = torch._fused_adam_, torch._fused_adamw_  # one step on lists of tensors, in place
IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"  # attribute of a model: names that DDP does not broadcast
foreach_copy = torch._foreach_copy_  # (to, from): lists of tensors


def recomputing() -> bool:
    """Whether autograd is running a backward pass: a forward pass within one is a checkpointed layer's second."""
    return torch._C._current_graph_task_id() != -1


def admit_quantised(model: Any, admit: bool = True) -> None:
    """Let a library's trainer take a quantised model: it asks whether an adapter of peft is on it. False undoes that.

    Ours is on it, or the trainer only evaluates.
    """
    if admit and getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True
    elif not admit:
        vars(model).pop("_hf_peft_config_loaded", None)
