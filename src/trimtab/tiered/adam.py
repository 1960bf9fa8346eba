"""Adam and AdamW on those rows of a store that have a gradient; the moments are parts of the rows' records.

There are two rules for a row without a gradient:

- `lazy` (as in torch.optim.SparseAdam): it does not change, neither by momentum nor by decay; bias corrections count
  all steps of the run. Only rows with a gradient cost time and transfers.
- `exact`: it changes as dense Adam changes it on a gradient of zero. For step t (Kingma and Ba, arXiv 1412.6980,
  algorithm 1, with AdamW's decay, 1711.05101)

      m <- b1 m    v <- b2 v    w <- (1 - lr_t wd) w - lr_t (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

  The steps that a row missed are made up for before the row is read again, each with its own learning rate. Once b1^k
  is below a float's resolution, momentum no longer moves the row, and decay is a product: any number of missed steps
  has a bounded cost (220 iterations at b1 = 0.9). A row that never had a gradient only decays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ..foreign import fused_adam, fused_adamw
from . import adam_state
from .store import GRADS, VALUES, M, TieredStore, V

MODES = ("lazy", "exact")
FORGOTTEN = 1e-10  # share of its momentum below which a row is no longer moved by it
SMALL = 8 * 1024  # bytes of a row's values
PIECE = 2**20  # bytes of rows that are copied at a time


@dataclass(frozen=True)
class Rates:
    """The settings of one step, named as in torch.optim's parameter groups."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True  # AdamW; False: decay enters the gradient (Adam)

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, parameter: Tensor) -> Rates:
        """The rates with which `optimizer`, PyTorch's Adam or AdamW, steps `parameter`; BadInput for other classes."""
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        odd = [name for name in ("amsgrad", "maximize") if group.get(name)]
        if not isinstance(optimizer, torch.optim.Adam) or odd:  # AdamW is a subclass
            raise BadInput(
                f"step the rows of a table with {type(optimizer).__name__}{' and ' + odd[0] if odd else ''}",
                "only Adam and AdamW can step rows in the slow tier", "Use torch.optim.AdamW",
            )  # fmt: skip
        decoupled = bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))
        beta1, beta2 = map(float, group["betas"])
        return cls(float(group["lr"]), (beta1, beta2), float(group["eps"]), float(group["weight_decay"]), decoupled)


