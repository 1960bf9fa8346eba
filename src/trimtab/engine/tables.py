"""What the engine does for tables in the slow tier (`Surgery.stores`), whichever method keeps them.

Their rows' gradients are no parameters' gradients: they count in the global norm, and clipping reaches them. The rows
step when the optimiser does, at its own rates of that step, in any loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ..contracts import Surgery
from ..tiered.distributed import grad_norm_squared, summed
from ..tiered.mapped_file import in_ram
from ..tiered.store import TieredStore


def stores_of(surgeries: Iterable[Surgery]) -> list[TieredStore]:
    return [store for surgery in surgeries for store in surgery.stores]


def notes_of(surgeries: Sequence[Surgery], folder: str) -> list[str]:
    """What a user should know of how the patches were applied. `folder`: where tables in files are made."""
    notes = [note for surgery in surgeries for note in surgery.notes]
    if any(store.slow == "disk" for store in stores_of(surgeries)) and in_ram(folder):
        notes.append(f"{folder} is in RAM (tmpfs): tables there save no memory, though no figure of the fast tier "
                     "has them")  # fmt: skip
    return notes


def row_numbers(surgeries: Iterable[Surgery]) -> int:
    """How many numbers the rows of trained tables hold."""
    return sum(store.numel for store in stores_of(surgeries) if store.trained)


def traffic(surgeries: Iterable[Surgery], steps: int) -> dict[str, Any]:
    """Per optimiser step, over all tables: bytes moved each way and the share of rows found in the fast tier.

    Where rows had to be read from files or copied to a device: how many of them had been asked for and were there when
    they were needed, and what was read ahead for nothing (which is not among the bytes moved). Of all processes
    together, where several share the tables (each must call this).
    """
    tables = stores_of(surgeries)
    if not tables:
        return {}
    kinds = ("hits", "misses", "up", "down", "needed", "foreseen", "unused")
    moved = summed(tables, [sum(getattr(store.traffic, kind) for store in tables) for kind in kinds])
    hits, misses, up, down, needed, foreseen, unused = map(int, moved)
    ahead = {
        "store_prefetch_hit_rate": round(foreseen / max(needed, 1), 4),
        "store_prefetch_unused_bytes_per_step": unused // max(steps, 1),
    }
    return {
        "store_up_bytes_per_step": up // max(steps, 1),
        "store_down_bytes_per_step": down // max(steps, 1),
        "store_hit_rate": round(hits / max(hits + misses, 1), 4),
        "store_slow_bytes": sum(store.nbytes["slow"] for store in tables),
        **(ahead if needed else {}),
    }


@contextlib.contextmanager
def reading(model: Any, surgeries: Sequence[Surgery]) -> Iterator[Callable[[], dict[str, Any]]]:
    """What the tables bring up while the model is used within: by token that passes through it, padding included.

    -> a function that gives the figures so far; none without tables.
    """
    tables, tokens = stores_of(surgeries), 0

    def count(module: torch.nn.Module, args: tuple) -> None:
        nonlocal tokens
        tokens += args[0].numel()

    def told() -> dict[str, Any]:
        now = [sum(getattr(store.traffic, kind) for store in tables) for kind in kinds]
        hits, misses, up = (after - before for after, before in zip(now, start, strict=True))
        if not tokens:
            return {}
        return {
            "tokens": tokens, "store_up_bytes_per_token": up // tokens,
            "store_rows_per_token": round((hits + misses) / tokens, 1),
            "store_hit_rate": round(hits / max(hits + misses, 1), 4),
        }  # fmt: skip

    if not tables:
        yield lambda: {}
        return
    kinds = ("hits", "misses", "up")
    start = [sum(getattr(store.traffic, kind) for store in tables) for kind in kinds]
    hook = model.get_input_embeddings().register_forward_pre_hook(count)
    try:
        yield told
    finally:
        hook.remove()


def said(reads: dict[str, Any]) -> str:
    """What `reading` found, in a line."""
    line = f"tables: {reads['store_up_bytes_per_token'] / 2**20:.2f} MiB read a token"
    return f"{line}, {reads['store_rows_per_token']:,.1f} rows, {reads['store_hit_rate']:.0%} of them hot"


class ClipsRows:
    """Mixed into the trainers before the library's class: global norm and clipping over parameters and rows."""

    job: Any
    args: Any
    accelerator: Any

    def _clip_grad_norm(self, model: Any) -> Any:
        return self._norm(model, self.args.max_grad_norm) if self._tables() else super()._clip_grad_norm(model)  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._tables():
            return self._norm(model, float("inf"))
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]

    def _tables(self) -> Sequence[TieredStore]:
        return stores_of(self.job.surgeries)

    def _norm(self, model: Any, limit: float) -> torch.Tensor:
        """-> the norm before clipping; gradients beyond `limit` are scaled to it, those of rows when they are used."""
        self.accelerator.unscale_gradients()
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained]).double().cpu()
        norm = (norm.square() + grad_norm_squared(self._tables())).sqrt()
        factor = min(1.0, limit / (float(norm) + 1e-6))
        if factor < 1.0:
            for parameter in trained:
                parameter.grad.mul_(factor)
            for store in self._tables():
                store.grad_scale = factor
        return norm
