"""Notes, statistics and gradient clipping for tables in the slow tier (`Surgery.stores`).

The gradients of rows belong to no parameter; here they are included in the global norm and in clipping.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ..contracts import Surgery
from ..memory.budget import gib
from ..tiered.distributed import grad_norm_squared, summed
from ..tiered.mapped_file import in_ram
from ..tiered.store import TieredStore


def stores_of(surgeries: Iterable[Surgery]) -> list[TieredStore]:
    return [store for surgery in surgeries for store in surgery.stores]


def experts_of(surgeries: Iterable[Surgery]) -> list[Any]:
    """The experts of bases that patches have moved (tiered/experts.py)."""
    return [surgery.tiers for surgery in surgeries if surgery.tiers is not None]


def expert_bytes(surgeries: Iterable[Surgery]) -> int:
    """Bytes of the fast tier that a base's experts use now."""
    return sum(experts.used_bytes for experts in experts_of(surgeries))


def notes_of(surgeries: Sequence[Surgery], folder: str) -> list[str]:
    """Notes for the user on how the patches were applied. `folder`: where files of tables are created."""
    notes = [note for surgery in surgeries for note in surgery.notes]
    offloaded = any(surgery.offloaded for surgery in surgeries)
    if (offloaded or any(store.slow == "disk" for store in stores_of(surgeries))) and in_ram(folder):
        what = "weights and their state" if offloaded else "tables"
        notes.append(f"{folder} is in RAM (tmpfs): {what} there save no memory, although the figures of the fast tier "
                     "do not include them")  # fmt: skip
    return notes


def row_parameters(surgeries: Iterable[Surgery]) -> int:
    """Number of parameters in the rows of trained tables."""
    return sum(store.numel for store in stores_of(surgeries) if store.trained)


def traffic(surgeries: Iterable[Surgery], steps: int) -> dict[str, Any]:
    """Per optimizer step, over all tables: bytes transferred each way, and the share of rows found in the fast tier.
    The same of a base's experts.

    If rows had to be read from files or copied to a device: also the share of them whose prefetch was complete in time,
    and the bytes prefetched but not used, which the bytes transferred do not include. If several processes share the
    tables, the figures are totals over all of them, and each process must call this.
    """
    tables, experts = stores_of(surgeries), experts_of(surgeries)
    steps = max(steps, 1)
    found: dict[str, Any] = {}
    if experts:
        hits, misses, up = _sums(experts, "hits", "misses", "up")
        found = {"expert_up_bytes_per_step": up // steps, "expert_hit_rate": round(hits / max(hits + misses, 1), 4)}
    if not tables:
        return found
    hits, misses, up, down, needed, foreseen, unused = map(int, summed(tables, _sums(
        tables, "hits", "misses", "up", "down", "needed", "foreseen", "unused")))  # fmt: skip
    prefetches = {
        "store_prefetch_hit_rate": round(foreseen / max(needed, 1), 4),
        "store_prefetch_unused_bytes_per_step": unused // steps,
    }
    return {
        "store_up_bytes_per_step": up // steps,
        "store_down_bytes_per_step": down // steps,
        "store_hit_rate": round(hits / max(hits + misses, 1), 4),
        "store_slow_bytes": sum(store.nbytes["slow"] for store in tables),
        **(prefetches if needed else {}),
        **found,
    }


def _sums(tables: Sequence[Any], *kinds: str) -> list[int]:
    return [sum(getattr(store.traffic, kind) for store in tables) for kind in kinds]


@contextlib.contextmanager
def reading(model: Any, surgeries: Sequence[Surgery]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Counts what the tables transfer per token (padding included) while the model is used within it.

    Yields a function that returns the figures so far; empty without tables.
    """
    experts = experts_of(surgeries)
    tables, tokens = [*stores_of(surgeries), *experts], 0

    def count(module: torch.nn.Module, args: tuple) -> None:
        nonlocal tokens
        tokens += args[0].numel()

    def figures() -> dict[str, Any]:
        now = _sums(tables, "hits", "misses", "up")
        hits, misses, up = (after - before for after, before in zip(now, start, strict=True))
        if not tokens:
            return {}
        return {
            "tokens": tokens, "store_up_bytes_per_token": up // tokens,
            "store_rows_per_token": round((hits + misses) / tokens, 1),
            "store_hit_rate": round(hits / max(hits + misses, 1), 4),
            "what": "experts" if experts and len(experts) == len(tables) else "tables",
        }  # fmt: skip

    if not tables:
        yield lambda: {}
        return
    start = _sums(tables, "hits", "misses", "up")
    hook = model.get_input_embeddings().register_forward_pre_hook(count)
    try:
        yield figures
    finally:
        hook.remove()


def summary(reads: dict[str, Any]) -> str:
    """One line with the figures of `reading`."""
    what, rows = reads["what"], "experts" if reads["what"] == "experts" else "rows"
    line = f"{what}: {gib(reads['store_up_bytes_per_token'])} read per token"
    return (
        f"{line}, {reads['store_rows_per_token']:,.1f} {rows}, {reads['store_hit_rate']:.0%} of them in the fast tier"
    )


class ClipsRows:
    """A mixin for trainers, before the library's class: the global norm and clipping include rows."""

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
        """-> the norm before clipping. Scales gradients to a norm of at most `limit`; those of rows when they step."""
        self.accelerator.unscale_gradients()
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained]).double().cpu()
        norm = (norm.square() + grad_norm_squared(self._tables())).sqrt()
        factor = min(1.0, limit / (float(norm) + 1e-6))
        if factor < 1.0:
            for parameter in trained:
                parameter.grad.mul_(factor)
            for store in self._tables():
                store.scale_grads(factor)
        return norm
