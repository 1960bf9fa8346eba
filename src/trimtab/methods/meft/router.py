"""Which experts a token probes: the router W_g of experts in a store, and its upkeep between steps.

A trained router's rows lie in a table of their own, with Adam's state: that is four times the memory that scoring
needs, and a step touches only the rows of probed experts. Scores are computed with `weight`, a copy in fast memory.

T tokens, D hidden size, N experts, B pairs of an expert, P probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from ...tiered.store import VALUES, TieredStore
from . import experts

REVIVED = 8  # dead experts of a layer that one step revives, at most


class Routed(NamedTuple):
    """The experts that tokens probe, (T, P), and their gates (T, P) or None; a term of the training loss, shape ();
    and what its gradient needs besides h."""

    probed_TP: Tensor
    gate_TP: Tensor | None
    loss: Tensor | None = None
    words_TE: Tensor | None = None


class Router(nn.Module):
    """`table`: the rows of a trained router, one per expert; without a table the router stays at its initial value, or
    is set to the `centroids` of the keys after each step.

    `gate`: whether probed experts are weighted. `balance`, `revive`: as in Meft (patch.py).
    """

    def __init__(
        self, store: TieredStore, table: TieredStore | None, *, probes: int, gate: bool, centroids: bool = False,
        balance: float = 0.0, revive: int = 0, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.store, self.table, self.gate, self.centroids = store, table, gate, centroids
        self.stores = [store] if table is None else [store, table]
        self.probes, self.balance, self.revive, self.seed = min(probes, store.rows), balance, revive, seed
        rows, self.width, device = store.rows, store.shape[1] // 2, store.model_device
        counts = (balance or revive) and device.type != "meta"  # without values there is nothing to count
        self.load = torch.zeros(rows) if counts else None  # tokens per expert since the last step
        self.worst_served: Tensor | None = None  # (X, 1 + D): best score and h of the tokens whose best score is lowest
        self.register_buffer("weight", torch.zeros(rows, self.width, device=device), persistent=table is None)
        self.register_buffer("bias", torch.zeros(rows, device=device) if balance else None)
        probed_at = torch.zeros(rows, dtype=torch.int64, device=device) if revive else None
        self.register_buffer("probed_at", probed_at)  # the step in which each expert was last probed
        for row, values_BX in enumerate(store.fill()):
            self.weight[row].copy_(experts.centroid(values_BX[:, : self.width]))
        if table is not None:
            table.keep_copy(self.refresh)
            if table.writes:
                table.whole().copy_(self.weight)

    def own_tensors(self) -> dict[str, Tensor]:
        """What is saved with an adapter; a trained router's rows are in its table."""
        own = {"router": self.weight if self.table is None else None, "bias": self.bias, "probed_at": self.probed_at}
        return {name: tensor for name, tensor in own.items() if tensor is not None}

    @property
    def has_loss(self) -> bool:
        """Whether `route` returns a loss in training."""
        return False

    # --- a forward or backward pass -----------------------------------------------------------------------------------

    def route(self, h_TD: Tensor) -> Routed:
        logits_TN = h_TD @ self.weight.to(h_TD.dtype).T
        probed_TP = self._best(logits_TN)
        self._count(logits_TN, h_TD, probed_TP)
        if not self.gate:
            return Routed(probed_TP, None)
        return Routed(probed_TP, logits_TN.gather(1, probed_TP).softmax(-1).mul_(self.probes))

    def _count(self, logits_TN: Tensor, h_TD: Tensor, probed_TP: Tensor) -> None:
        """In training, what balancing and reviving need to know."""
        if self.load is not None and self.training:
            self.load += torch.bincount(probed_TP.flatten(), minlength=self.store.rows).cpu()
            score_X, worst_X = logits_TN.amax(1).topk(min(REVIVED, len(h_TD)), largest=False)
            self.worst_served = torch.cat([score_X.unsqueeze(1), h_TD[worst_X]], 1).float()

    def _best(self, logits_TN: Tensor) -> Tensor:
        """Each token's P best experts. In training, if tokens want more experts than the cap, the best of those that
        most tokens want."""
        scores_TN = logits_TN if self.bias is None else logits_TN + self.bias.to(logits_TN.dtype)
        best_TP = scores_TN.topk(self.probes, sorted=False).indices
        common = self.store.most_wanted(best_TP) if self.training else None
        return best_TP if common is None else common[scores_TN[:, common].topk(self.probes, sorted=False).indices]

    def back(self, h_TD: Tensor, grad_h: Tensor | None, routed: Routed, grad_TP: Tensor, grad_loss: Tensor) -> None:
        """Accumulates the router's gradient in its table, and its part of h's in `grad_h`. `grad_TP`: the gates'
        gradients, times the gates. `grad_loss`: the gradient of `Routed.loss`.

        The gates are a softmax, so a logit's gradient is g dg - share * (sum of g dg). All but P of a token's N logits
        have none: both products are sums over the pairs of a token and a probed expert.
        """
        probed_TP, gate_TP = routed[:2]
        assert gate_TP is not None
        self._back_probed(h_TD, grad_h, probed_TP, grad_TP - gate_TP * grad_TP.sum(1, keepdim=True).div_(self.probes))

    def _back_probed(self, h_TD: Tensor, grad_h: Tensor | None, probed_TP: Tensor, grad_TP: Tensor) -> None:
        """As `back`, from the gradients of the probed experts' logits, where the others have none."""
        if grad_h is not None:
            grad_h += embedding_bag(probed_TP, self.weight.to(h_TD.dtype), per_sample_weights=grad_TP, mode="sum")
        if self.table is None:
            return
        groups = self.table.group(probed_TP)
        grad_X = grad_TP.flatten()[groups.order]
        grad_ED = embedding_bag(groups.tokens, h_TD, groups.starts(), per_sample_weights=grad_X, mode="sum")
        groups.accumulate(grad_ED)

    # --- between steps ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self, rows: Sequence[int] | None = None) -> None:
        """Copy rows of the table (default: all) into `weight`."""
        if self.table is not None:
            chosen = torch.arange(self.table.rows) if rows is None else torch.tensor(rows, dtype=torch.int64)
            self.weight[chosen] = self.table.whole()[chosen].to(self.weight)
            self.table.traffic.up += len(chosen) * self.table.parts[VALUES].nbytes

    @torch.no_grad()
    def after_step(self, step: int, changed: Sequence[list[int]]) -> None:
        """After an optimizer step, which changed these rows of each store: update `weight`, balance the experts, revive
        dead ones."""
        if self.table is not None:
            self.table.catch_up()
            self.refresh(None if self.table.exact else changed[1])  # an exact step changes all rows
        if self.centroids:
            for row in changed[0]:
                self.weight[row].copy_(experts.centroid(self.store.part(VALUES, row)[:, : self.width]))
        if self.load is None or self.worst_served is None:
            return
        if self.store.ranks is not None:
            self.load = self.store.ranks.total(self.load)
            self.worst_served = self.store.ranks.lowest(self.worst_served, REVIVED).to(self.worst_served.device)
        if self.bias is not None:
            self.bias += self.balance * (self.load.mean() - self.load).sign().to(self.bias)
        if self.probed_at is not None:
            self.probed_at[self.load.to(self.probed_at.device) > 0] = step
            dead = (step - self.probed_at >= self.revive).nonzero().flatten().tolist()
            for row, token_D in zip(dead, self.worst_served[:, 1:], strict=False):
                self._revive(row, token_D, step)
        self.load.zero_()

    def _revive(self, row: int, token_D: Tensor, step: int) -> None:
        """Draw a dead expert anew around a token that was served badly; its values are zero, as before training."""
        direction_D = nn.functional.normalize(token_D, dim=0)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + step * self.store.rows + row)
        keys_BD = experts.draw_keys(self.store.shape[0], self.width, random, direction_D)
        self.store.overwrite(row, experts.row_of(keys_BD))
        self.weight[row].copy_(direction_D * self.weight.norm(dim=1).mean())
        if self.table is not None:
            self.table.overwrite(row, self.weight[row])
        self.probed_at[row] = step
        for store in self.stores:
            store.changed([row])
