"""Stacked experts (MoE) whose weights are not in the model: they come one expert at a time from somewhere else.

transformers computes an experts module through a table of functions (ALL_EXPERTS_FUNCTIONS). The function here sorts
the pairs of a token and an expert by expert, once per layer, and multiplies each expert's tokens by the weights that
`tiers` (tiered/expert_layer.py) has of it. Products, their rows and the order of sums are those of the library's eager
form, so the outputs are the same numbers.

In training the experts are frozen. Nothing is stored but the inputs: the backward pass asks for each expert's weights
again, recomputes its output, and returns the gradients of the hidden states and of the router's weights.

Legend: N tokens, K experts of each, E experts, S rows of one expert, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..errors import BadInput
from . import anatomy
from .fused_experts import LAST, rows_by_expert

EXPERTS = "trimtab_tiered_experts"
TIERS = "trimtab_tiers"  # attribute of an experts module: an ExpertLayer (tiered/expert_layer.py)


def mixtures(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> experts module, for each that transformers computes through its table of functions."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "_is_expert_parallel")}


def require_mixtures(model: PreTrainedModel, asked: str) -> dict[str, nn.Module]:
    """`mixtures`; BadInput if there are none, or if some of the model's experts are computed otherwise."""
    found = mixtures(model)
    others = [path for path in (*anatomy.stacked_experts(model), *_lists(model)) if not path.startswith(tuple(found))]
    for path in others:
        owner = type(model.get_submodule(path.rpartition(".")[0])).__name__
        if "expert" in path.lower() or "Expert" in owner:
            have = f"{type(model).__name__} does not compute {path} through transformers' experts interface"
            raise BadInput(asked, have, "Use a mixture that does, such as Mixtral, Qwen3-MoE, OLMoE or GPT-OSS")
    if not found:
        raise BadInput(asked, f"{type(model).__name__} has no experts", "Use it on a mixture of experts")
    return found


def _lists(model: nn.Module) -> Iterator[str]:
    """Paths of experts that are modules of a list."""
    for path, module in model.named_modules():
        if path.endswith("experts") and isinstance(module, nn.ModuleList) and len(module) > 1:
            yield path