class RowAdam:
    """Steps the rows of one store."""

    def __init__(self, store: TieredStore, mode: str = "lazy"):
        if mode not in MODES:
            raise BadInput(f'row Adam "{mode}"', "there is no such mode", f"Set one of {', '.join(MODES)}")
        if mode == "exact" and store.ranks is not None:
            raise BadInput(
                "adam: exact with several processes", "each would make up for missed steps on its own",
                "Set adam: lazy, or start one process",
            )  # fmt: skip
        self.store, self.mode = store, mode
        self.steps = 0
        self.last = torch.zeros(store.rows, dtype=torch.int32)  # the last step that each row has made
        self.moved = torch.zeros(store.rows, dtype=torch.bool)  # rows with a momentum
        self.history: list[Rates] = []  # of each step, if rows make up for steps
        store.attach(self)

    @property
    def plain(self) -> bool:
        """Whether a step is Adam's update of the rows with a gradient and nothing else."""
        return self.mode == "lazy" and not adam_state.narrow(self.store)

    @property
    def copies(self) -> bool:
        """Whether rows are copied for a step, a piece at a time: small rows, whose views cost more than copies, and
        rows of a file, which is written in pieces."""
        store = self.store
        small = store.parts[VALUES].nbytes <= SMALL
        return not adam_state.narrow(store) and (small or store.slow == "disk")

    @property
    def temporaries(self) -> int:
        """Bytes that a step allocates and frees, at most: copies of rows."""
        nbytes = self.store.parts[VALUES].nbytes
        return len((VALUES, GRADS, M, V)) * min(self._piece, self.store.rows) * nbytes if self.copies else 0

    @property
    def _piece(self) -> int:
        return max(1, PIECE // self.store.parts[VALUES].nbytes)

    @torch.no_grad()
    def step(self, rates: Rates) -> list[int]:
        """One optimizer step with the pending gradients; -> the rows that changed, also by other processes."""
        store, rows = self.store, self.store.pending()
        if self.mode == "exact":
            self.catch_up(rows)
            self.history.append(rates)
        self.steps += 1
        for on_one in self._by_device(rows):
            self._step(on_one, rates)
        rows = store.stepped()
        chosen = torch.tensor(rows, dtype=torch.int64)
        self.last[chosen], self.moved[chosen] = self.steps, True
        return rows

    def _by_device(self, rows: list[int]) -> Iterable[list[int]]:
        """The rows, grouped by device: hot ones may be on an accelerator."""
        if self.store.in_place:
            return [rows] if rows else []
        found: dict[torch.device, list[int]] = {}
        for row, values in zip(rows, self.store.each(VALUES, rows), strict=True):
            found.setdefault(values.device, []).append(row)
        return found.values()

    def _step(self, rows: list[int], rates: Rates) -> None:
        store = self.store
        scale = None if store.grad_scale == 1.0 else torch.tensor(1.0 / store.grad_scale)
        fused = functools.partial(
            fused_adamw if rates.decoupled else fused_adam, lr=rates.lr, beta1=rates.betas[0],
            beta2=rates.betas[1], weight_decay=rates.weight_decay, eps=rates.eps, amsgrad=False, maximize=False,
            grad_scale=scale, found_inf=None,
        )  # fmt: skip
        step = torch.tensor(float(self.steps))
        if adam_state.narrow(store):  # copies of moments, of one row at a time
            for row in rows:
                m, v = (adam_state.read(store, kind, row) for kind in (M, V))
                value, grad = (store.part(kind, row).clone() for kind in (VALUES, GRADS))
                fused([value], [grad], [m], [v], [], [step])
                store.put(VALUES, [row], [value])
                adam_state.write(store, M, row, m)
                adam_state.write(store, V, row, v)
        elif not self.copies:
            fused(*(list(store.each(kind, rows)) for kind in (VALUES, GRADS, M, V)), [], [step] * len(rows))
        else:
            for part in (rows[at : at + self._piece] for at in range(0, len(rows), self._piece)):
                copies = {kind: store.gather(kind, part) for kind in (VALUES, GRADS, M, V)}
                fused(*([copy] for copy in copies.values()), [], [step])
                store.write(part, {kind: copies[kind] for kind in (VALUES, M, V)})

    @torch.no_grad()
    def catch_up(self, rows: Sequence[int] | None = None) -> None:
        """Make up for the steps that these rows (default: all) missed."""
        if self.mode != "exact":
            return
        behind = range(self.store.rows) if rows is None else rows
        late = [row for row in behind if self.last[row] < self.steps]
        for row in late:
            self._make_up(row, int(self.last[row]))
        if late:
            self.last[torch.tensor(late)] = self.steps
            self.store.changed(late)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides the rows."""
        rates = [[r.lr, *r.betas, r.eps, r.weight_decay, float(r.decoupled)] for r in self.history]
        history = torch.tensor(rates, dtype=torch.float64).view(-1, 6)
        return {"steps": torch.tensor([self.steps]), "last": self.last, "moved": self.moved, "history": history}

    def fits(self, state: dict[str, Tensor]) -> bool:
        """Whether `load_state` can load it."""
        mine = self.state()
        if mine.keys() != state.keys():
            return False
        pairs = [(state[name], own, name == "history") for name, own in mine.items()]  # its length is that of the run
        return all(
            a.dtype == b.dtype and a.dim() == b.dim() and a.shape[1:] == b.shape[1:] and (free or len(a) == len(b))
            for a, b, free in pairs
        )

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        self.last.copy_(state["last"])
        self.moved.copy_(state["moved"])
        self.history = [Rates(lr, (b1, b2), eps, wd, bool(d)) for lr, b1, b2, eps, wd, d in state["history"].tolist()]

    def _make_up(self, row: int, done: int) -> None:
        missed = self.history[done:]
        value = self.store.part(VALUES, row).clone()
        if not self.moved[row] and not any(not r.decoupled and r.weight_decay for r in missed):
            self.store.put(VALUES, [row], [value.mul_(math.prod(1 - r.lr * r.weight_decay for r in missed))])
            return
        m, v = (adam_state.read(self.store, kind, row) for kind in (M, V))
        self.moved[row] = True
        share = 1.0
        for at, r in enumerate(missed):
            if share < FORGOTTEN and r.decoupled:
                rest = missed[at:]
                value.mul_(math.prod(1 - x.lr * x.weight_decay for x in rest))
                m.mul_(math.prod(x.betas[0] for x in rest))
                v.mul_(math.prod(x.betas[1] for x in rest))
                break
            t, (b1, b2) = done + at + 1, r.betas
            share *= b1
            if r.decoupled:
                value.mul_(1 - r.lr * r.weight_decay)
                m.mul_(b1)
                v.mul_(b2)
            else:
                m.lerp_(value * r.weight_decay, 1 - b1)
                v.mul_(b2).addcmul_(value, value, value=(1 - b2) * r.weight_decay**2)
            depth = v.sqrt().div_(math.sqrt(1 - b2**t)).add_(r.eps)
            value.addcdiv_(m, depth, value=-r.lr / (1 - b1**t))
        self.store.put(VALUES, [row], [value])
        adam_state.write(self.store, M, row, m)
        adam_state.write(self.store, V, row, v)
