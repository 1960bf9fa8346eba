"""Passes through a model that leave no trace, for probes before training and between steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from .row_steps import RowPatch


@contextlib.contextmanager
def undisturbed(model: nn.Module, tables: bool = False) -> Iterator[None]:
    """Within it the model is in eval mode. On exit its modes, the random state, and the counters and slots of its
    tables are restored.

    `tables`: whether tables in the slow tier are read. If not, their patches add nothing, so a backward pass changes no
    rows. If so, gradients are disabled.
    """
    training = [module for module in model.modules() if module.training]
    with torch.random.fork_rng(), contextlib.ExitStack() as stack:
        if tables:
            stack.enter_context(torch.no_grad())
        for patch in (module for module in model.modules() if isinstance(module, RowPatch)):
            for context in [store.uncounted() for store in patch.stores] if tables else [patch.without_rows()]:
                stack.enter_context(context)
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True
