"""Two routers of other papers, as choices for MEFT's experts: Switch's and StableMoE's.

`SwitchRouter`: Fedus, Zoph, Shazeer, Switch Transformers, arXiv 2101.03961, section 2.

    p_t = softmax(W_g h_t)      i = argmax p_t      the gate is p_t[i]                               (equations 1, 2)
    loss = balance_loss N sum_i f_i P_i      f_i: share of tokens sent to i, P_i: mean of p_t[i]     (equations 4 to 6)
    an expert serves at most `capacity` T / N tokens of a training pass; later ones pass it by        (equation 3)

`StableRouter`: Dai et al., StableMoE, arXiv 2204.08396, sections 3.2 and 3.3.

    s_t = W_g h_t               the gate is sigmoid(s_t[i]) of each probed expert i
    stage 1: experts are chosen by s_t. loss = balance_loss / T sum_i (n_i - n) / n sum_{t sent to i} sigmoid(s_t[i])
             + the cross-entropy of softmax(D x_t) to the experts chosen    n_i: tokens sent to i, n: their mean
    stage 2: D no longer changes, and chooses the experts: by the token's word alone

What differs from the papers, and why: Switch's jitter is left out, since a token should find the same experts whenever
it is repeated (checkpointing). x_t is the base's own word vector, not one that is trained for the router: D is then no
larger than W_g, and knows words that stage 1 has not seen. StableMoE's losses are means over tokens, as ours are, and
more than one expert may be probed.

T tokens, D hidden size, E size of a word vector, N experts, P probes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from ...errors import BadInput
from ...tiered.store import TieredStore
from .router import Routed, Router

TRAINED = ("gate", "switch", "stable")  # routers that have gates and a table of their own
DEFAULTS = {"switch": {"capacity": 1.25, "balance_loss": 0.01}, "stable": {"balance_loss": 0.3, "first_stage": 0.1}}


def setting(patch: Any, field: str) -> float:
    """The value of one of the router's own fields, by default the paper's."""
    value = getattr(patch, field)
    return DEFAULTS[patch.router][field] if value is None else value


def check(patch: Any) -> None:
    """BadInput if fields of a `Meft` do not go with its router."""
    for field in ("capacity", "balance_loss", "first_stage"):
        if (value := getattr(patch, field)) is None:
            continue
        if field not in DEFAULTS.get(patch.router, {}):
            have = " and ".join(name for name, own in DEFAULTS.items() if field in own)
            raise BadInput(f"meft: {field} with router: {patch.router}", f"only router: {have} has it", "Omit it")
        if field == "first_stage" and not 0 < value <= 1:
            have = "it is a share of the steps, above 0 and at most 1"
            raise BadInput(f"meft: first_stage: {value}", have, "Set first_stage: 0.1")
        if not 0 <= value < math.inf:
            raise BadInput(f"meft: {field}: {value}", "it must be 0 or more", "Omit it for the paper's value")
    if patch.router == "switch" and patch.probes != 1:
        have = "Switch sends a token to one expert"
        raise BadInput(f"meft: router: switch with probes: {patch.probes}", have, "Set probes: 1")
    if patch.router == "stable" and (patch.balance or patch.revive):
        have = "in its second stage the choice of experts is frozen"
        raise BadInput("meft: router: stable with balance or revive", have, "Use balance_loss, or another router")


def make(patch: Any, store: TieredStore, *tables: TieredStore, words: Words | None) -> Router:
    """The router that a `Meft` names, for one layer."""
    fields = {"probes": patch.probes, "balance": patch.balance, "revive": patch.revive, "seed": patch.seed}
    if patch.router == "switch":
        own = {field: setting(patch, field) for field in ("capacity", "balance_loss")}
        return SwitchRouter(store, *tables, **own, **fields)
    if patch.router == "stable":
        assert words is not None
        return StableRouter(store, *tables, words, balance_loss=setting(patch, "balance_loss"), **fields)
    table, centroids = tables[0] if tables else None, patch.router == "centroid"
    return Router(store, table, gate=patch.router == "gate", centroids=centroids, **fields)


class SwitchRouter(Router):
    """Sends each token to one expert."""

    def __init__(self, store: TieredStore, table: TieredStore, *, capacity: float, balance_loss: float, **fields: Any):
        super().__init__(store, table, gate=True, **fields)
        self.capacity, self.balance_loss = capacity, balance_loss

    @property
    def has_loss(self) -> bool:
        return True

    def route(self, h_TD: Tensor) -> Routed:
        logits_TN = h_TD @ self.weight.to(h_TD.dtype).T
        probed_TP = self._best(logits_TN)
        self._count(logits_TN, h_TD, probed_TP)
        shares_TN = logits_TN.softmax(-1)
        gate_TP = shares_TN.gather(1, probed_TP)
        if not self.training:
            return Routed(probed_TP, gate_TP)
        if self.capacity:
            gate_TP = gate_TP * self._served(probed_TP)
        loss = (tokens_of(probed_TP, self.store.rows) @ shares_TN.sum(0)) * self._factor(len(h_TD))
        return Routed(probed_TP, gate_TP, loss)

    def _factor(self, tokens: int) -> float:
        """Of the loss, for counts and sums over tokens in place of shares and means."""
        return self.balance_loss * self.store.rows / tokens**2

    def _served(self, probed_TP: Tensor) -> Tensor:
        """1 for the tokens that their expert has room for, in their order; 0 for the others, (T, 1)."""
        flat_T = probed_TP.flatten()
        order_T = flat_T.argsort(stable=True)
        counts_N = tokens_of(probed_TP, self.store.rows)
        first_T = (counts_N.cumsum(0) - counts_N)[flat_T[order_T]]
        place_T = torch.arange(len(flat_T), device=flat_T.device) - first_T
        room = math.ceil(self.capacity * len(flat_T) / self.store.rows)
        served_T = torch.empty_like(flat_T, dtype=counts_N.dtype)
        return served_T.index_copy_(0, order_T, (place_T < room).to(counts_N.dtype)).unsqueeze_(1)

    def back(self, h_TD: Tensor, grad_h: Tensor | None, routed: Routed, grad_TP: Tensor, grad_loss: Tensor) -> None:
        """Every logit of a token has a gradient, of the softmax over all experts: all rows of the table have one."""
        shares_TN = (h_TD @ self.weight.to(h_TD.dtype).T).softmax(-1)
        sent_N = tokens_of(routed.probed_TP, self.store.rows).to(h_TD.dtype) * (grad_loss * self._factor(len(h_TD)))
        mean_T = (shares_TN @ sent_N).unsqueeze_(1)
        grad_TN = shares_TN * (sent_N - mean_T - grad_TP.sum(1, keepdim=True))
        grad_TN.scatter_add_(1, routed.probed_TP, grad_TP)
        if grad_h is not None:
            grad_h.addmm_(grad_TN, self.weight.to(h_TD.dtype))
        accumulate_all(self.table, grad_TN, h_TD)


class StableRouter(Router):
    """`words`: the rows of D, (E,) each, in a table; `seen`: what reads the word vectors of a pass."""

    def __init__(
        self, store: TieredStore, table: TieredStore, words: TieredStore, seen: Words, *, balance_loss: float,
        **fields: Any,
    ):  # fmt: skip
        super().__init__(store, table, gate=True, **fields)
        self.stores.append(words)
        self.words, self.seen, self.balance_loss = words, seen, balance_loss
        self.last = 0  # the step after which D stays as it is; 0: not known
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool, device=self.weight.device))
        copy = torch.zeros(words.rows, *words.shape, device=self.weight.device)
        self.register_buffer("word_weight", copy, persistent=False)
        words.keep_copy(self.refresh_words)

    def own_tensors(self) -> dict[str, Tensor]:
        return {**super().own_tensors(), "words": self.words.whole(), "frozen": self.frozen}

    @property
    def second(self) -> bool:
        """Whether D chooses the experts."""
        return self.frozen.device.type != "meta" and bool(self.frozen)

    @property
    def has_loss(self) -> bool:
        return not self.second

    def route(self, h_TD: Tensor) -> Routed:
        words_TE = self.seen.of(len(h_TD))
        logits_TN, second = h_TD @ self.weight.to(h_TD.dtype).T, self.second
        guesses_TN = self._guesses(words_TE, h_TD.dtype) if second or self.training else None
        probed_TP = self._best(guesses_TN if second and guesses_TN is not None else logits_TN)
        gate_TP = logits_TN.gather(1, probed_TP).sigmoid_()
        if second or guesses_TN is None:
            return Routed(probed_TP, gate_TP)
        excess_TP = self._excess(probed_TP)
        distilled = log_softmax(guesses_TN, -1).gather(1, probed_TP).sum() / -probed_TP.numel()
        loss = (excess_TP * gate_TP).sum() * (self.balance_loss / len(h_TD)) + distilled
        return Routed(probed_TP, gate_TP, loss, words_TE)

    def _guesses(self, words_TE: Tensor, dtype: torch.dtype) -> Tensor:
        return words_TE.to(dtype) @ self.word_weight.to(dtype).T

    def _excess(self, probed_TP: Tensor) -> Tensor:
        """(n_i - n) / n of each probed expert, (T, P)."""
        counts_N = tokens_of(probed_TP, self.store.rows)
        return (counts_N / (probed_TP.numel() / self.store.rows) - 1)[probed_TP]

    def back(self, h_TD: Tensor, grad_h: Tensor | None, routed: Routed, grad_TP: Tensor, grad_loss: Tensor) -> None:
        probed_TP, gate_TP, _, words_TE = routed
        assert gate_TP is not None
        if words_TE is not None:  # of stage 1
            grad_TP = grad_TP + self._excess(probed_TP) * gate_TP * (grad_loss * self.balance_loss / len(h_TD))
            grad_TN = self._guesses(words_TE, h_TD.dtype).softmax(-1)
            grad_TN.scatter_add_(1, probed_TP, torch.full_like(gate_TP, -1 / probed_TP.shape[1]))
            accumulate_all(self.words, grad_TN.mul_(grad_loss / len(h_TD)), words_TE.to(h_TD.dtype))
        self._back_probed(h_TD, grad_h, probed_TP, grad_TP * (1 - gate_TP))

    @torch.no_grad()
    def refresh_words(self) -> None:
        """Copy the rows of D into fast memory."""
        self.word_weight.copy_(self.words.whole())
        self.words.traffic.up += self.word_weight.nbytes

    def after_step(self, step: int, changed: Any) -> None:
        super().after_step(step, changed)
        if not self.second:
            self.words.catch_up()
            self.refresh_words()
            if self.last and step + 1 >= self.last:
                self.frozen.fill_(True)


class Words:
    """The vectors that a model's input embeddings returned for the newest pass."""

    def __init__(self) -> None:
        self.newest: Tensor | None = None

    def __call__(self, module: nn.Module, given: Any, vectors: Tensor) -> None:
        """A forward hook of the embeddings."""
        self.newest = vectors.detach()

    def of(self, tokens: int) -> Tensor:
        """-> (T, E); BadInput if they are of other tokens."""
        made = 0 if self.newest is None else self.newest.numel() // self.newest.shape[-1]
        if self.newest is None or made != tokens:
            have = f"an FFN has {tokens} tokens, and the input embeddings made {made} vectors"
            raise BadInput("meft: router: stable", have, "Use router: gate for this model")
        return self.newest.reshape(tokens, -1)


def tokens_of(probed_TP: Tensor, experts: int) -> Tensor:
    """How many tokens each expert is sent, (N,), fp32."""
    flat = probed_TP.flatten()
    return torch.zeros(experts, device=flat.device).index_add_(0, flat, torch.ones(len(flat), device=flat.device))


def accumulate_all(table: TieredStore | None, grad_TN: Tensor, of_TD: Tensor) -> None:
    """Accumulates the gradients of all rows, from those of the logits and what the rows are multiplied with."""
    assert table is not None
    table.accumulate(range(table.rows), (grad_TN.T @ of_TD).unbind())
