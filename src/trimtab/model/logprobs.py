"""Log-probabilities of selected tokens, with their gradient, without the full logits.

For a policy gradient only log pi(v | p) of some tokens is needed. Their hidden states are gathered before the head, and
a chunk of them at a time is projected, turned into log-probabilities, and freed. The gradient of one log-probability
with respect to its hidden state h (size H) is

    u = W^T d,   d = (1_v - softmax(z)) / tau, through the scale and soft cap of the head,

which does not depend on what the loss does with the log-probability. So u is all that is kept, (N, H), and the backward
pass multiplies it by the incoming gradient: two matrix products per chunk, no recomputation. A frozen head gets no
gradient buffer; one that is trained is projected again in the backward pass. The entropy of the distribution is
returned without a gradient unless that is asked for; then it has a vector of its own.

Legend: N selected tokens, C of them in a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .head import before_head, router_loss
from .kept_rows import KeptRows
from .loss import CHUNK_BYTES, head_and_kept, prepared, projection

WIDTHS = 16  # the sequence is cut at a multiple of it


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, target_N, form, slopes):
        chunk, cap, scale, tau, kept = form
        wants = ctx.needs_input_grad
        count = hidden_NH.shape[0]
        logp_N, entropy_N = (hidden_NH.new_empty(count, dtype=torch.float32) for _ in range(2))
        pull_NH = torch.empty_like(hidden_NH) if wants[0] else None
        spread_NH = torch.empty_like(hidden_NH) if wants[0] and slopes else None
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            logits_CV, p_CV, logp_CV = _distribution(hidden_NH[part], weight_VH, bias_V, form)
            logp_N[part] = logp_CV.gather(1, target_N[part, None]).squeeze(1)
            # 0 log 0 is 0: an id that has no logit has a log-probability of minus infinity
            entropy_C1 = -(p_CV * logp_CV.masked_fill_(p_CV == 0, 0.0)).sum(1, keepdim=True)
            entropy_N[part] = entropy_C1.squeeze(1)
            inner = _inner(logits_CV, cap, scale, tau)
            if spread_NH is not None:
                slope_CV = (-p_CV * (logp_CV + entropy_C1) * inner).to(hidden_NH.dtype)
                _pull(slope_CV, weight_VH, kept, spread_NH[part])
            if pull_NH is not None:
                slope_CV = p_CV.neg_()
                slope_CV.scatter_add_(1, target_N[part, None], torch.ones_like(entropy_C1))
                _pull((slope_CV * inner).to(hidden_NH.dtype), weight_VH, kept, pull_NH[part])
        again = wants[1] or (bias_V is not None and wants[2])
        ctx.save_for_backward(pull_NH, spread_NH, *((hidden_NH, weight_VH, bias_V, target_N) if again else (None,) * 4))
        ctx.form, ctx.slopes = form, slopes
        if not slopes:
            ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx, slope_N, spread_N):
        pull_NH, spread_NH, hidden_NH, weight_VH, bias_V, target_N = ctx.saved_tensors
        grad_NH = grad_VH = grad_V = None
        if pull_NH is not None:
            grad_NH = pull_NH * slope_N[:, None].to(pull_NH.dtype)
            if spread_NH is not None:
                grad_NH += spread_NH * spread_N[:, None].to(spread_NH.dtype)
        if hidden_NH is not None:
            chunk, cap, scale, tau, kept = ctx.form
            grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None else None
            for start in range(0, hidden_NH.shape[0], chunk):
                part = slice(start, start + chunk)
                logits_CV, p_CV, logp_CV = _distribution(hidden_NH[part], weight_VH, bias_V, ctx.form)
                total_CV = -p_CV * slope_N[part, None]
                total_CV.scatter_add_(1, target_N[part, None], slope_N[part, None].to(total_CV.dtype))
                if ctx.slopes:
                    logp_CV.masked_fill_(p_CV == 0, 0.0)
                    entropy_C1 = -(p_CV * logp_CV).sum(1, keepdim=True)
                    total_CV -= p_CV * (logp_CV + entropy_C1) * spread_N[part, None]
                total_CV *= _inner(logits_CV, cap, scale, tau)
                if grad_V is not None:
                    grad_V += total_CV.sum(0)
                if grad_VH is not None:
                    rows_CV = total_CV if kept is None else total_CV[:, kept.ids]
                    grad_VH += rows_CV.t() @ hidden_NH[part].float()
            grad_VH = None if grad_VH is None else grad_VH.to(weight_VH.dtype)
            grad_V = None if grad_V is None else grad_V.to(bias_V.dtype)
        return grad_NH, grad_VH, grad_V, None, None, None


def _distribution(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, form: Any) -> tuple[Tensor, ...]:
    """-> logits after scale and soft cap, before the temperature, then in fp32 the probabilities and their logarithms;
    each (C, V)."""
    chunk, cap, scale, tau, kept = form
    if kept is None:
        logits_CV = hidden_CH @ weight_VH.t()
    else:
        logits_CV = kept.fill(hidden_CH, weight_VH, hidden_CH.new_empty(hidden_CH.shape[0], kept.size))
    if bias_V is not None:
        logits_CV += bias_V
    if scale != 1.0:
        logits_CV *= scale
    if cap is not None:
        logits_CV.div_(cap).tanh_().mul_(cap)
    logp_CV = torch.log_softmax(logits_CV.float() / tau if tau != 1.0 else logits_CV, -1, dtype=torch.float32)
    return logits_CV, logp_CV.exp(), logp_CV


def _inner(logits_CV: Tensor, cap: float | None, scale: float, tau: float) -> Tensor | float:
    """d (final logits) / d (x W^T + b), elementwise."""
    factor = scale / tau
    return factor if cap is None else (1 - (logits_CV.float() / cap).square()) * factor


def _pull(slope_CV: Tensor, weight_VH: Tensor, kept: KeptRows | None, out_CH: Tensor) -> None:
    if kept is None:
        torch.mm(slope_CV, weight_VH, out=out_CH)
    else:
        kept.pull(slope_CV, weight_VH, out_CH)


def log_probs(
    hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, bias_V: Tensor | None = None, *, chunk: int | None = None,
    softcap: float | None = None, scale: float = 1.0, temperature: float = 1.0, entropy_gradient: bool = False,
    kept: KeptRows | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> log-probabilities of `target_N` under softmax(cap(scale (hidden W^T + b)) / temperature), and the entropies
    (nats), fp32 (N,) both. Gradients flow to hidden, weight and bias, whichever require them."""
    if chunk is None:
        words = weight_VH.shape[0] if kept is None else kept.size
        chunk = max(64, CHUNK_BYTES // (words * (8 + weight_VH.element_size())) // 64 * 64)
    count = hidden_NH.shape[0]
    hidden_NH, weight_VH, bias_V, target_N = prepared(hidden_NH, weight_VH, bias_V, target_N)
    form = (chunk, softcap, scale, temperature, kept)
    logp_N, entropy_N = _TokenLogProbs.apply(hidden_NH, weight_VH, bias_V, target_N, form, entropy_gradient)
    return logp_N[:count], entropy_N[:count]


class Scored(NamedTuple):
    """`rows`, `columns`: where the selected tokens are in the labels, int64 (N,). `logp`, `entropy`: fp32 (N,).
    `balance`: the router's weighted loss of a mixture of experts, shape (); None without."""

    rows: Tensor
    columns: Tensor
    logp: Tensor
    entropy: Tensor
    balance: Tensor | None


def score_tokens(
    model: PreTrainedModel, inputs: dict[str, Tensor], labels_BT: Tensor, parents_BT: Tensor | None = None, *,
    temperature: float = 1.0, chunk: int | None = None, whole: bool = False, entropy_gradient: bool = False,
) -> Scored:  # fmt: skip
    """The log-probabilities under `model` of the labels other than -100, each after the tokens before it.

    The forward pass ends with the last selected column. `parents_BT`: the column of the token before each one, for rows
    that are trees (prefix_trie.py; default: the column to the left). `whole`: uses all logits of the model's own
    forward; always so if the form of the head is unknown (head.py).
    """
    head, kept = head_and_kept(model, whole)
    if kept is not None and not kept.uses_all():  # an id without a row has no logit
        known = kept.row_of[labels_BT.clamp(min=0)] >= 0
        labels_BT = torch.where(known, labels_BT, -100)
    selected_BT = labels_BT != -100
    if parents_BT is None:  # the first column has nothing before it
        selected_BT = selected_BT & (torch.arange(labels_BT.shape[1], device=labels_BT.device) > 0)
    rows_N, columns_N = selected_BT.nonzero(as_tuple=True)
    target_N = labels_BT[rows_N, columns_N]
    from_N = columns_N - 1 if parents_BT is None else parents_BT[rows_N, columns_N]
    if type(labels_BT) is Tensor and not labels_BT.is_meta:  # a plan's tensors have no values
        inputs = _cut(inputs, int(from_N.max()) + 1 if from_N.numel() else 1)
    if head.linear is None:
        output = model.forward(**inputs, use_cache=False)
        logits_NV = output.logits[rows_N, from_N].float() / temperature
        logp_NV = logits_NV.log_softmax(-1)
        logp_N = logp_NV.gather(1, target_N[:, None]).squeeze(1)
        entropy_N = torch.special.entr(logp_NV.exp()).sum(-1)
        if not entropy_gradient:
            entropy_N = entropy_N.detach()
    else:
        hidden_BTH, output = before_head(model, head.linear, inputs)
        hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).index_select(0, rows_N * hidden_BTH.shape[1] + from_N)
        weight_VH, bias_V, target_N, kept = projection(head, kept, hidden_NH, target_N)
        logp_N, entropy_N = log_probs(
            hidden_NH, weight_VH, target_N, bias_V, chunk=chunk, softcap=head.softcap, scale=head.scale,
            temperature=temperature, entropy_gradient=entropy_gradient, kept=kept,
        )  # fmt: skip
    balance = router_loss(model, output) if torch.is_grad_enabled() else None
    return Scored(rows_N, columns_N, logp_N, entropy_N, balance)


def _cut(inputs: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """The inputs' first columns, `width` rounded up (few widths: see loss.py); of a mask (B, 1, T, T) the first of
    both."""
    width = -(-width // WIDTHS) * WIDTHS
    return {k: v[..., :width, :width] if v.dim() == 4 else v[:, :width] for k, v in inputs.items()}
