"""A pass through a model that leaves no trace: for probes, before training and between steps."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .row_steps import RowPatch


@contextlib.contextmanager
def undisturbed(model: nn.Module, tables: bool = False) -> Iterator[None]:
    """Within it the model is in eval mode (no dropout). Afterwards its modes, the random state, and the tables' counts
    and slots are as before.

    `tables`: whether tables in the slow tier are read. If not, their patches add nothing, so a backward pass changes no
    row. With them, no backward pass is allowed.
    """
    training = [module for module in model.modules() if module.training]
    patches = [module for module in model.modules() if isinstance(module, RowPatch)]
    stores = [store for patch in patches for store in patch.stores] if tables else []
    before = [dataclasses.asdict(store.traffic) for store in stores]
    lines = [(line, list(line.newest)) for line in {id(x): x for x in map(_line, patches) if x is not None}.values()]
    with torch.random.fork_rng(), contextlib.ExitStack() as stack:
        try:
            if tables:
                stack.enter_context(torch.no_grad())
            else:
                for patch in patches:
                    patch.forward = _second  # type: ignore[method-assign]
            model.eval()
            yield
        finally:
            for patch in () if tables else patches:
                del patch.forward
            for module in training:
                module.training = True
            for store, counts in zip(stores, before, strict=True):
                if not store.planned:
                    store.flush()
                vars(store.traffic).update(counts)
            for line, newest in lines:
                line.newest = newest


def _second(h: Any, y: Any) -> Any:
    """What a patch with tables computes where its rows add nothing to y."""
    return y


def _line(patch: RowPatch) -> Any:
    return getattr(patch, "line", None)
