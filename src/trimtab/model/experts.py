"""Key-value experts: small two-layer ReLU networks whose weights are rows of a store, each at work on its own tokens.

A row holds `block` records [key | value] of 2 D numbers, drawn at random. Tokens are sorted by expert, and each expert
in work costs a few small dense products on its own tokens, read where its row lies. The functions go by the steps of a
pass: which experts (`by_expert`), what their keys say (`fire`), what their values add (`out`), and the way back
(`back`); the same for all tokens on all pairs that any token chose (`chosen_pairs`, `fire_all`, `back_all`).

T tokens, D hidden size, N experts, B pairs of an expert, P probes, C = P * B candidates, K kept of C, X = T * P pairs
of a token and a probed expert.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..memory.store import VALUES, TieredStore

DEVIATION = 0.02  # of the keys that are drawn
UNLIKE, SKEW = 0.735, 1.1  # of `touched`
QUANTILES = [NormalDist().inv_cdf((at + 0.5) / 32) for at in range(32)]


class Groups(NamedTuple):
    """Experts in work, and for each the tokens it works on and its places in `order`."""

    order: Tensor  # the (token, probe) pairs t * P + p, sorted by expert
    experts: list[int]
    tokens: list[Tensor]
    places: list[slice]
    times: Sequence[float] = ()  # in a plan: how many experts each of these stands for
    store: TieredStore | None = None  # in a plan: where its clock is


def drawn(store: TieredStore, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert's first keys (B, D), one expert at a time: all may be too large."""
    random = torch.Generator().manual_seed(seed)
    for row in range(store.rows):
        yield row, draw_keys(store, random)