def leaves(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> stacked parameter (E, ...) of an experts module, as its layout flags say."""
    names = ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]
    names = [name for leaf in names for name in ((leaf, f"{leaf}_bias") if experts.has_bias else (leaf,))]
    return {name: experts._parameters[name] for name in names if experts._parameters.get(name) is not None}


def take_out(experts: nn.Module) -> Any:
    """Removes the stacked parameters from the module; -> a function that puts them back, in their order."""
    had = dict(experts._parameters)
    for name in leaves(experts):
        del experts._parameters[name]

    def put_back() -> None:
        experts._parameters.clear()
        experts._parameters.update(had)

    return put_back


@contextlib.contextmanager
def taken_out(model: nn.Module) -> Iterator[None]:
    """Within it the model has no stacked parameters of experts."""
    undo = [take_out(module) for module in mixtures(model).values()]
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


# --- the forward and the backward pass --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """The pairs of a token and an expert, sorted by expert; within an expert by rank, then by token."""

    tokens: Tensor  # (N K)
    ranks: Tensor  # (N K): which of the token's experts it is
    used: list[int]  # experts with tokens, rising
    sizes: list[int]  # how many tokens each has

    def parts(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(expert, its tokens, their ranks)."""
        start = 0
        for expert, size in zip(self.used, self.sizes, strict=True):
            yield expert, self.tokens[start : start + size], self.ranks[start : start + size]
            start += size


def chosen(index_NK: Tensor, experts: int, planned: bool = False) -> Chosen:
    """`planned`: the tensors have no values; one expert has all tokens, which is the most that one can have."""
    tokens = index_NK.shape[0]
    flat = index_NK.t().reshape(-1)
    order = flat.argsort(stable=True)
    if planned:
        return Chosen(order % tokens, order // tokens, [0], [tokens])
    sizes = torch.bincount(flat, minlength=experts).tolist()[:experts]  # a number beyond them stands for no expert
    used = [expert for expert, size in enumerate(sizes) if size]
    return Chosen(order % tokens, order // tokens, used, [sizes[expert] for expert in used])


def tiered_forward(experts: nn.Module, hidden_NH: Tensor, index_NK: Tensor, share_NK: Tensor) -> Tensor:
    """The library's interface of an experts module. `share`: the router's weights."""
    if torch.is_grad_enabled() and (hidden_NH.requires_grad or share_NK.requires_grad):
        return _Tiered.apply(hidden_NH, share_NK, index_NK, experts)
    return forward(experts, hidden_NH, index_NK, share_NK, getattr(experts, TIERS), exact=False)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, tiered_forward)


def forward(
    experts: nn.Module, hidden_NH: Tensor, index_NK: Tensor, share_NK: Tensor, tiers: Any, exact: bool = True
) -> Tensor:
    """The module's output (N, H), without gradients, with the weights that `tiers` has. `exact`: without stand-ins."""
    pairs = chosen(index_NK, tiers.experts, tiers.planned)
    out_NH = torch.zeros_like(hidden_NH)
    for expert, tokens_S, ranks_S in tiers.each(pairs, hidden_NH, exact=exact):
        weights = tiers.weights(expert, hidden_NH, exact)
        y_SH = output(experts, _beside(hidden_NH[tokens_S], weights), weights).to(hidden_NH.device)
        y_SH = y_SH * share_NK[tokens_S, ranks_S, None]
        out_NH.index_add_(0, tokens_S, y_SH.to(out_NH.dtype))
        del y_SH  # before the next expert's
    return out_NH


class _Tiered(torch.autograd.Function):
    """Saved for the backward pass: the inputs."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, share_NK: Tensor, index_NK: Tensor, experts: nn.Module) -> Tensor:
        ctx.save_for_backward(hidden_NH, share_NK, index_NK)
        ctx.experts, device = experts, hidden_NH.device.type
        ctx.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return forward(experts, hidden_NH, index_NK, share_NK, getattr(experts, TIERS))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_NH: Tensor) -> tuple:
        hidden_NH, share_NK, index_NK = ctx.saved_tensors
        experts, tiers = ctx.experts, getattr(ctx.experts, TIERS)
        device = hidden_NH.device.type
        pairs = chosen(index_NK, tiers.experts, tiers.planned)
        d_hidden_NH, d_share_NK = torch.zeros_like(hidden_NH), torch.zeros_like(share_NK)
        for expert, tokens_S, ranks_S in tiers.each(pairs, hidden_NH, back=True):
            x_SH = hidden_NH[tokens_S].requires_grad_()
            share_S = share_NK[tokens_S, ranks_S].requires_grad_()
            with torch.enable_grad(), torch.autocast(device, ctx.autocast, enabled=ctx.autocast is not None):
                weights = tiers.weights(expert, hidden_NH)
                y_SH = output(experts, _beside(x_SH, weights), weights).to(hidden_NH.device) * share_S[:, None]
                y_SH = y_SH.to(hidden_NH.dtype)
            d_x_SH, d_share_S = torch.autograd.grad(y_SH, (x_SH, share_S), slope_NH[tokens_S])
            d_hidden_NH.index_add_(0, tokens_S, d_x_SH)
            d_share_NK.index_put_((tokens_S, ranks_S), d_share_S)
            del x_SH, y_SH, share_S, d_x_SH, d_share_S  # before the next expert's
        return d_hidden_NH, d_share_NK, None, None


def _beside(x_SH: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The tokens where the weights are: on the host, if it computes the expert."""
    return x_SH.to(next(iter(weights.values())).device)


def output(experts: nn.Module, x_SH: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """One expert's output (S, H), before the router's weight. `weights`: by the names of `leaves`.

    In 16 bits on a CPU, few tokens are padded to a power of two: products of few sizes (fused_experts.py), and reading
    the weights once takes longer than the padding.
    """
    rows = x_SH.shape[0]
    if few_sizes(x_SH, next(iter(weights.values()))) and rows < LAST:
        x_SH = F.pad(x_SH, (0, 0, 0, (1 << (rows - 1).bit_length()) - rows))
    if experts.has_gate:
        inner = experts._apply_gate(_linear(experts, "gate_up_proj", x_SH, weights))
    else:
        inner = experts.act_fn(_linear(experts, "up_proj", x_SH, weights))
    out_SH = _linear(experts, "down_proj", inner, weights)
    return (experts.post_expert_norm(out_SH) if experts.has_post_expert_norm else out_SH)[:rows]


def few_sizes(x_SI: Tensor, weight: Tensor) -> bool:
    """Whether a product is to have one of few numbers of rows, and has another."""
    half = x_SI.device.type == "cpu" and x_SI.dtype == weight.dtype and weight.element_size() == 2
    return half and x_SI.shape[0].bit_count() > 1


def _linear(experts: nn.Module, name: str, x_SI: Tensor, weights: dict[str, Tensor]) -> Tensor:
    weight, bias = weights[name], weights.get(f"{name}_bias")
    if few_sizes(x_SI, weight):
        turned = weight if experts.is_transposed else weight.t()
        out = rows_by_expert(x_SI, turned[None], torch.tensor([x_SI.shape[0]]))
        return out if bias is None else out + bias
    if not experts.is_transposed:
        return F.linear(x_SI, weight, bias)
    return x_SI @ weight if bias is None else x_SI @ weight + bias


def router_of(model: nn.Module, path: str, experts: int) -> str | None:
    """The path of the router beside the experts module `path`: a module with a weight (E, H). None: there is none."""
    parent = path.rpartition(".")[0]
    for name, module in model.get_submodule(parent).named_modules(prefix=parent):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == experts and not name.startswith(path):
            return name
    return None


@torch.no_grad()
def routed(model: nn.Module, router: str, hidden_NH: Tensor, each: int) -> list[int]:
    """The experts that a router's weight chooses for these hidden states, `each` for a token. What else a router does
    (biases, groups) is left out: it is a guess, to read ahead."""
    scores_NE = hidden_NH.detach() @ model.get_submodule(router).weight.t().to(hidden_NH.dtype)
    return scores_NE.topk(min(each, scores_NE.shape[1])).indices.unique().tolist()


# --- the check --------------------------------------------------------------------------------------------------------


class Uncounted:
    """A layer of a store, whose use moves and counts nothing."""

    planned = False

    def __init__(self, tiers: Any):
        self.experts, self.weights = tiers.experts, tiers.weights

    def each(self, pairs: Chosen, hidden_NH: Tensor, exact: bool = True) -> Iterator[tuple[int, Tensor, Tensor]]:
        return pairs.parts()


class _OneByOne:
    """Stands for a stacked parameter where the library's eager form indexes it by an expert."""

    def __init__(self, tiers: Any, name: str, hidden_NH: Tensor):
        self.tiers, self.name, self.hidden_NH = tiers, name, hidden_NH

    def __getitem__(self, expert: Any) -> Tensor:
        return self.tiers.weights(int(expert), self.hidden_NH)[self.name]


@torch.no_grad()
def require_same(experts: nn.Module, hidden: int, dtype: torch.dtype, names: list[str], asked: str) -> None:
    """BadInput unless this form of the module gives what the library's eager form does, for a few random tokens."""
    tiers = getattr(experts, TIERS)
    random = torch.Generator().manual_seed(0)
    used = min(2, tiers.experts)
    hidden_NH = torch.randn(3, hidden, generator=random).to(tiers.device, dtype)
    index_NK = torch.stack([torch.randperm(tiers.experts, generator=random)[:used] for _ in range(3)]).to(tiers.device)
    share_NK = torch.rand(3, used, generator=random).to(tiers.device, dtype)
    ours = forward(experts, hidden_NH, index_NK, share_NK, Uncounted(tiers))
    config, had = experts.config, experts.config._experts_implementation
    try:
        config._experts_implementation = "eager"
        vars(experts).update({name: _OneByOne(tiers, name, hidden_NH) for name in names})
        own = experts(hidden_NH, index_NK, share_NK)
    finally:
        config._experts_implementation = had
        for name in names:
            vars(experts).pop(name, None)
    own = own[0] if isinstance(own, tuple) else own
    if not torch.allclose(own.float(), ours.float(), rtol=1e-2 if dtype.itemsize < 4 else 1e-4, atol=1e-4):
        have = f"{type(experts).__name__} computes more than transformers' experts interface says"
        raise BadInput(asked, have, "Use the model without it, and report this model")
