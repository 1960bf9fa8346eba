"""How a model makes logits of its hidden states: what comes before its last linear, and what after it.

A head is seldom the last linear alone. BERT's kin and ModernBERT transform the hidden states first, HyperCLOVAX and
Cohere multiply the logits, Granite divides them, Gemma and RecurrentGemma squash them, Inkling cuts padded words off,
and a mixture of experts adds a loss of its router. None of it is recognised by a model's or a setting's name: the
model's own forward runs with another function in the place of its last linear. What arrives there is what the linear
reads; what the model makes of known numbers says what it does to its logits.

B rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BadInput
from ..foreign import TorchDispatchMode
from . import anatomy
from .quant import is_quantised
from .undisturbed import undisturbed

aten = torch.ops.aten
READ = "trimtab_head"  # on a model that the engine steps: its `Head`, read once
SMALL = 2.0**-10  # a logit so small that a soft cap does nothing to it
HUGE = 1e9  # one so large that a soft cap gives its limit


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(scale * (x W^T + b) / cap) of the linear's first `words` outputs.

    `linear`: None where the logits are made in another way; then the model's own forward makes them whole.
    """

    linear: nn.Linear | None = None
    scale: float = 1.0
    softcap: float | None = None
    words: int | None = None  # None: all


def head_of(model: PreTrainedModel) -> Head:
    """What the engine has read of `model` already, else what `read_head` finds."""
    found = getattr(model, READ, None)
    return read_head(model) if found is None else found


@torch.no_grad()
def read_head(model: PreTrainedModel) -> Head:
    """Reads the head of a model from one forward pass of a row of two tokens, in which its linears give zeros (none of
    their weights is read); works on `meta` as well. For a model that is not patched yet.

    BadInput where the model has no language-model head at all.
    """
    linear = model.get_output_embeddings()
    if linear is None:
        raise BadInput(
            f"a next-token loss on {type(model).__name__}",
            "it has no language-model head",
            "Use a causal language model",
        )
    if type(linear) is not nn.Linear:  # quantised, patched, or an adaptive softmax
        return Head()
    ids_BT = torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    words = linear.out_features
    scores_V = torch.linspace(-24, 24, words).roll(words // 3)
    scores_V[0], scores_V[1], scores_V[2] = 0.0, SMALL, HUGE
    given = []

    def known(x_BTH: Tensor) -> Tensor:
        given.append(x_BTH.shape)
        return scores_V.expand(*x_BTH.shape[:-1], words).clone()  # on the CPU, with values, wherever the model is

    with undisturbed(model), contextlib.ExitStack() as stack:
        for module in model.modules():  # their values do not matter; a quantised one would remember the pass
            if type(module) is nn.Linear or (anatomy.is_linear(module) and is_quantised(module)):
                stack.enter_context(_instead(module, functools.partial(_zeros, module.out_features)))
        try:
            with _instead(linear, known), _Shapes() if ids_BT.is_meta else contextlib.nullcontext():
                logits = model.forward(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits
        except Exception:  # a stranger's forward may need more than this
            return Head()
    if len(given) != 1 or given[0] != (1, 2, linear.in_features) or logits.dim() != 3 or logits.is_meta:
        return Head()
    form = _form(scores_V, logits[0, -1].float().cpu())
    return Head() if form is None else Head(linear, *form)


def _form(scores_V: Tensor, logits_V: Tensor) -> tuple[float, float | None, int | None] | None:
    """-> (scale, soft cap, words kept), if these are what makes `logits` of `scores`; else None."""
    kept = len(logits_V)
    if not 2 < kept <= len(scores_V):
        return None
    scores_V, words = scores_V[:kept], None if kept == len(scores_V) else kept
    scale, most = float(logits_V[1]) / SMALL, float(logits_V[2])
    if not scale > 0:
        return None
    cap = None if most > 0.5 * scale * HUGE else most
    wanted_V = scores_V * scale if cap is None else cap * torch.tanh(scores_V * (scale / cap))
    if not torch.allclose(logits_V, wanted_V, rtol=1e-5, atol=1e-6 * scale):
        return None
    return _clean(scale), None if cap is None else _clean(cap), words


def _clean(value: float) -> float:
    """A number as a config would state it: fp32 rounds 0.0625 * x and 1 / 3 in the seventh digit."""
    return float(f"{value:.6g}") if abs(float(f"{value:.6g}") - value) <= 2e-7 * abs(value) else value


def before_head(model: PreTrainedModel, linear: nn.Linear, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """-> what `linear` reads in the model's own forward (B, T, H), and what that forward returned.

    The linear itself is not computed: logits without a width stand for its output.
    """
    read: list[Tensor] = []

    def nothing(x_BTH: Tensor) -> Tensor:
        read.append(x_BTH)
        return x_BTH.new_zeros(*x_BTH.shape[:-1], 0)

    with _instead(linear, nothing):
        output = model.forward(**inputs, use_cache=False)
    return read[0], output


def router_loss(model: PreTrainedModel, output: Any) -> Tensor | None:
    """What a mixture of experts adds to its loss to keep its experts evenly in use, with its weight; None without it.

    It is there if the model's config says `output_router_logits`.
    """
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    config = model.config.get_text_config()
    names = ("router_aux_loss_coef", "aux_loss_coef")
    weight = next((getattr(owner, n) for n in names for owner in (config, model) if hasattr(owner, n)), None)
    if weight is None:
        raise BadInput(
            f"output_router_logits on {type(model).__name__}", "its config states no weight for the router's loss",
            "Set output_router_logits to false",
        )  # fmt: skip
    return loss * weight


def _zeros(width: int, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], width)


class _Shapes(TorchDispatchMode):
    """On `meta`, what a model asks of its data has an answer: all positions count, all masks are full."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is aten._local_scalar_dense.default:
                return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
            if func is aten.nonzero.default:
                return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
            if func is aten._grouped_mm.default and args[0].dim() == 2 and args[1].dim() == 3:  # of 16 bits only there
                return args[0].new_empty(args[0].shape[0], args[1].shape[2])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _instead(linear: nn.Linear, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    had = vars(linear).get("forward")
    linear.forward = function  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had is None:
            del linear.forward
        else:
            linear.forward = had  # type: ignore[method-assign]
