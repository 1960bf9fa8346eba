"""Replaces and hooks modules of a model, and undoes it exactly.

A patch changes a model only through one `Swaps`, which records replaced modules, hooks, `requires_grad` flags and
attributes, and undoes them in reverse order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import BadInput

PATCH_MARK = "trimtab_patch"  # set on a library's module (a layer of peft) that a patch put into a model
EXCLUSIVE = "trimtab_exclusive"  # set on a model whose patch composes with no other: the reason


class ModulePatch(nn.Module):
    """Base class of modules that patches put into a model: their parameters are not frozen with the base."""


def is_patch(module: nn.Module) -> bool:
    return isinstance(module, ModulePatch) or getattr(module, PATCH_MARK, False)


class Swaps:
    """The changes made to one model, and how to undo them."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._undo: list[Callable[[], Any]] = []

    def replace(self, name: str, new: nn.Module) -> nn.Module:
        """Replaces the module `name` ("model.layers.0.mlp") with `new`; returns the old one."""
        path, _, leaf = name.rpartition(".")
        parent = self.model.get_submodule(path)
        old = parent.get_submodule(leaf)
        new.train(old.training)
        _put(parent, leaf, new)
        self._undo.append(lambda: _put(parent, leaf, old))
        return old

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets `module.name = value` on the instance. A `value` that is a module gets the training mode of `module`."""
        had, old = name in vars(module), vars(module).get(name)
        if isinstance(value, nn.Module):
            value.train(module.training)
        setattr(module, name, value)
        self._undo.append(lambda: setattr(module, name, old) if had else delattr(module, name))

    def hook(self, handle: Any) -> None:
        """Records a hook's handle (the result of `register_forward_hook`)."""
        self._undo.append(handle.remove)

    def set_requires_grad(self, parameter: nn.Parameter, flag: bool) -> None:
        old = parameter.requires_grad
        parameter.requires_grad_(flag)
        self._undo.append(lambda: parameter.requires_grad_(old))

    def on_undo(self, action: Callable[[], Any]) -> None:
        self._undo.append(action)

    def undo(self) -> None:
        """Undoes every change, newest first. A second call does nothing."""
        while self._undo:
            self._undo.pop()()


@contextmanager
def on_a_copy(linear: nn.Module) -> Iterator[None]:
    """Within it, an unquantised linear's weight has values of its own, which may be overwritten; then its old ones."""
    weight, kept = linear.weight, linear.weight.data
    weight.data = kept.clone()  # type: ignore[operator]
    try:
        yield
    finally:
        weight.data = kept


def require_unpatched(model: nn.Module, swaps: Swaps, why: str) -> None:
    """For a patch that composes with no other: BadInput for a patched model; marks this one until undone."""
    if getattr(model, EXCLUSIVE, "") or any(is_patch(module) for module in model.modules()):
        raise BadInput("apply it to a patched model", why, "Keep one of the two patches")
    swaps.set_attribute(model, EXCLUSIVE, why)


def _put(parent: nn.Module, leaf: str, module: nn.Module) -> None:
    # add_module would reorder the modules; assignment into _modules keeps their order, and so `str(model)`
    parent._modules[leaf] = module
