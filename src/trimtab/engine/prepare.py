"""Prepares a model for training, and restores it exactly."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..contracts import Objective, Surgery
from ..model import anatomy
from ..model.experts import TIERS
from ..model.fused_ops import FUSED_OPS, fuse_ops
from ..model.head import READ, read_head
from ..model.surgery import Swaps, is_patch
from ..model.weight_prefetch import read_weights_ahead
from ..recipe import Recipe


@contextlib.contextmanager
def restore_model(model: PreTrainedModel) -> Iterator[None]:
    """On exit, removes what the libraries' trainers left on the model: config values, tags, checkpointing, mode."""
    owners = [c for c in (model.config, getattr(model, "generation_config", None)) if c is not None]
    saved = [copy.deepcopy(vars(owner)) for owner in owners]
    modules = [(m, set(vars(m)), m.training, vars(m).get("gradient_checkpointing")) for m in model.modules()]
    handles = list(getattr(model, "_require_grads_hooks", ()))
    try:
        yield
    finally:
        for handle in getattr(model, "_require_grads_hooks", ()):
            if handle not in handles:
                handle.remove()
        for module, had, training, checkpointing in modules:
            for name in () if is_patch(module) else set(vars(module)) - had:
                delattr(module, name)
            module.training = training
            if checkpointing is not None:
                module.gradient_checkpointing = checkpointing
        if handles:
            model._require_grads_hooks = handles
        for owner, values in zip(owners, saved, strict=True):
            vars(owner).clear()
            vars(owner).update(values)


@contextlib.contextmanager
def training_forward(model: PreTrainedModel, objective: Objective, recipe: Recipe) -> Iterator[None]:
    """Within it, the model has the recipe's fused operations, compiled blocks if asked, and a `forward` that also
    computes the objective's loss (given `objective_batch`)."""
    swaps = Swaps(model)
    if objective.head == "causal-lm" and not getattr(objective, "whole", False) and not hasattr(model, READ):
        swaps.set_attribute(model, READ, read_head(model))
    fused = apply_fused_ops(model, recipe)
    original = model.forward

    @functools.wraps(original)  # the trainers read from its signature which columns a batch may have
    def forward(*args, objective_batch=None, objective_count=None, **kwargs):
        if objective_batch is None:
            return original(*args, **kwargs)
        return objective.loss(model, objective_batch, objective_count)

    try:
        if recipe.engine.compile:
            _compile(model, swaps)
        elif recipe.engine.prefetch and not recipe.place.shard:
            read_weights_ahead(model, swaps)
        had = vars(model).get("forward")
        model.forward = forward
        swaps.on_undo(lambda: setattr(model, "forward", had) if had is not None else vars(model).pop("forward", None))
        yield
    finally:
        swaps.undo()
        fused.undo()


def weigh_router(model: PreTrainedModel, args: Any) -> None:
    """Sets in the config of a mixture of experts, as TRL's trainer does, whether the router's loss is added and its
    weight: `router_aux_loss_coef` of the training arguments, else of the config."""
    config = model.config.get_text_config()
    requested = getattr(args, "router_aux_loss_coef", None)
    weight = getattr(config, "router_aux_loss_coef", 0.0) if requested is None else requested
    if hasattr(config, "router_aux_loss_coef"):
        config.output_router_logits = hasattr(config, "output_router_logits") and weight != 0.0
        config.router_aux_loss_coef = weight


def apply_fused_ops(model: PreTrainedModel, recipe: Recipe) -> Swaps:
    """Puts the fused operations that the recipe asks for into `model`; `undo()` of the result removes them."""
    again = recipe.engine.recompute == "ffn"
    if recipe.engine.recompute == "auto":  # a quantised base: memory matters more than speed
        again = bool(getattr(model, "is_quantized", False))
    chosen = recipe.engine.fused_ops
    return fuse_ops(model, recompute=again, ops=(FUSED_OPS if chosen else ()) if isinstance(chosen, bool) else chosen)


def _compile(model: PreTrainedModel, swaps: Swaps) -> None:
    """Compiles each block; modules of patches, and experts that one has moved, run uncompiled.

    A patched linear is an autograd function with its own constants (which columns), so torch would compile it once for
    each linear of the model.
    """
    for module in model.modules():
        if is_patch(module) or TIERS in vars(module):
            swaps.set_attribute(module, "forward", torch.compiler.disable(module.forward))
    for block in anatomy.blocks(model)[1]:
        swaps.set_attribute(block, "_compiled_call_impl", None)
        block.compile()


def autocast_dtype(surgeries: Sequence[Surgery], base: torch.dtype | None, requested: bool) -> torch.dtype | None:
    """The dtype of autocast in a training step; None: no autocast. `base`: the model's dtype before any patch.
    `requested`: whether the recipe asks for it (`bf16: true`).

    Patches that multiply their own fp32 weights beside a 16-bit base need autocast (full, DoRA). The others cast
    by themselves and avoid its overhead.
    """
    half = base if base in (torch.bfloat16, torch.float16) else None
    wanted = half is not None and any(getattr(surgery.patch, "autocast", False) for surgery in surgeries)
    return (half or torch.bfloat16) if requested or wanted else None
