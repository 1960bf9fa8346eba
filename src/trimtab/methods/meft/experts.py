"""Key-value experts: small two-layer ReLU networks whose weights are rows of a store, each at work on its own tokens.

A row holds `block` records [key | value] of 2 D numbers, drawn at random. Tokens are sorted by expert, and each expert
in work costs a few small dense products on its own tokens, with its row where it lies; tokens are gathered, and what
comes of them is added up, for a chunk of experts at a time. The functions go by the steps of a
pass: which experts (`by_expert`), what their keys say (`fire`), what their values add (`out`), and the way back
(`back`); the same for all tokens on all pairs that any token chose (`chosen_pairs`, `fire_all`, `back_all`).

T tokens, D hidden size, N experts, B pairs of an expert, P probes, C = P * B candidates, K kept of C, X = T * P pairs
of a token and a probed expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...tiered.expected import expected_rows
from ...tiered.store import GRADS, VALUES, Rows, TieredStore

DEVIATION = 0.02  # of the keys that are drawn
FEW = 16  # experts, or pairs, that are worth a gather


class Chunk(NamedTuple):
    """Experts in work at once, the tokens (X,) of all their pairs and the pairs' places in the groups' order."""

    first: int  # of the groups' experts
    experts: list[int]
    sizes: list[int]
    tokens: Tensor
    at: slice
    planned: TieredStore | None = None  # of a plan, in which its first expert stands for all

    def each(self, rows: Iterable[Any], *parts_XY: Tensor, turned_YX: Sequence[Tensor] = ()) -> Iterator[tuple]:
        """For each expert its item of `rows`, which begin with this chunk's, and its tokens' rows of `parts`, or its
        tokens' columns of those that are turned."""
        if self.planned is None:
            parts = *(part.split(self.sizes) for part in parts_XY), *(part.split(self.sizes, 1) for part in turned_YX)
            yield from zip(islice(rows, len(self.sizes)), *parts, strict=True)
            return
        first = *(part[: self.sizes[0]] for part in parts_XY), *(part[:, : self.sizes[0]] for part in turned_YX)
        with standing_for(self.planned, len(self.sizes)):
            yield next(iter(rows)), *first


