"""Norms, gated FFNs and attention that save fewer activations for the backward pass and use less memory bandwidth.

They change no weights and (except for rounding) no outputs. They are in a model only during training. No module is
recognised by its name: it is replaced only if the fused form returns the same output on a probe.

    RMSNorm    saves its input and one number per token, instead of several fp32 copies
    gated FFN  act(g) * u saves g and u, not act(g); with `recompute` it saves only the FFN's input, and multiplies by
               the gate and up weights again in backward: 1/8 more work, three fifths less activation memory of a block
    attention  three batched products and a softmax in 16 bits (the weights' dtype or autocast's), recomputed in
               backward: about twice as fast as the fused kernel for the short sequences of fine-tuning on a CPU. The
               scores are rounded to 16 bits before the softmax, as in transformers' eager attention. Long sequences,
               CUDA, inference, fp32, dropout and special kinds (sinks, soft caps) use transformers' SDPA.

Legend: B batch, H query heads, K key/value heads, T tokens, D head width.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import weakref
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..foreign import softmax_backward
from .fused_experts import fuse_experts
from .surgery import Swaps, is_patch

ATTENTION = "trimtab_fused"
FUSED_OPS = ("norm", "ffn", "attention", "experts")
SCORES_BYTES = 32 * 2**20  # above this many bytes of attention probabilities the fused kernel uses less memory


def fuse_ops(model: PreTrainedModel, recompute: bool = False, ops: Collection[str] = FUSED_OPS) -> Swaps:
    """Puts the fused operations `ops` into `model`; `undo()` of the result removes them.

    `recompute`: gated FFNs save only their input for backward.
    """
    swaps = Swaps(model)
    fits: dict[tuple, str | None] = {}
    for module in model.modules():
        if is_patch(module):  # reading its weight may compute it
            continue
        kind = (type(module), getattr(getattr(module, "weight", None), "dtype", None))
        if _looks_like_norm(module):
            if "norm" in ops and kind not in fits:
                fits[kind] = _which_norm(module)
            if fits.get(kind):
                swaps.set_attribute(module, "forward", _norm_forward(module, fits[kind] == "shifted"))
        elif all(isinstance(getattr(module, leaf, None), nn.Module) for leaf in ("gate_proj", "up_proj", "down_proj")):
            act = _which_activation(getattr(module, "act_fn", None)) if "ffn" in ops else None
            if act and type(module).__name__.endswith("MLP") and _is_gated(module):
                swaps.set_attribute(module, "forward", _gated_forward(module, act, recompute))
    if "attention" in ops and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, fused_attention)
        AttentionMaskInterface.register(ATTENTION, fused_mask)
        model.set_attn_implementation(ATTENTION)
        swaps.on_undo(lambda: model.set_attn_implementation("sdpa"))
    if "experts" in ops:
        fuse_experts(model, swaps)
    return swaps


# --- RMSNorm ---------------------------------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps: float, shifted: bool):
        full = x.float()
        inverse = torch.linalg.vector_norm(full, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.shifted = shifted
        unit = full.mul_(inverse) if full is not x else full * inverse
        if shifted:  # Gemma: (1 + w) in fp32, then rounded
            return unit.mul_(1.0 + weight.float()).to(x.dtype)
        return weight * unit.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, inverse = ctx.saved_tensors
        scale = 1.0 + weight.float() if ctx.shifted else weight
        unit = x.float() * inverse
        slope = (dy * scale).float()
        d_weight = (dy.float() * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = (slope * unit).mean(-1, keepdim=True)
        dx = slope.sub_(unit.mul_(mean)).mul_(inverse).to(x.dtype)
        return dx, d_weight, None, None


def _looks_like_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor) and weight.dim() == 1 and getattr(module, "bias", None) is None
        and _eps(module) is not None and not isinstance(module, nn.LayerNorm) and not list(module.children())
        and len(inspect.signature(type(module).forward).parameters) == 2  # self and x: some norms also take a gate
    )  # fmt: skip


def _eps(module: nn.Module) -> float | None:
    return next(
        (getattr(module, n) for n in ("variance_epsilon", "eps") if isinstance(getattr(module, n, None), float)), None
    )


def _which_norm(module: nn.Module) -> str | None:
    """ "plain" or "shifted" if `module` computes that RMS norm (outputs compared on a probe), else None."""
    random = torch.Generator().manual_seed(0)
    twin, old = copy.deepcopy(module), module.weight  # random weights: "plain" and "shifted" then differ
    weight = (torch.rand(old.shape, generator=random) + 0.25).to("cpu" if old.is_meta else old.device, old.dtype)
    twin.weight = nn.Parameter(weight, requires_grad=False)
    probe = torch.randn(3, weight.shape[0], generator=random).to(weight.device, weight.dtype) * 3
    with torch.no_grad():
        try:
            wanted = twin(probe)
        except Exception:  # its forward needs other inputs: not an RMS norm
            return None
        for name, shifted in (("plain", False), ("shifted", True)):
            got = _RMSNorm.apply(probe, weight, _eps(module), shifted)
            if wanted.dtype == got.dtype and torch.allclose(
                got, wanted, rtol=1e-2 if got.dtype != torch.float32 else 1e-5
            ):
                return name
    return None


def _norm_forward(module: nn.Module, shifted: bool):
    eps = _eps(module)
    return lambda x: _RMSNorm.apply(x, module.weight, eps, shifted)


# --- gated feed-forward ----------------------------------------------------------------------------------------------


def _silu_slope(dy: Tensor, gate: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(dy, gate)


def _gelu_tanh(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


def _gelu_tanh_slope(dy: Tensor, gate: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, gate, approximate="tanh")


ACTIVATIONS = {"silu": (F.silu, _silu_slope), "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope)}


class _Gated(torch.autograd.Function):
    """act(gate) * up; saves gate and up only."""

    @staticmethod
    def forward(ctx, gate, up, act: str):
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return ACTIVATIONS[act][0](gate).mul_(up)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        function, slope = ACTIVATIONS[ctx.act]
        return slope(dy * up, gate), function(gate).mul_(dy), None


def _which_activation(act) -> str | None:
    if act is None:
        return None
    probe = torch.linspace(-4, 4, 33)
    with torch.no_grad():
        return next((n for n, (f, _) in ACTIVATIONS.items() if torch.allclose(act(probe), f(probe), atol=1e-6)), None)


def _is_gated(module: nn.Module) -> bool:
    """Whether the class's forward is down(act(gate(x)) * up(x)), tested with three toy functions for its linears."""
    toy = _Toy()
    toy.act_fn = module.act_fn
    x = torch.linspace(-2, 2, 5)
    try:
        with torch.no_grad():
            got = type(module).forward(toy, x)
            return torch.allclose(got, toy.down_proj(module.act_fn(toy.gate_proj(x)) * toy.up_proj(x)))
    except Exception:  # its forward needs other parts too
        return False


