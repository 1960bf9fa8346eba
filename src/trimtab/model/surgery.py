"""Swap or hook a module, and the exact way back.

Everything a patch does to a model goes through one `Swaps`, which remembers it and undoes it in reverse order: modules
replaced, hooks added, `requires_grad` flags and attributes set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import BadInput

PATCH_MARK = "trimtab_patch"  # set on a foreign module (a layer of peft) that one of our patches put into a model
ALONE = "trimtab_alone"  # set on a model whose patch composes with no other: why


class ModulePatch(nn.Module):
    """Marks a module that a patch put into a model: its parameters are the patch's own, never frozen as base."""


def is_patch(module: nn.Module) -> bool:
    return isinstance(module, ModulePatch) or getattr(module, PATCH_MARK, False)


class Swaps:
    """What was changed in one model, and how to undo it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._undo: list[Callable[[], Any]] = []

    def replace(self, name: str, new: nn.Module) -> nn.Module:
        """Put `new` where the module `name` ("model.layers.0.mlp") stands; returns the one taken out."""
        path, _, leaf = name.rpartition(".")
        parent = self.model.get_submodule(path)
        old = parent.get_submodule(leaf)
        new.train(old.training)
        _put(parent, leaf, new)
        self._undo.append(lambda: _put(parent, leaf, old))
        return old

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set `module.name = value` on the instance (a `forward`, a flag, a module, which is then in training if
        `module` is), shadowing or replacing what is there."""
        had, old = name in vars(module), vars(module).get(name)
        if isinstance(value, nn.Module):
            value.train(module.training)
        setattr(module, name, value)
        self._undo.append(lambda: setattr(module, name, old) if had else delattr(module, name))

    def hook(self, handle: Any) -> None:
        """Remember a hook's handle (what `register_forward_hook` returned)."""
        self._undo.append(handle.remove)

    def set_requires_grad(self, parameter: nn.Parameter, flag: bool) -> None:
        old = parameter.requires_grad
        parameter.requires_grad_(flag)
        self._undo.append(lambda: parameter.requires_grad_(old))

    def on_undo(self, action: Callable[[], Any]) -> None:
        self._undo.append(action)

    def undo(self) -> None:
        """Take every change back, newest first. A second call does nothing."""
        while self._undo:
            self._undo.pop()()


def stand_alone(model: nn.Module, swaps: Swaps, why: str) -> None:
    """For a patch that composes with no other: refuse a patched model, and mark this one until the way back."""
    if getattr(model, ALONE, "") or any(is_patch(module) for module in model.modules()):
        raise BadInput("apply it to a patched model", why, "Keep one of the two patches")
    swaps.set_attribute(model, ALONE, why)


def _put(parent: nn.Module, leaf: str, module: nn.Module) -> None:
    # add_module would re-order the dict of an nn.Module; assignment into _modules keeps the place, and so `str(model)`
    parent._modules[leaf] = module
