"""How a model computes logits from hidden states: what happens before its last linear, and after it.

A head is rarely the last linear alone. BERT-type models transform the hidden states first, HyperCLOVAX and Cohere
multiply the logits, Granite divides them, Gemma and RecurrentGemma cap them, Inkling drops padded words, and a mixture
of experts adds a loss of its router. No model or setting is recognised by its name: the model's own forward runs with
another function in place of its last linear. That function receives the linear's input, and returns known numbers;
the resulting logits show what the model does to the linear's output.

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
READ = "trimtab_head"  # attribute of a model in training: its `Head`, read once
SMALL = 2.0**-10  # a logit so small that a soft cap leaves it unchanged
HUGE = 1e9  # a logit so large that a soft cap returns its limit


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(scale * (x W^T + b) / cap) of the linear's first `words` outputs.

    `linear`: None if the logits are computed in another way; then the loss uses those of the model's own forward.
    """

    linear: nn.Linear | None = None
    scale: float = 1.0
    softcap: float | None = None
    words: int | None = None  # None: all


def head_of(model: PreTrainedModel) -> Head:
    """The head that the engine has already read, else `read_head(model)`."""
    found = getattr(model, READ, None)
    return read_head(model) if found is None else found


@torch.no_grad()
def read_head(model: PreTrainedModel) -> Head:
    """Reads the head of an unpatched model from a forward pass of one row of two tokens, in which its linears return
    zeros without reading their weights; works on `meta` as well.

    BadInput if the model has no language-model head.
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
        for module in model.modules():  # their outputs do not matter, and a quantised one would keep state of the pass
            if type(module) is nn.Linear or (anatomy.is_linear(module) and is_quantised(module)):
                stack.enter_context(_instead(module, functools.partial(_zeros, module.out_features)))
        try:
            with _instead(linear, known), _Shapes() if ids_BT.is_meta else contextlib.nullcontext():
                logits = model.forward(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits
        except Exception:  # a model's forward may need other inputs
            return Head()
    if len(given) != 1 or given[0] != (1, 2, linear.in_features) or logits.dim() != 3 or logits.is_meta:
        return Head()
    form = _form(scores_V, logits[0, -1].float().cpu())
    return Head() if form is None else Head(linear, *form)


def _form(scores_V: Tensor, logits_V: Tensor) -> tuple[float, float | None, int | None] | None:
    """-> (scale, soft cap, number of words), if these turn `scores` into `logits`; else None."""
    size = len(logits_V)
    if not 2 < size <= len(scores_V):
        return None
    scores_V, words = scores_V[:size], None if size == len(scores_V) else size
    scale, most = float(logits_V[1]) / SMALL, float(logits_V[2])
    if not scale > 0:
        return None
    cap = None if most > 0.5 * scale * HUGE else most
    wanted_V = scores_V * scale if cap is None else cap * torch.tanh(scores_V * (scale / cap))
    if not torch.allclose(logits_V, wanted_V, rtol=1e-5, atol=1e-6 * scale):
        return None
    return _clean(scale), None if cap is None else _clean(cap), words


def _clean(value: float) -> float:
    """`value` as a config would state it: fp32 rounds 0.0625 * x and 1 / 3 in the seventh digit."""
    return float(f"{value:.6g}") if abs(float(f"{value:.6g}") - value) <= 2e-7 * abs(value) else value


def before_head(model: PreTrainedModel, linear: nn.Linear, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """-> the input of `linear` in the model's own forward (B, T, H), and the output of that forward.

    The linear itself is not computed: its output is (B, T, 0).
    """
    read: list[Tensor] = []

    def nothing(x_BTH: Tensor) -> Tensor:
        read.append(x_BTH)
        return x_BTH.new_zeros(*x_BTH.shape[:-1], 0)

    with _instead(linear, nothing):
        output = model.forward(**inputs, use_cache=False)
    return read[0], output


def router_loss(model: PreTrainedModel, output: Any) -> Tensor | None:
    """The weighted load-balancing loss of a mixture of experts, shape (); None if `output` has none.

    The output has one if the model's config sets `output_router_logits`.
    """
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    config = model.config.get_text_config()
    names = ("router_aux_loss_coef", "aux_loss_coef")
    weight = next((getattr(owner, n) for n in names for owner in (config, model) if hasattr(owner, n)), None)
    if weight is None:
        raise BadInput(
            f"output_router_logits on {type(model).__name__}", "its config has no weight for the router's loss",
            "Set output_router_logits to false",
        )  # fmt: skip
    return loss * weight


def _zeros(width: int, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], width)


class _Shapes(TorchDispatchMode):
    """On `meta`, answers a model's questions about values: all positions count, all masks are full."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is aten._local_scalar_dense.default:
                return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
            if func is aten.nonzero.default:
                return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
            if func is aten._grouped_mm.default and args[0].dim() == 2 and args[1].dim() == 3:  # meta: 16-bit only
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