class _Toy:
    gate_proj = staticmethod(lambda x: 0.5 * x + 0.1)
    up_proj = staticmethod(lambda x: 1.5 * x - 0.2)
    down_proj = staticmethod(lambda x: 2.0 * x + 0.3)


def _gated_forward(module: nn.Module, act: str, recompute: bool):
    def inner(x: Tensor) -> Tensor:
        return _Gated.apply(module.gate_proj(x), module.up_proj(x), act)

    def forward(x: Tensor) -> Tensor:
        if recompute and torch.is_grad_enabled():
            return module.down_proj(checkpoint(inner, x, use_reentrant=False, preserve_rng_state=False))
        return module.down_proj(inner(x))

    return forward


# --- attention -------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """softmax(q k^T s + bias) v with grouped heads; backward recomputes the probabilities."""

    @staticmethod
    def forward(ctx, query_BHTD, key_BKTD, value_BKTD, bias, scale: float):
        B, H, T, D = query_BHTD.shape
        K = key_BKTD.shape[1]
        query = query_BHTD.reshape(B * K, H // K * T, D)
        key, value = key_BKTD.reshape(B * K, T, D), value_BKTD.reshape(B * K, T, D)
        out = torch.bmm(_probabilities(query, key, bias, scale, B), value)
        ctx.save_for_backward(query, key, value, bias)
        ctx.scale, ctx.batch = scale, B
        return out.view(B, H, T, D)

    @staticmethod
    def backward(ctx, d_out_BHTD):
        query, key, value, bias = ctx.saved_tensors
        (B, H, T, D), K = d_out_BHTD.shape, key.shape[0] // ctx.batch
        d_out = d_out_BHTD.reshape(B * K, H // K * T, D)
        p = _probabilities(query, key, bias, ctx.scale, B)
        d_value = torch.bmm(p.transpose(1, 2), d_out)
        d_p = torch.bmm(d_out, value.transpose(1, 2))
        d_scores = softmax_backward(d_p, p, -1, p.dtype)
        d_query = torch.bmm(d_scores, key).mul_(ctx.scale)
        d_key = torch.bmm(d_scores.transpose(1, 2), query).mul_(ctx.scale)
        return d_query.view(B, H, T, D), d_key.view(B, K, T, D), d_value.view(B, K, T, D), None, None


def _probabilities(query: Tensor, key: Tensor, bias: Tensor, scale: float, batch: int) -> Tensor:
    """-> (B K, H/K T, T). `bias`: (1, H/K T, T) for a mask that all rows share, or (B, 1, 1, T, T)."""
    if bias.dim() == 3:
        return torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale).softmax(-1)
    T = key.shape[1]
    scores = torch.bmm(query, key.transpose(1, 2)).mul_(scale)
    scores.view(batch, -1, scores.shape[1] // T, T, T).add_(bias)
    return scores.softmax(-1)


class _Biases:
    """Additive masks of one forward pass, created once for all layers and freed with the mask."""

    def __init__(self, full_rows: bool = False):
        self.full_rows = full_rows
        self.causal: dict[tuple, Tensor] = {}
        self.mask: weakref.ref | None = None
        self.bias: Tensor | None = None

    def _dropped(self, mask: weakref.ref) -> None:
        if mask is self.mask:
            self.mask = self.bias = None

    def of_causal(self, T: int, groups: int, like: Tensor) -> Tensor:
        key = (T, groups, like.dtype, like.device)
        if key not in self.causal:
            self.causal.clear()  # one length at a time
            above = torch.ones(T, T, dtype=torch.bool, device=like.device).triu(1)
            bias = torch.zeros(T, T, dtype=like.dtype, device=like.device).masked_fill_(
                above, torch.finfo(like.dtype).min
            )
            self.causal[key] = bias.repeat(groups, 1)[None]
        return self.causal[key]

    def of_mask(self, mask_B1TT: Tensor, like: Tensor) -> Tensor | None:
        """None if a token sees no other (left padding): SDPA returns zeros there, which an added bias cannot."""
        if mask_B1TT.dtype == like.dtype:
            return mask_B1TT[:, :, None]
        same = self.mask is not None and self.mask() is mask_B1TT
        if not same or (self.bias is not None and self.bias.dtype != like.dtype):
            if mask_B1TT.dtype != torch.bool:
                bias = mask_B1TT.to(like.dtype)[:, :, None]
            elif mask_B1TT.any(-1).all():
                bias = torch.zeros(mask_B1TT.shape, dtype=like.dtype, device=like.device)
                bias = bias.masked_fill_(~mask_B1TT, torch.finfo(like.dtype).min)[:, :, None]
            else:
                bias = None
            self.mask, self.bias = weakref.ref(mask_B1TT, self._dropped), bias
        return self.bias


_biases = _Biases()


@contextlib.contextmanager
def fresh_biases(full_rows: bool = False) -> Iterator[None]:
    """Within it, no mask from outside is reused; on exit, those from inside are dropped. For tensors without values.

    `full_rows`: the masks mask no padding, which transformers cannot detect on such tensors.
    """
    before = vars(_biases).copy()
    vars(_biases).update(vars(_Biases(full_rows)))
    try:
        yield
    finally:
        vars(_biases).update(before)


def fused_mask(*args, **kwargs) -> Tensor | None:
    """transformers' mask interface: as for SDPA."""
    local, length = kwargs.get("local_size"), kwargs.get("kv_length")
    causal = kwargs.get("allow_is_causal_skip") and (local is None or (length is not None and length < local))
    return None if _biases.full_rows and causal else sdpa_mask(*args, **kwargs)


def fused_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """transformers' attention interface: (B, H, T, D) queries -> ((B, T, H, D), None)."""
    B, H, T, D = query.shape
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    dense = attention_mask is not None and attention_mask.shape[1] == 1
    fits = (
        query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad and not dropout
        and query.dtype == key.dtype == value.dtype and query.dtype in (torch.bfloat16, torch.float16)
        and key.shape[2] == T and value.shape[-1] == D and B * H * T * T * query.element_size() <= SCORES_BYTES
        and not any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))
        and (dense or (attention_mask is None and causal and not kwargs.get("sliding_window")))
    )  # fmt: skip
    bias = None
    if fits:
        if attention_mask is None:
            bias = _biases.of_causal(T, H // key.shape[1], query)
        else:
            bias = _biases.of_mask(attention_mask, query)
    if bias is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    with torch.autocast("cpu", enabled=False):
        out = _Attention.apply(query, key, value, bias, D**-0.5 if scaling is None else scaling)
    return out.transpose(1, 2).contiguous(), None  # some models call `view` on it


def _autocast(tensor: Tensor) -> Tensor:
    """Casts an attention input as autocast would: with an fp32 base, queries and keys are fp32 and values 16-bit."""
    cast = tensor.dtype == torch.float32 and tensor.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return tensor.to(torch.get_autocast_dtype("cpu")) if cast else tensor
