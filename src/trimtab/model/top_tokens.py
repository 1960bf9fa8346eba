"""The k most probable next tokens of a model at the labels of a batch, in few bytes.

A log-probability takes one byte: -16 log p, rounded, at most 255 (an error of at most 1/32, down to p = 1.2e-7). Read
back, the k probabilities are scaled to a sum of 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .head import head_of
from .kept_rows import KEPT
from .loss import rows_that_count

STEPS = 16  # of a log-probability in one nat
CHUNK = 128  # positions


class Top(NamedTuple):
    """Of the labels that count, in their order: `ids` (C, k), `logs` (C, k) in 1/16 nat, `loss` (C,) in nats, and the
    `rows` of the batch that they are in (C,)."""

    ids: numpy.ndarray
    logs: numpy.ndarray
    loss: numpy.ndarray
    rows: numpy.ndarray


@torch.no_grad()
def top_tokens(model: PreTrainedModel, inputs: dict[str, Tensor], labels_BT: Tensor, k: int, whole: bool) -> Top:
    """The k most probable tokens at each label of `labels_BT[:, 1:]` other than -100, and that label's loss. k may
    be 0. `whole`: from all logits at once, for a head of unknown form."""
    whole = whole or getattr(head_of(model).linear, KEPT, None) is not None
    head, keep_N, rows_NX = rows_that_count(model, inputs, labels_BT, whole)
    target_N = labels_BT[:, 1:].reshape(-1)[keep_N]
    parts = []
    for rows_CX, target_C in zip(rows_NX.split(CHUNK), target_N.split(CHUNK), strict=True):
        logits_CV = rows_CX.float()
        if head.linear is not None:
            logits_CV = head.linear(rows_CX)[:, : head.words].float() * head.scale
            if head.softcap is not None:
                logits_CV = head.softcap * torch.tanh(logits_CV / head.softcap)
        logp_CV = logits_CV.log_softmax(-1)
        best = logp_CV.topk(min(k, logp_CV.shape[1]), dim=-1)
        logs = (-STEPS * best.values).round().clamp(0, 255).to(torch.uint8)
        parts.append((best.indices, logs, -logp_CV.gather(1, target_C[:, None]).squeeze(1)))
    ids, logs, loss = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return Top(ids.astype(numpy.uint32), logs, loss, (keep_N // (labels_BT.shape[1] - 1)).cpu().numpy())


def shares(logs_CK: numpy.ndarray) -> numpy.ndarray:
    """The probabilities (C, k), fp32, with a sum of 1 in each row."""
    p = numpy.exp(-logs_CK.astype(numpy.float32) / STEPS)
    return p / p.sum(-1, keepdims=True)
