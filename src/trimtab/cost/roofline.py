"""Seconds of a training step, from its operations and this machine's rates.

As the planner's trace runs a step on fake tensors (cost/trace.py), each operation is turned into seconds: a product or
a fused attention takes its floating-point operations (by PyTorch's own formulas) over the rate of its type, but no less
than moving its operands; any other takes the bytes that it reads and writes over the memory's rate. Each also takes the
overhead of starting it; views take nothing else. Recomputed blocks, autocast's casts and the optimizer's update count
because the trace runs them.

Not included: work that the trace does not see (data loading, logging), the caches, and changes of the machine's speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ..foreign import tree_iter
from .rates import Rates

aten = torch.ops.aten
FLOPS = {
    **flop_registry, aten.addmm_: flop_registry[aten.addmm], aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward],
}  # fmt: skip
# names of operations, without "aten::" and a trailing underscore
RANDOM = ("native_dropout", "bernoulli", "rand", "rand_like", "randn", "randn_like", "uniform", "normal")
OVERWRITES = ("copy", "fill", "zero", "zeros", "ones", "full")  # do not read the first tensor
SCATTERS = ("scatter_add", "scatter", "index_put", "index_add", "index_copy", "_index_put_impl")  # write as they read
PICKS = ("index_select", "gather", "index", "embedding")  # read as much as they return, not the whole table
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "lift_fresh",
        "_unsafe_view", "detach", "resize", "set")  # fmt: skip
PLAIN = 0.35  # of the overhead: without autograd and modules (a view: 1.5 us where the overhead was 4.1 us)
PER_ROW = 4  # operations that a row costs in an update: views of its parts, its norm, accounting
DIRTY = 0.2  # Linux's default for dirty_ratio


class Clock:
    """Sums the seconds of operations by phase, for one traced step of one model."""

    def __init__(self, rates: Rates):
        self.rates = rates
        self.phases: dict[str, float] = {}
        self.phase, self.operations, self.times, self._overhead = "", 0, 1.0, rates.overhead

    def add(self, phase: str, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        if func._schema.name.startswith("prim::"):  # queries of a fake tensor's device; real tensors have none
            return
        self.operations += 1
        self.spend(self._overhead + work(self.rates, func, args, kwargs, out), phase)

    def spend(self, seconds: float, phase: str | None = None) -> None:
        """Adds seconds, times the current repetitions, to `phase` (default: the last one)."""
        self.phase = self.phase if phase is None else phase
        self.phases[self.phase] = self.phases.get(self.phase, 0.0) + seconds * self.times

    def transfer(self, size: float, operations: int = 0) -> None:
        """Adds a transfer of `size` bytes of a table in so many operations that `add` does not see."""
        self.spend(self.rates.transfer_seconds(size) + operations * self._overhead)

    @contextlib.contextmanager
    def repeated(self, times: float) -> Iterator[None]:
        """Operations within it count `times` times: one stands for many equal ones.

        Such loops are inside autograd functions, where neither autograd nor a module adds to an operation.
        """
        before, self.times = (self.times, self._overhead), self.times * times
        self._overhead = PLAIN * self.rates.overhead
        try:
            yield
        finally:
            self.times, self._overhead = before

    def forget(self) -> None:
        self.phases, self.operations = {}, 0


def row_update(rates: Rates, size: int, rows: float, copies: bool) -> float:
    """Seconds in which Adam steps `rows` rows of a table with `size` bytes of values each, as copies or in place
    (tiered/adam.py), after the norm of their gradients was taken."""
    seconds = 8 * size / rates.update
    if not copies:
        return rows * (seconds + PER_ROW * rates.overhead)
    return rows * (seconds + rates.overhead + 7 * rates.transfer_seconds(2 * size))


def written_back(changed: float, free: int, rates: Rates) -> float | None:
    """Least seconds of writing the `changed` bytes of a table per step to its file; None if the disk's rate is unknown.

    The kernel writes them during the step. It makes the process wait when more than its `dirty_ratio` of the `free`
    memory (bytes) is unwritten.
    """
    if changed <= DIRTY * max(0, free):
        return 0.0
    return (changed - DIRTY * max(0, free)) / rates.disk["write"] if rates.disk.get("write") else None


def read_again(mapped: int, free: int, micro_batches: int) -> int:
    """Bytes of a mapped base that a step reads from the disk: those beyond `free` memory, in each pass.

    The forward and the backward pass of each micro-batch read the whole base.
    """
    return max(0, mapped - max(0, free)) * 2 * micro_batches


def work(rates: Rates, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> float:
    """Seconds of one operation beyond the overhead of starting it."""
    space, _, name = func._schema.name.partition("::")
    inputs = {key: value for key, value in kwargs.items() if key != "out"}
    first, rest = list(_tensors(args[:1])), list(_tensors((args[1:], inputs)))
    read, made = first + rest, list(_tensors(out))
    if name.startswith("_foreach_") and not made:  # in place
        made = first
    if name.startswith("_fused_"):  # adam, adamw, sgd: reads 4 tensors of each parameter and writes 3 of them
        return _size(read) * 7 / 4 / rates.update
    if name in FREE or func.is_view or not made:
        return 0.0
    dtype = _name(made[0].dtype)
    if space != "aten":
        return _foreign(rates, name, read, made)
    if formula := FLOPS.get(func._overloadpacket):
        flops = formula(*args, **inputs, out_val=out)
        if "attention" in name:
            return rates.attention_seconds(dtype, flops)
        return max(rates.product_seconds(dtype, flops), rates.transfer_seconds(_size(read) + _size(made)))
    name = name.removeprefix("_foreach_").rstrip("_")
    if name in RANDOM:
        return sum(t.numel() for t in made) / rates.random
    if name in PICKS:
        read = made + rest
    elif name in OVERWRITES:
        read = rest
    elif name in SCATTERS:
        read = made = rest
    elif name.startswith("_embedding_bag"):  # sums of as many rows as there are indices
        (weight, indices), made = args[:2], made[:1]
        return rates.transfer_seconds(indices.numel() * _size([weight[:1]]) + _size(made))
    return rates.transfer_seconds(_size(read) + _size(made))


def _foreign(rates: Rates, name: str, read: list[Tensor], made: list[Tensor]) -> float:
    """An operation outside PyTorch: a product, also on packed weights of bitsandbytes, or their unpacking."""
    result, seconds = made[0], 0.0
    packed = next((t for t in read if t.dtype == torch.uint8 and t.numel() > 1), None)
    if packed is not None and rates.unpacking:
        seconds = 2 * packed.numel() / rates.unpacking  # two weights a byte
    if any(word in name for word in ("mm", "gemv", "matmul", "linear", "rows_by_expert")) and result.dim() > 1:
        flops = 2 * read[0].numel() * result.shape[-1]
        return seconds + rates.product_seconds(_name(result.dtype), flops)
    return seconds or rates.transfer_seconds(_size(read) + _size(made))


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (item for item in tree_iter(tree) if isinstance(item, Tensor))


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory that they cover: an expanded dimension is there once."""
    total = 0
    for tensor in tensors:
        count = tensor.element_size()
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            count *= size if stride else min(size, 1)
        total += count
    return total


def _name(dtype: torch.dtype) -> str:
    """The type whose rates count: narrow integers as bf16, wide ones as fp32."""
    if dtype.is_floating_point:
        return str(dtype).removeprefix("torch.")
    return "bfloat16" if dtype.itemsize < 4 else "float32"
