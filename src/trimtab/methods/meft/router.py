"""Which experts a token probes: the router W_g of experts that lie in a store, and what keeps it fit.

A router that is trained has its rows in a table of its own, with Adam's state: that is four times what scoring needs,
and a step touches the rows of probed experts only. `router` is the copy in fast memory that scores are made with.

T tokens, D hidden size, N experts, B pairs of an expert, P probes.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from ...tiered.expected import expected_rows
from ...tiered.store import VALUES, TieredStore
from . import experts

REVIVED = 8  # dead experts of a layer that one step revives, at most


class Router(nn.Module):
    """`table`: the rows of a trained router, one an expert; without one it stays as drawn, or follows the `centroids`.

    `gate`: probed experts are weighted. `cap`, `balance`, `revive`: as the fields of Meft (patch.py). Its tensors are
    part of what is saved: `router`, unless the table holds it, `bias` and `probed_at`.
    """

    def __init__(
        self, store: TieredStore, table: TieredStore | None, *, probes: int, gate: bool, centroids: bool = False,
        cap: int = 0, balance: float = 0.0, revive: int = 0, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.store, self.table, self.gate, self.centroids = store, table, gate, centroids
        self.stores = [store] if table is None else [store, table]
        self.probes, self.balance, self.revive, self.seed = min(probes, store.rows), balance, revive, seed
        for each in self.stores:
            each.most = min(cap or each.rows, each.rows)
        rows, device = store.rows, torch.device("meta") if store.planned else store.device
        self.register_buffer("router", torch.empty(rows, store.shape[1] // 2, device=device), persistent=table is None)
        self.register_buffer("bias", torch.zeros(rows, device=device) if balance else None)
        self.load = torch.zeros(rows) if balance or revive else None  # tokens per expert, this window
        probed_at = torch.zeros(rows, dtype=torch.int64, device=device) if revive else None
        self.register_buffer("probed_at", probed_at)  # the step in which each expert was last probed
        self.lonely: Tensor | None = None  # (X, 1 + D): the tokens that were served worst, how well and which

    # --- the start ----------------------------------------------------------------------------------------------------

    def draw(self, seed: int) -> None:
        """Experts with random keys and no values, and their centroids as the router."""
        self.drawn_with = seed
        self.store.draw = self._draw_experts
        if self.table is not None:
            self.table.draw, self.table.filled = self._draw_table, self.refresh
        if self.store.planned:
            return
        for row, keys_BD in experts.drawn(self.store, seed):
            experts.write_row(self.store, row, keys_BD)
            self.router[row].copy_(experts.centroid(keys_BD))
        if self.table is not None and self.table.writes:
            self.table.whole().copy_(self.router)

    def _draw_experts(self, rows: Container[int]) -> None:
        for row, keys_BD in experts.drawn(self.store, self.drawn_with):
            if row in rows:
                experts.write_row(self.store, row, keys_BD)

    def _draw_table(self, rows: Container[int]) -> None:
        for row, keys_BD in experts.drawn(self.store, self.drawn_with):
            if row in rows:
                self.table.put(VALUES, [row], [experts.centroid(keys_BD)])

    # --- a pass -------------------------------------------------------------------------------------------------------

    def route(self, h_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> the experts probed, (T, P), and their gates (T, P) or None."""
        logits_TN = h_TD @ self.router.to(h_TD.dtype).T
        probed_TP = self._best(logits_TN)
        if self.load is not None and self.training and not self.store.planned:
            self.load += torch.bincount(probed_TP.flatten(), minlength=self.store.rows).cpu()
            served_X, worst_X = logits_TN.amax(1).topk(min(REVIVED, len(h_TD)), largest=False)
            self.lonely = torch.cat([served_X.unsqueeze(1), h_TD[worst_X]], 1).float()
        if not self.gate:
            return probed_TP, None
        return probed_TP, logits_TN.gather(1, probed_TP).softmax(-1).mul_(self.probes)

    def probed(self, h_TD: Tensor) -> list[int]:
        """The experts that any of these tokens would probe."""
        return self._best(h_TD @ self.router.to(h_TD.dtype).T).unique().tolist()

    def _best(self, logits_TN: Tensor) -> Tensor:
        """Each token's P experts. Where tokens in training want more than `cap`, of those that most of them want."""
        scores_TN = logits_TN if self.bias is None else logits_TN + self.bias.to(logits_TN.dtype)
        best_TP = scores_TN.topk(self.probes, sorted=False).indices
        if self.store.planned or not self.training or self.store.most == self.store.rows:
            return best_TP
        wanted_N = torch.bincount(best_TP.flatten(), minlength=self.store.rows)
        if wanted_N.count_nonzero() <= self.store.most:
            return best_TP
        common = wanted_N.argsort(descending=True, stable=True)[: self.store.most]
        return common[scores_TN[:, common].topk(self.probes, sorted=False).indices]

    def back(self, h_TD: Tensor, grad_h: Tensor | None, probed_TP: Tensor, gate_TP: Tensor, grad_TP: Tensor) -> None:
        """The router's gradient into its table, and its part of that of h; `grad_TP`: that of the gates, times them.

        Of a logit it is g dg - share * (sum of g dg), for the gates are a softmax. All but P of a token's N
        logits have none: both products are sums over the pairs of a token and a probed expert.
        """
        grad_TP = grad_TP - gate_TP * grad_TP.sum(1, keepdim=True).div_(self.probes)
        if grad_h is not None:
            grad_h += embedding_bag(probed_TP, self.router.to(h_TD.dtype), per_sample_weights=grad_TP, mode="sum")
        if self.table is None:
            return
        groups = experts.by_expert(probed_TP, self.table)
        sizes = torch.ones(self.table.rows) if self.table.planned else torch.tensor(groups.sizes)
        first_E = (sizes.cumsum(0) - sizes).to(groups.tokens)
        grad_X = grad_TP.flatten()[groups.order]
        grad_ED = embedding_bag(groups.tokens, h_TD, first_E, per_sample_weights=grad_X, mode="sum")
        if self.table.planned:
            tokens, probes = self.table.asked = tuple(probed_TP.shape)
            with experts.standing_for(self.table, expected_rows(self.table, tokens, probes)):
                self.table.accumulate([0], grad_ED[:1])
            return
        self.table.accumulate(groups.experts, grad_ED)

    # --- between steps ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self, rows: Sequence[int] | None = None) -> None:
        """Bring rows of the table (default: all) to fast memory."""
        if self.table is not None and not self.table.planned:
            chosen = torch.arange(self.table.rows) if rows is None else torch.tensor(rows, dtype=torch.int64)
            self.router[chosen] = self.table.whole()[chosen].to(self.router)
            self.table.traffic.up += len(chosen) * self.table.parts[VALUES].nbytes

    @torch.no_grad()
    def tend(self, step: int, moved: Sequence[list[int]]) -> None:
        """After an optimiser step, which moved these rows of each store: the copy or the centroids, the experts'
        balance, the dead."""
        if self.table is not None:
            exact = self.table.catch_up is not None  # then all rows move in every step
            self.table.optimiser.catch_up()
            self.refresh(None if exact else moved[1])
        if self.centroids:
            for row in moved[0]:
                self.router[row].copy_(experts.centroid(self.store.part(VALUES, row)[:, : self.store.shape[1] // 2]))
        if self.load is None or self.lonely is None:
            return
        if self.store.ranks is not None:
            self.load = self.store.ranks.total(self.load)
            self.lonely = self.store.ranks.lowest(self.lonely, REVIVED).to(self.lonely.device)
        if self.bias is not None:
            self.bias += self.balance * (self.load.mean() - self.load).sign().to(self.bias)
        if self.probed_at is not None:
            self.probed_at[self.load.to(self.probed_at.device) > 0] = step
            dead = (step - self.probed_at >= self.revive).nonzero().flatten().tolist()
            for row, token_D in zip(dead, self.lonely[:, 1:], strict=False):
                self._revive(row, token_D, step)
        self.load.zero_()

    def _revive(self, row: int, token_D: Tensor, step: int) -> None:
        """A dead expert is drawn anew around a token that was served badly; its values are zero, as at the start."""
        direction_D = nn.functional.normalize(token_D, dim=0)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + step * self.store.rows + row)
        experts.write_row(self.store, row, experts.draw_keys(self.store, random, direction_D))
        self.router[row].copy_(direction_D * self.router.norm(dim=1).mean())
        if self.table is not None and self.table.writes:
            self.table.put(VALUES, [row], [self.router[row]])
        self.probed_at[row] = step
        for store in self.stores:
            store.changed([row])
