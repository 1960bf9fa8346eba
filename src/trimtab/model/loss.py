"""Chunked cross-entropy: the loss of a language-model head without the full logits.

For N counted positions and a vocabulary of V, full logits are several tensors of N x V (logits, their fp32 copy,
softmax, gradient): about 0.5 GB for 1,024 tokens of SmolLM2 (V = 49,152). Here a chunk of positions at a time is
projected, turned into its loss *and* its gradient with respect to the hidden state, and freed. Only one (N, H) gradient
remains. This takes two matrix products per chunk instead of the three of a recomputing head. Nothing is computed for
masked positions, and a frozen head gets no gradient buffer.

A head may hold only some rows of its vocabulary (model/kept_rows.py). Then the loss is over those only, or over all:
the logits of the other ids, and their part of the hidden state's gradient, come from the slow tier by blocks.

Two of TRL's variants are supported: label smoothing, (1 - e) (lse - z_y) + e (lse - mean z), with gradient
p - (1 - e) 1_y - e / V; and DFT (arXiv 2508.05629), p_y (lse - z_y) with p_y constant, with gradient p_y (p - 1_y).

On a CPU oneDNN caches code for each number of rows of a 16-bit product (docs/LOG.md), and N differs in each batch: N is
rounded up to a multiple of 64 there, with rows that do not count.

A target may also be a distribution q over K tokens: lse - sum_k q_k z_k, with gradient p - q (`soft`).

Legend: N positions that count, C of them in a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import BadInput
from .head import Head, before_head, head_of, router_loss
from .kept_rows import KEPT, KeptRows

SOFT = ("soft_ids", "soft_shares")  # keys of a batch: `soft` of `next_token_loss`
ROWS = 64
CHUNK_BYTES = 48 * 2**20  # of logits and their fp32 softmax, per chunk; below 128 positions the GEMMs get slow


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, target_N, chunk, cap, scale, smoothing, dft, counted, kept, soft):
        wants = ctx.needs_input_grad
        grad_NH = torch.empty_like(hidden_NH) if wants[0] else None
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants[1] else None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and wants[2] else None
        loss = hidden_NH.new_zeros((), dtype=torch.float32)
        correct = hidden_NH.new_zeros((), dtype=torch.int64)
        # two buffers for all chunks; no other tensor is that large
        shape = (min(chunk, hidden_NH.shape[0]), weight_VH.shape[0] if kept is None else kept.size)
        logits = hidden_NH.new_empty(shape)
        probabilities = hidden_NH.new_empty(shape, dtype=torch.float32)
        for start in range(0, hidden_NH.shape[0], chunk):
            hidden_CH, target_C1 = hidden_NH[start : start + chunk], target_N[start : start + chunk, None]
            logits_CV = logits[: hidden_CH.shape[0]]
            if kept is None:
                torch.mm(hidden_CH, weight_VH.t(), out=logits_CV)
            else:
                kept.fill(hidden_CH, weight_VH, logits_CV)
            if bias_V is not None:
                logits_CV += bias_V
            if scale != 1.0:
                logits_CV *= scale
            if cap is not None:  # logits <- cap * tanh(logits / cap)
                logits_CV.div_(cap).tanh_().mul_(cap)
            top_C1, argmax_C1 = logits_CV.max(-1, keepdim=True)
            live = min(max(counted - start, 0), hidden_CH.shape[0])  # rows after these are padding
            if soft is None:
                at_CK, share_CK = target_C1, torch.ones_like(target_C1, dtype=torch.float32)
            else:
                at_CK, share_CK = (part[start : start + chunk] for part in soft)
            wanted_C1 = logits_CV.gather(1, at_CK).float().mul_(share_CK).sum(1, keepdim=True)
            probability_CV = probabilities[: hidden_CH.shape[0]].copy_(logits_CV)
            torch.softmax(probability_CV, -1, out=probability_CV)
            # log-sum-exp from the largest probability, which is never tiny: lse = max - log p(argmax)
            lse_C1 = top_C1.float() - probability_CV.gather(1, argmax_C1).log_()
            loss_C1 = lse_C1 - wanted_C1
            if smoothing:
                loss_C1 = loss_C1 + smoothing * (wanted_C1 - logits_CV.mean(-1, keepdim=True, dtype=torch.float32))
            weight_C1 = torch.exp(-loss_C1) if dft else torch.ones_like(loss_C1)
            loss += (weight_C1 * loss_C1)[:live].sum()
            correct += (argmax_C1 == target_C1)[:live].sum()
            if not any(wants[:3]):
                continue
            probability_CV.scatter_add_(1, at_CK, share_CK * (smoothing - 1.0))
            if smoothing:
                probability_CV.sub_(smoothing / probability_CV.shape[1])
            if dft:
                probability_CV.mul_(weight_C1)
            probability_CV[live:] = 0.0
            if cap is not None:
                probability_CV.mul_(1 - (logits_CV.float() / cap).square_())
            if scale != 1.0:
                probability_CV.mul_(scale)
            slope_CV = logits_CV.copy_(probability_CV)  # d loss / d logits, in the logits' own memory
            if grad_V is not None:
                grad_V += slope_CV.sum(0, dtype=torch.float32)
            if kept is not None:
                into = torch.empty_like(hidden_CH) if grad_NH is None else grad_NH[start : start + chunk]
                slope_CV = kept.pull(slope_CV, weight_VH, into)
            elif grad_NH is not None:
                torch.mm(slope_CV, weight_VH, out=grad_NH[start : start + chunk])
            if grad_VH is not None:
                grad_VH += slope_CV.t() @ hidden_CH
        ctx.save_for_backward(grad_NH, grad_VH, grad_V)
        ctx.weight_dtype = weight_VH.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, slope, _):
        grad_NH, grad_VH, grad_V = ctx.saved_tensors
        scaled = [None if g is None else g * slope.to(g.dtype) for g in (grad_NH, grad_VH, grad_V)]
        if scaled[1] is not None:
            scaled[1] = scaled[1].to(ctx.weight_dtype)
        if scaled[2] is not None:
            scaled[2] = scaled[2].to(ctx.weight_dtype)
        return (*scaled, *[None] * 9)


def chunked_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    chunk: int | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    smoothing: float = 0.0,
    dft: bool = False,
    kept: KeptRows | None = None,
    soft: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """-> (summed cross-entropy (nats) of `target_N` under softmax(cap(scale * (hidden W^T + b))), correct argmaxes).

    `chunk`: positions projected at once (default: `CHUNK_BYTES` worth). Gradients flow to hidden, weight and bias,
    whichever require them. Second derivatives are not supported. `smoothing`: of labels, in [0, 1); `dft`: each
    position is weighted by its target's probability. `kept`: `weight_VH` has only these rows, and the softmax is over
    all; targets and bias are those of all. `soft`: tokens (N, K), int64, and their shares (N, K), fp32, whose sum is 1
    for each position: the loss is against them, and `target_N` only counts argmaxes.
    """
    if chunk is None:
        words = weight_VH.shape[0] if kept is None else kept.size
        chunk = max(128, CHUNK_BYTES // (words * (4 + weight_VH.element_size())) // 64 * 64)
    counted = hidden_NH.shape[0]
    hidden_NH, weight_VH, bias_V, target_N = prepared(hidden_NH, weight_VH, bias_V, target_N)
    if soft is not None and (more := hidden_NH.shape[0] - counted):
        soft = (F.pad(soft[0], (0, 0, 0, more)), F.pad(soft[1], (0, 0, 0, more)))
    return _ChunkedCrossEntropy.apply(
        hidden_NH, weight_VH, bias_V, target_N, chunk, softcap, scale, smoothing, dft, counted, kept, soft
    )


def prepared(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The inputs of a head's chunked Function: in one precision, and with as many rows as its products need."""
    if torch.is_autocast_enabled(hidden_NH.device.type):  # here, not inside: products with `out=` ignore autocast
        hidden_NH = hidden_NH.to(torch.get_autocast_dtype(hidden_NH.device.type))
    weight_VH = weight_VH.to(hidden_NH.dtype)
    if not torch.is_grad_enabled():  # a Function is told that trainable inputs need gradients even then
        hidden_NH, weight_VH = hidden_NH.detach(), weight_VH.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    if hidden_NH.device.type == "cpu" and hidden_NH.element_size() == 2 and (more := -hidden_NH.shape[0] % ROWS):
        hidden_NH, target_N = F.pad(hidden_NH, (0, 0, 0, more)), F.pad(target_N, (0, more))
    return hidden_NH, weight_VH, bias_V, target_N


