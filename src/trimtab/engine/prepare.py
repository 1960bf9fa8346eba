"""The model as the engine trains it, and how it is restored exactly."""

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
from ..model.efficient import FORMS, lean
from ..model.head import READ, read_head
from ..model.surgery import Swaps, is_patch
from ..model.weight_prefetch import read_weights_ahead
from ..recipe import Recipe


@contextlib.contextmanager
def as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """What the libraries' trainers leave on a model (config values, tags, checkpointing, mode) is gone afterwards."""
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
def prepared(model: PreTrainedModel, objective: Objective, recipe: Recipe) -> Iterator[None]:
    """The model as the engine steps it: lean forms in, blocks compiled if asked, forward leading to the objective."""
    swaps = Swaps(model)
    if objective.head == "causal-lm" and not getattr(objective, "whole", False) and not hasattr(model, READ):
        swaps.set_attribute(model, READ, read_head(model))
    lean_swaps = lean_forms(model, recipe)
    original = model.forward

    @functools.wraps(original)  # the trainers read from its signature which columns a batch may have
    def forward(*args, objective_batch=None, objective_count=None, **kwargs):
        if objective_batch is None:
            return original(*args, **kwargs)
        return objective.loss(model, objective_batch, objective_count)

    try:
        if recipe.engine.compile:
            _compile(model, swaps)
        elif recipe.engine.prefetch:
            read_weights_ahead(model, swaps)
        had = vars(model).get("forward")
        model.forward = forward
        swaps.on_undo(lambda: setattr(model, "forward", had) if had is not None else vars(model).pop("forward", None))
        yield
    finally:
        swaps.undo()
        lean_swaps.undo()


def weigh_router(model: PreTrainedModel, args: Any) -> None:
    """What TRL's trainer writes into the config of a mixture of experts: whether its router's loss is added, and how it
    is weighted (`router_aux_loss_coef` of the training arguments, else of the config)."""
    config = model.config.get_text_config()
    asked = getattr(args, "router_aux_loss_coef", None)
    weight = getattr(config, "router_aux_loss_coef", 0.0) if asked is None else asked
    if hasattr(config, "router_aux_loss_coef"):
        config.output_router_logits = hasattr(config, "output_router_logits") and weight != 0.0
        config.router_aux_loss_coef = weight


def lean_forms(model: PreTrainedModel, recipe: Recipe) -> Swaps:
    """The lean forms that the recipe asks for, put into `model`."""
    again = recipe.engine.recompute == "ffn"
    if recipe.engine.recompute == "auto":  # whoever quantises prefers memory to speed
        again = bool(getattr(model, "is_quantized", False))
    chosen = recipe.engine.lean
    return lean(model, recompute=again, forms=(FORMS if chosen else ()) if isinstance(chosen, bool) else chosen)


def _compile(model: PreTrainedModel, swaps: Swaps) -> None:
    """torch.compile for each block; what a patch put in runs uncompiled.

    A patched linear is one autograd function with numbers of its own (which columns): compiled, it would be compiled
    once for each linear of the model.
    """
    for module in model.modules():
        if is_patch(module):
            swaps.set_attribute(module, "forward", torch.compiler.disable(module.forward))
    for block in anatomy.blocks(model)[1]:
        swaps.set_attribute(block, "_compiled_call_impl", None)
        block.compile()


def autocast_dtype(surgeries: Sequence[Surgery], base: torch.dtype | None, asked: bool) -> torch.dtype | None:
    """The type that autocast computes a step in; None: without it. `base`: the model's type before any patch.

    Patches that multiply fp32 weights of their own beside a 16-bit base ask for autocast (full, DoRA); the others cast
    by themselves, and run without its bookkeeping.
    """
    half = base if base in (torch.bfloat16, torch.float16) else None
    wanted = half is not None and any(getattr(surgery.patch, "autocast", False) for surgery in surgeries)
    return (half or torch.bfloat16) if asked or wanted else None