def draw_keys(store: TieredStore, random: torch.Generator, around_D: Tensor | None = None) -> Tensor:
    """One expert's keys (B, D), around a direction if one is given."""
    keys_BD = torch.empty(store.shape[0], store.shape[1] // 2).normal_(0, DEVIATION, generator=random)
    if around_D is not None:
        keys_BD += DEVIATION * around_D.to(keys_BD)
    return keys_BD


def write_row(store: TieredStore, row: int, keys_BD: Tensor) -> None:
    """An expert with these keys and no values. One process of several writes it."""
    if store.writes:
        record, width = store.part(VALUES, row), keys_BD.shape[1]
        record[:, :width].copy_(keys_BD)
        record[:, width:].zero_()


def centroid(keys_BD: Tensor) -> Tensor:
    """The mean key, at length 1: a layer-normed h then has scores of about its own root mean square."""
    return normalize(keys_BD.mean(0), dim=0)


def by_expert(probed_TP: Tensor, store: TieredStore, alive_TP: Tensor | None = None) -> Groups:
    """`alive_TP`: which of the pairs there is anything to do for (default: all)."""
    flat = probed_TP.flatten()
    order = flat.argsort(stable=True)
    if alive_TP is not None and not store.planned:
        order = order[alive_TP.flatten()[order]]
        flat = flat[order]
    tokens = order.div(probed_TP.shape[1], rounding_mode="floor")
    if store.planned:
        return _planned(order, tokens, len(probed_TP), store)
    counts = torch.bincount(flat, minlength=store.rows)
    experts = counts.nonzero().flatten()
    sizes = counts[experts].tolist()
    places = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    return Groups(order, experts.tolist(), list(tokens.split(sizes)), places)


def _planned(order: Tensor, tokens: Tensor, most: int, store: TieredStore) -> Groups:
    """For the planner. A bound of the memory: of the experts at work in turn, one may have all tokens (`most`). The
    time of those that are expected to be at work: as many of the mean size."""
    sizes, times = [most], [0.0]
    if store.clock is not None:
        many = touched(store.rows, most, len(order) // most)
        sizes, times = [most, max(1, round(len(order) / many))], [0.0, many]
    return Groups(order, [0], [tokens[:size] for size in sizes], [slice(0, size) for size in sizes], times, store)


def touched(experts: int, tokens: int, probes: int) -> float:
    """How many of the experts a text of so many tokens is expected to probe.

    A router loads experts unevenly: an expert's load is taken to be log-normal, with SKEW as the deviation of its
    logarithm. Tokens of one text are alike: T of them probe what T^UNLIKE would that have nothing in common (the form
    of Heaps' law). Both are fitted to SmolLM2-135M at 1,024 tokens and 8 probes, where of 128, 256, 512, 1,024 and
    2,048 experts the shares 0.93, 0.84, 0.70, 0.54 and 0.35 were probed; they give these within 0.02.
    """
    mean = tokens**UNLIKE * probes / experts
    loads = (mean * math.exp(SKEW * z - SKEW**2 / 2) for z in QUANTILES)
    return max(1.0, experts * sum(1 - math.exp(-load) for load in loads) / len(QUANTILES))


@contextlib.contextmanager
def standing_for(store: TieredStore, times: float) -> Iterator[None]:
    """To the planner's clock, what is done within it is done for so many experts."""
    with store.clock.repeated(times) if store.clock is not None else contextlib.nullcontext():
        yield


def _each(groups: Groups, rows: Sequence[Any], read: float = 1.0) -> Iterator[tuple]:
    """(its item of `rows`, its tokens, its places) for each expert at work; `read`: which share of its row is read."""
    if (store := groups.store) is None:
        yield from zip(rows, groups.tokens, groups.places, strict=True)
        return
    for of, at, times in zip(groups.tokens, groups.places, groups.times, strict=True):
        with standing_for(store, times):
            if store.clock is not None:
                store.clock.moved(read * store.parts[VALUES].nbytes)
            yield rows[0], of, at


def fire(
    h_TD: Tensor, probed_TP: Tensor, gate_TP: Tensor | None, groups: Groups, rows: Sequence[Tensor], kept: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-> a_t of each token's C candidates, zero but for its K largest, and the same in short for the pass back."""
    (tokens, probes), (block, _) = probed_TP.shape, rows[0].shape
    sorted_XB = h_TD.new_empty(tokens * probes, block)
    for row_BD, of, at in _each(groups, rows, read=0.5):
        torch.mm(h_TD[of], row_BD[:, : h_TD.shape[1]].to(h_TD.dtype).T, out=sorted_XB[at])
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
    """What `fire` gave, from its short form."""
    if len(top) == 1:
        return top[0]
    values_TK, index_TK = top
    return values_TK.new_zeros(len(values_TK), candidates).scatter_(1, index_TK.long(), values_TK)


def alive(fired_TC: Tensor, probes: int) -> Tensor:
    """Which of its probed experts have a pair that counts for a token, (T, P)."""
    return (fired_TC > 0).unflatten(1, (probes, -1)).any(-1)


def out(h_TD: Tensor, fired_TC: Tensor, groups: Groups, rows: Sequence[Tensor]) -> Tensor:
    """-> what the values add to each token, (T, D)."""
    sorted_XB = fired_TC.view(-1, rows[0].shape[0])[groups.order] if rows else fired_TC
    out_TD = torch.zeros_like(h_TD)
    for row_BD, of, at in _each(groups, rows, read=0.5):
        out_TD.index_add_(0, of, sorted_XB[at] @ row_BD[:, h_TD.shape[1] :].to(h_TD.dtype))
    return out_TD


def back(
    h_TD: Tensor, grad_TD: Tensor, grad_h: Tensor | None, fired_TC: Tensor, gate_TP: Tensor | None, groups: Groups,
    store: TieredStore,
) -> Tensor:  # fmt: skip
    """The rows' gradients into the store, that of h into `grad_h`; -> that of a_t before the ReLU, (T, C)."""
    D = h_TD.shape[1]
    sorted_XB = fired_TC.view(-1, store.shape[0])[groups.order]
    gates_X = None if gate_TP is None else gate_TP.flatten()[groups.order].unsqueeze(1)
    grad_XB = torch.empty_like(sorted_XB)
    grad_BD = h_TD.new_empty(store.shape)
    if store.planned:
        store.asked = len(h_TD), len(groups.order) // len(h_TD)
    held = list(zip(groups.experts, store.fetch(groups.experts), strict=True))
    for (row, row_BD), of, at in _each(groups, held):
        record_BD, h_tD, grad_tD, fired_tB = row_BD.to(h_TD.dtype), h_TD[of], grad_TD[of], sorted_XB[at]
        torch.mm(fired_tB.T, grad_tD, out=grad_BD[:, D:])
        grad_tB = torch.mm(grad_tD, record_BD[:, D:].T, out=grad_XB[at]).mul_(fired_tB > 0)
        if gates_X is not None:
            grad_tB = grad_tB * gates_X[at]
        torch.mm(grad_tB.T, h_tD, out=grad_BD[:, :D])
        store.accumulate([row], [grad_BD])
        if grad_h is not None:
            grad_h.index_add_(0, of, grad_tB @ record_BD[:, :D])
    return torch.zeros_like(fired_TC).view(-1, store.shape[0]).index_copy_(0, groups.order, grad_XB).view_as(fired_TC)


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
    D = h_TD.shape[1]
    experts = [0] if store.planned else pairs_NB.any(1).nonzero().flatten().tolist()
    grad_BD = h_TD.new_empty(store.shape)
    for row, row_BD in zip(experts, store.fetch(experts), strict=True):
        record_BD, fired_TB = row_BD.to(h_TD.dtype), fire_all(h_TD, row_BD, pairs_NB[row])
        torch.mm(fired_TB.T, grad_TD, out=grad_BD[:, D:])
        grad_TB = (grad_TD @ record_BD[:, D:].T).mul_(fired_TB > 0)
        torch.mm(grad_TB.T, h_TD, out=grad_BD[:, :D])
        store.accumulate([row], [grad_BD])
        if grad_h is not None:
            grad_h.addmm_(grad_TB, record_BD[:, :D])