def head_and_kept(model: PreTrainedModel, whole: bool) -> tuple[Head, KeptRows | None]:
    """The head of `model`, and the rows that it holds if not all. `whole`: without a known form, as where the form is
    unknown."""
    head = Head() if whole else head_of(model)
    kept: KeptRows | None = getattr(head.linear, KEPT, None)
    return (Head(), None) if kept is not None and head.words is not None else (head, kept)


def projection(
    head: Head, kept: KeptRows | None, rows_NH: Tensor, target_N: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, KeptRows | None]:
    """-> weight, bias and targets for a chunked Function on the rows, and the kept rows if it has to know them."""
    assert head.linear is not None, "a head of unknown form has no weight"
    weight_VH, bias_V = head.linear.weight, head.linear.bias
    if head.words is not None:
        weight_VH, bias_V = weight_VH[: head.words], None if bias_V is None else bias_V[: head.words]
    if kept is not None and kept.plain_for(rows_NH):
        return kept.cold, bias_V, target_N, None
    if kept is not None and not kept.uses_all():
        return weight_VH, None if bias_V is None else bias_V[kept.ids], kept.row_of[target_N].long(), None
    return weight_VH, bias_V, target_N, kept


def next_token_loss(
    model: PreTrainedModel, inputs: dict[str, Tensor], labels_BT: Tensor, count: Tensor | int | None = None,
    chunk: int | None = None, whole: bool = False, smoothing: float = 0.0, dft: bool = False,
    soft: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> mean loss over the counted next tokens (shape ()), how many the argmax predicted, how many there are.

    Runs the model's own forward up to its last linear, drops the positions whose next label is -100, and projects only
    the rest. `count`: the number of tokens that the whole optimizer step averages over (default: those of this batch).
    `smoothing`, `dft`: as in `chunked_cross_entropy`. `whole`: uses all logits at once, from the model's own forward;
    always so if the form of the head is unknown (head.py). `soft`: targets as in `chunked_cross_entropy`, (B, T, K)
    each, of the tokens at the labels' places.

    With gradients, the router's loss of a mixture of experts is added if its config sets `output_router_logits`. With
    gradient accumulation, each batch's is weighted by its share of the counted tokens, so that the step has their mean.
    """
    head, kept = head_and_kept(model, whole)
    target_N = labels_BT[:, 1:].reshape(-1)
    if kept is not None and not kept.uses_all():  # an id without a row has no logit
        target_N = torch.where(kept.row_of[target_N.clamp(min=0)] >= 0, target_N, -100)
    keep_N = (target_N != -100).nonzero().squeeze(1)
    if soft is not None:
        if kept is not None:
            have = "the head holds some rows of its vocabulary only"
            raise BadInput("a loss against probabilities", have, "Rehearse text: rehearsal: {keep: text}")
        soft = (soft[0][:, 1:].flatten(0, 1), soft[1][:, 1:].flatten(0, 1))
    if head.linear is None:
        output = model.forward(**inputs, use_cache=False)
        rows_BTX = output.logits
    else:
        rows_BTX, output = before_head(model, head.linear, inputs)
    rows_NX = rows_BTX[:, :-1].reshape(-1, rows_BTX.shape[-1])
    if keep_N.numel() < target_N.numel():
        rows_NX, target_N = rows_NX.index_select(0, keep_N), target_N[keep_N]
        soft = None if soft is None else (soft[0][keep_N], soft[1][keep_N])
    if head.linear is None:
        loss_N = _cross_entropy(rows_NX.float(), target_N, smoothing, soft)
        total = (loss_N * torch.exp(-loss_N.detach()) if dft else loss_N).sum()
        correct = (rows_NX.argmax(-1) == target_N).sum()
    else:
        weight_VH, bias_V, target_N, kept = projection(head, kept, rows_NX, target_N)
        total, correct = chunked_cross_entropy(
            rows_NX, weight_VH, target_N, bias_V, chunk=chunk, softcap=head.softcap, scale=head.scale,
            smoothing=smoothing, dft=dft, kept=kept, soft=soft,
        )  # fmt: skip
    seen = torch.as_tensor(target_N.numel(), device=total.device)
    divisor = seen if count is None else torch.as_tensor(count, device=total.device)
    loss = total / divisor.clamp(min=1)
    if torch.is_grad_enabled() and (balance := router_loss(model, output)) is not None:
        loss = loss + balance * (1.0 if count is None else seen / divisor.clamp(min=1))
    return loss, correct, seen


def _cross_entropy(logits_NV: Tensor, target_N: Tensor, smoothing: float, soft: tuple[Tensor, Tensor] | None) -> Tensor:
    """The loss of each position, from its logits (N,)."""
    if soft is None:
        return F.cross_entropy(logits_NV, target_N, reduction="none", label_smoothing=smoothing)
    logp_NV = logits_NV.log_softmax(-1)
    loss_N = -(logp_NV.gather(1, soft[0]) * soft[1]).sum(-1)
    return (1 - smoothing) * loss_N - smoothing * logp_NV.mean(-1)


def rows_that_count(
    model: PreTrainedModel, inputs: dict[str, Tensor], labels_BT: Tensor, whole: bool
) -> tuple[Head, Tensor, Tensor]:
    """-> the head, of no known form with `whole`; the positions of labels[:, 1:] that count, flat, int64 (N,); and what
    the head reads at each, (N, H), or its logits (N, V) if its form is unknown."""
    head = Head() if whole else head_of(model)
    keep_N = (labels_BT[:, 1:].reshape(-1) != -100).nonzero().squeeze(1)
    if head.linear is None:
        rows_BTX = model.forward(**inputs, use_cache=False).logits
    else:
        rows_BTX, _ = before_head(model, head.linear, inputs)
    return head, keep_N, rows_BTX[:, :-1].flatten(0, 1).index_select(0, keep_N)


@torch.no_grad()
def predictions(
    model: PreTrainedModel, inputs: dict[str, Tensor], labels_BT: Tensor, whole: bool = False, chunk: int = 128
) -> tuple[Tensor, Tensor]:
    """-> the positions of labels[:, 1:] that count, flat, int64 (N,), and the most probable token at each."""
    head, keep_N, rows_NX = rows_that_count(model, inputs, labels_BT, whole)
    if head.linear is None:
        return keep_N, rows_NX.argmax(-1)
    # a positive scale and a soft cap leave the order of the logits as it is
    parts = [head.linear(hidden_CH)[:, : head.words].argmax(-1) for hidden_CH in rows_NX.split(chunk)]
    return keep_N, torch.cat(parts) if parts else keep_N
