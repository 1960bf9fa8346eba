"""Key-value experts: small two-layer ReLU networks whose weights are rows of a store, each applied to its own tokens.

A row has `block` pairs [key | value] of 2 D values; initial keys are random. Tokens are grouped by expert
(`TieredStore.group`), and each expert in use costs a few small dense products on its own tokens, with its row where it
lies; tokens are gathered, and outputs added up, for a chunk of experts at a time. The steps of a layer are: scores from
keys (`fire`), outputs from values (`out`), and the backward pass (`back`). `chosen_pairs`, `fire_all` and `back_all` do
the same for all tokens on all pairs that any token chose.

T tokens, D hidden size, N experts, B pairs of an expert, P probes, C = P * B candidates, K kept of C, X = T * P pairs
of a token and a probed expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...tiered.groups import Groups
from ...tiered.store import GRADS, VALUES, Rows, TieredStore

DEVIATION = 0.02  # of initial keys


def initial_keys(experts: int, block: int, width: int, seed: int) -> Iterator[Tensor]:
    """Each expert's keys before training, (B, D), one expert at a time: all may be too large."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(experts):
        yield draw_keys(block, width, random)


def initial_rows(experts: int, block: int, width: int, seed: int) -> Iterator[Tensor]:
    """Each expert's row before training, (B, 2 D): random keys, and values of zero."""
    return map(row_of, initial_keys(experts, block, width, seed))


def initial_centroids(experts: int, block: int, width: int, seed: int) -> Iterator[Tensor]:
    """Each expert's row of a trained router before training, (D,)."""
    return map(centroid, initial_keys(experts, block, width, seed))


def draw_keys(block: int, width: int, random: torch.Generator, around_D: Tensor | None = None) -> Tensor:
    """One expert's random keys (B, D), around a direction if one is given."""
    keys_BD = torch.empty(block, width).normal_(0, DEVIATION, generator=random)
    if around_D is not None:
        keys_BD += DEVIATION * around_D.to(keys_BD)
    return keys_BD


def row_of(keys_BD: Tensor) -> Tensor:
    """An expert with these keys, and values of zero, (B, 2 D)."""
    return torch.cat([keys_BD, torch.zeros_like(keys_BD)], 1)


def centroid(keys_BD: Tensor) -> Tensor:
    """The mean key, normalised to length 1: the scores of a layer-normed h are then about its root mean square."""
    return normalize(keys_BD.mean(0), dim=0)