class Groups(NamedTuple):
    """Experts in work, and how many tokens each works on."""

    order: Tensor  # the (token, probe) pairs t * P + p, sorted by expert
    experts: list[int]
    sizes: list[int]
    tokens: Tensor  # of each of the sorted pairs

    def chunks(self, store: TieredStore, tokens: int) -> Iterator[Chunk]:
        """The experts a few at a time: no more pairs than tokens, and no more experts than `room`, in work at once."""
        if store.planned:
            yield from self._planned(store, tokens)
            return
        most, pairs, first, start = room(store, tokens), max(tokens, FEW), 0, 0
        while first < len(self.experts):
            last, end = first + 1, start + self.sizes[first]
            while last < len(self.experts) and last - first < most and end + self.sizes[last] - start <= pairs:
                end += self.sizes[last]
                last += 1
            at = slice(start, end)
            yield Chunk(first, self.experts[first:last], self.sizes[first:last], self.tokens[at], at)
            first, start = last, end

    def _planned(self, store: TieredStore, tokens: int) -> Iterator[Chunk]:
        """For the planner. A bound of the memory: of the experts at work in turn, one may have all tokens. The time of
        those that are expected to be at work: as many of the mean size."""
        bound = Chunk(0, [0], [tokens], self.tokens[:tokens], slice(0, tokens), store)
        with standing_for(store, 0.0):
            yield bound
        if store.clock is None:
            return
        many = expected_rows(store, tokens, len(self.order) // tokens)
        size = max(1, round(len(self.order) / many))
        few = max(1, min(room(store, tokens), max(tokens, FEW) // size, round(many)))
        at = slice(0, few * size)
        with standing_for(store, many / few):
            store.clock.moved(few * store.parts[VALUES].nbytes / 2)  # the rows' keys or values, from where they lie
            yield Chunk(0, [0] * few, [size] * few, self.tokens[at], at, store)


def room(store: TieredStore, tokens: int) -> int:
    """Experts whose gradients together are no larger than the tokens' h, or a few."""
    return min(store.rows, max(FEW, tokens // (2 * store.shape[0])))


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
        store.put(VALUES, [row], [torch.cat([keys_BD, torch.zeros_like(keys_BD)], 1)])


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
        return Groups(order, [0], [], tokens)
    counts = torch.bincount(flat, minlength=store.rows)
    experts = counts.nonzero().flatten()
    return Groups(order, experts.tolist(), counts[experts].tolist(), tokens)


@contextlib.contextmanager
def standing_for(store: TieredStore, times: float) -> Iterator[None]:
    """To the planner's clock, what is done within it is done for so many experts."""
    with store.clock.repeated(times) if store.clock is not None else contextlib.nullcontext():
        yield


def cut(rows: Rows, part: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The keys or the values of each row, or these turned: views of them, or copies where the precision is another."""
    if len(rows) and rows[0].dtype != dtype:
        return [part(row_BD.to(dtype)) for row_BD in rows]
    return rows.views(part)


def fire(
    h_TD: Tensor, probed_TP: Tensor, gate_TP: Tensor | None, groups: Groups, rows: Rows, store: TieredStore, kept: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-> a_t of each token's C candidates, zero but for its K largest, and the same in short for the pass back."""
    (tokens, probes), block, width = probed_TP.shape, store.shape[0], h_TD.shape[1]
    sorted_XB = h_TD.new_empty(tokens * probes, block)
    keys_DB = cut(rows, lambda row: row[..., :width].mT, h_TD.dtype)
    for chunk in groups.chunks(store, tokens):
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
    """What `fire` gave, from its short form."""
    if len(top) == 1:
        return top[0]
    values_TK, index_TK = top
    return values_TK.new_zeros(len(values_TK), candidates).scatter_(1, index_TK.long(), values_TK)


def alive(fired_TC: Tensor, probes: int) -> Tensor:
    """Which of its probed experts have a pair that counts for a token, (T, P)."""
    return (fired_TC > 0).unflatten(1, (probes, -1)).any(-1)


def out(h_TD: Tensor, fired_TC: Tensor, groups: Groups, rows: Rows, store: TieredStore) -> Tensor:
    """-> what the values add to each token, (T, D)."""
    (tokens, width), out_TD = h_TD.shape, torch.zeros_like(h_TD)
    sorted_XB = fired_TC.view(-1, store.shape[0]).index_select(0, groups.order)
    values_BD = cut(rows, lambda row: row[..., width:], h_TD.dtype)
    for chunk in groups.chunks(store, tokens):
        out_XD = h_TD.new_empty(len(chunk.tokens), width)
        for value_BD, fired_tB, out_tD in chunk.each(values_BD[chunk.first :], sorted_XB[chunk.at], out_XD):
            torch.mm(fired_tB, value_BD, out=out_tD)
        out_TD.index_add_(0, chunk.tokens, out_XD)
        del out_XD, out_tD
    return out_TD


def back(
    h_TD: Tensor, grad_TD: Tensor, grad_h: Tensor | None, fired_TC: Tensor, gate_TP: Tensor | None, groups: Groups,
    store: TieredStore,
) -> Tensor:  # fmt: skip
    """The rows' gradients into the store, that of h into `grad_h`; -> that of a_t before the ReLU, (T, C)."""
    (tokens, D), block = h_TD.shape, store.shape[0]
    sorted_XB = fired_TC.view(-1, block).index_select(0, groups.order)
    gates_X = None if gate_TP is None else gate_TP.flatten()[groups.order].unsqueeze(1)
    all_XB = torch.empty_like(sorted_XB)
    grads_EBD = h_TD.new_empty(room(store, tokens), *store.shape)
    if store.planned:
        store.asked = tokens, len(groups.order) // tokens
    of_keys_BD, of_values_BD = grads_EBD[..., :D].unbind(), grads_EBD[..., D:].unbind()
    rows = store.fetch(groups.experts, (VALUES, GRADS))
    keys_BD = cut(rows, lambda row: row[..., :D], h_TD.dtype)
    values_DB = cut(rows, lambda row: row[..., D:].mT, h_TD.dtype)

    def back_through(chunk: Chunk) -> None:  # a function, so that one chunk's tokens are gone when the next ones come
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
        store.accumulate(chunk.experts, grads_EBD[: len(chunk.sizes)])
        if grad_h is not None:
            grad_h.index_add_(0, chunk.tokens, grad_XD)

    for chunk in groups.chunks(store, tokens):
        back_through(chunk)
    return torch.zeros_like(fired_TC).view(-1, block).index_copy_(0, groups.order, all_XB).view_as(fired_TC)


# --- all tokens on the pairs that any of them chose -----------------------------------------------------------------


def chosen_pairs(probed_TP: Tensor, fired_TC: Tensor, store: TieredStore) -> Tensor:
    """Which pairs are among the K best of any token, (N, B)."""
    block = store.shape[0]
    pair_TC = (probed_TP.unsqueeze(-1) * block + torch.arange(block, device=fired_TC.device)).flatten(1)
    counts = torch.zeros(store.rows * block, dtype=torch.int32, device=fired_TC.device)
    counts.index_add_(0, pair_TC.flatten(), (fired_TC > 0).to(torch.int32).flatten())
    return (counts > 0).view(store.rows, block)


def chosen(pairs_NB: Tensor) -> list[int]:
    """The experts that have such a pair."""
    return pairs_NB.any(1).nonzero().flatten().tolist()


def fire_all(h_TD: Tensor, row_BD: Tensor, pairs_B: Tensor) -> Tensor:
    return (h_TD @ row_BD[:, : h_TD.shape[1]].to(h_TD.dtype).T).relu_().mul_(pairs_B)


def back_all(h_TD: Tensor, grad_TD: Tensor, grad_h: Tensor | None, pairs_NB: Tensor, store: TieredStore) -> None:
    D = h_TD.shape[1]
    experts = [0] if store.planned else chosen(pairs_NB)
    grad_BD = h_TD.new_empty(store.shape)
    for row, row_BD in zip(experts, store.fetch(experts, (VALUES, GRADS)), strict=True):
        record_BD, fired_TB = row_BD.to(h_TD.dtype), fire_all(h_TD, row_BD, pairs_NB[row])
        torch.mm(fired_TB.T, grad_TD, out=grad_BD[:, D:])
        grad_TB = (grad_TD @ record_BD[:, D:].T).mul_(fired_TB > 0)
        torch.mm(grad_TB.T, h_TD, out=grad_BD[:, :D])
        store.accumulate([row], [grad_BD])
        if grad_h is not None:
            grad_h.addmm_(grad_TB, record_BD[:, :D])