def cut(rows: Rows, part: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The keys or the values of each row, or their transposes: views, or copies if the precision differs."""
    if len(rows) and rows[0].dtype != dtype:
        return [part(row_BD.to(dtype)) for row_BD in rows]
    return rows.views(part)


def fire(
    h_TD: Tensor, gate_TP: Tensor | None, groups: Groups, rows: Rows, kept: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-> a_t of each token's C candidates, zero except for its K largest; and its compact form for the backward
    pass."""
    (tokens, probes), block, width = groups.shape, groups.store.shape[0], h_TD.shape[1]
    sorted_XB = h_TD.new_empty(tokens * probes, block)
    keys_DB = cut(rows, lambda row: row[..., :width].mT, h_TD.dtype)
    for chunk in groups.chunks():
        h_XD = h_TD.index_select(0, chunk.tokens)
        for key_DB, h_tD, fired_tB in chunk.each(keys_DB[chunk.first :], h_XD, sorted_XB[chunk.at]):
            torch.mm(h_tD, key_DB, out=fired_tB)
        del h_XD, h_tD  # before the next chunk's are made
    fired_TPB = torch.empty_like(sorted_XB).index_copy_(0, groups.order, sorted_XB).view(tokens, probes, block)
    if gate_TP is not None:
        fired_TPB.mul_(gate_TP.unsqueeze(-1))
    fired_TC = fired_TPB.relu_().flatten(1)
    if kept == fired_TC.shape[1]:
        return fired_TC, (fired_TC,)
    values_TK, index_TK = fired_TC.topk(kept, sorted=False)
    top = (values_TK, index_TK.to(torch.int16 if fired_TC.shape[1] < 2**15 else torch.int32))
    return fired_TC.zero_().scatter_(1, index_TK, values_TK), top


def spread(top: Sequence[Tensor], candidates: int) -> Tensor:
    """a_t (T, C) from the compact form that `fire` returns."""
    if len(top) == 1:
        return top[0]
    values_TK, index_TK = top
    return values_TK.new_zeros(len(values_TK), candidates).scatter_(1, index_TK.long(), values_TK)


def alive(fired_TC: Tensor, probes: int) -> Tensor:
    """Which of a token's probed experts have a pair that fired, (T, P)."""
    return (fired_TC > 0).unflatten(1, (probes, -1)).any(-1)


def out(h_TD: Tensor, fired_TC: Tensor, groups: Groups, rows: Rows) -> Tensor:
    """-> the sum of each token's values, weighted by a_t, (T, D)."""
    width, out_TD = h_TD.shape[1], torch.zeros_like(h_TD)
    sorted_XB = fired_TC.view(-1, groups.store.shape[0]).index_select(0, groups.order)
    values_BD = cut(rows, lambda row: row[..., width:], h_TD.dtype)
    for chunk in groups.chunks():
        out_XD = h_TD.new_empty(len(chunk.tokens), width)
        for value_BD, fired_tB, out_tD in chunk.each(values_BD[chunk.first :], sorted_XB[chunk.at], out_XD):
            torch.mm(fired_tB, value_BD, out=out_tD)
        out_TD.index_add_(0, chunk.tokens, out_XD)
        del out_XD, out_tD
    return out_TD


def back(
    h_TD: Tensor, grad_TD: Tensor, grad_h: Tensor | None, fired_TC: Tensor, gate_TP: Tensor | None, groups: Groups
) -> Tensor:
    """Accumulates the rows' gradients in the store, and that of h in `grad_h`; -> the gradient of a_t before the ReLU,
    (T, C)."""
    store, D = groups.store, h_TD.shape[1]
    sorted_XB = fired_TC.view(-1, store.shape[0]).index_select(0, groups.order)
    gates_X = None if gate_TP is None else gate_TP.flatten()[groups.order].unsqueeze(1)
    all_XB = torch.empty_like(sorted_XB)
    grads_EBD = h_TD.new_empty(groups.chunk_rows, *store.shape)
    of_keys_BD, of_values_BD = grads_EBD[..., :D].unbind(), grads_EBD[..., D:].unbind()
    rows = store.fetch(groups.rows, (VALUES, GRADS))
    keys_BD = cut(rows, lambda row: row[..., :D], h_TD.dtype)
    values_DB = cut(rows, lambda row: row[..., D:].mT, h_TD.dtype)

    def back_through(chunk: Groups) -> None:  # a function, so that one chunk's tensors are freed before the next one's
        h_XD, grad_XD = h_TD.index_select(0, chunk.tokens), grad_TD.index_select(0, chunk.tokens)
        fired_XB, grad_XB = sorted_XB[chunk.at], all_XB[chunk.at]
        values = zip(values_DB[chunk.first :], of_values_BD, strict=False)
        parts = chunk.each(values, grad_XB, grad_XD, turned_YX=[fired_XB.T])
        for (value_DB, of_BD), grad_tB, grad_tD, fired_Bt in parts:
            torch.mm(fired_Bt, grad_tD, out=of_BD)
            torch.mm(grad_tD, value_DB, out=grad_tB)
        grad_XB.mul_(fired_XB > 0)
        gated_XB = grad_XB if gates_X is None else grad_XB * gates_X[chunk.at]
        keys = zip(keys_BD[chunk.first :], of_keys_BD, strict=False)
        parts = chunk.each(keys, gated_XB, h_XD, grad_XD, turned_YX=[gated_XB.T])
        for (key_BD, of_BD), gated_tB, h_tD, grad_tD, gated_Bt in parts:
            torch.mm(gated_Bt, h_tD, out=of_BD)
            if grad_h is not None:
                torch.mm(gated_tB, key_BD, out=grad_tD)
        chunk.accumulate(grads_EBD)
        if grad_h is not None:
            grad_h.index_add_(0, chunk.tokens, grad_XD)

    for chunk in groups.chunks():
        back_through(chunk)
    return torch.zeros_like(fired_TC).view(-1, store.shape[0]).index_copy_(0, groups.order, all_XB).view_as(fired_TC)


# --- all tokens on the pairs that any of them chose -----------------------------------------------------------------


def chosen_pairs(probed_TP: Tensor, fired_TC: Tensor, store: TieredStore) -> Tensor:
    """Which pairs are among the K best of any token, (N, B)."""
    block = store.shape[0]
    pair_TC = (probed_TP.unsqueeze(-1) * block + torch.arange(block, device=fired_TC.device)).flatten(1)
    counts = torch.zeros(store.rows * block, dtype=torch.int32, device=fired_TC.device)
    counts.index_add_(0, pair_TC.flatten(), (fired_TC > 0).to(torch.int32).flatten())
    return (counts > 0).view(store.rows, block)


def fire_all(h_TD: Tensor, row_BD: Tensor, pairs_B: Tensor) -> Tensor:
    return (h_TD @ row_BD[:, : h_TD.shape[1]].to(h_TD.dtype).T).relu_().mul_(pairs_B)


def back_all(h_TD: Tensor, grad_TD: Tensor, grad_h: Tensor | None, pairs_NB: Tensor, store: TieredStore) -> None:
    D, experts = h_TD.shape[1], store.marked(pairs_NB.any(1))
    grad_BD = h_TD.new_empty(store.shape)
    for expert, row_BD in zip(experts, store.fetch(experts, (VALUES, GRADS)), strict=True):
        pairs_BD, fired_TB = row_BD.to(h_TD.dtype), fire_all(h_TD, row_BD, pairs_NB[expert])
        torch.mm(fired_TB.T, grad_TD, out=grad_BD[:, D:])
        grad_TB = (grad_TD @ pairs_BD[:, D:].T).mul_(fired_TB > 0)
        torch.mm(grad_TB.T, h_TD, out=grad_BD[:, :D])
        store.accumulate([expert], [grad_BD])
        if grad_h is not None:
            grad_h.addmm_(grad_TB, pairs_BD[:, :D])
