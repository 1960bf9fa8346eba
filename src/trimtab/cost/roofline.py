"""Seconds of a training step, from its operations and this machine's rates.

As the planner's trace runs a step on fake tensors (cost/trace.py), each operation is turned into seconds: products
and fused attention by their floating-point operations over the rate measured for their type and shape, all others by
the bytes they read and write over the rate measured for their kind. Each costs the overhead of starting it besides;
views cost nothing else. Recomputed blocks, autocast's casts and the optimiser's update are in it because the trace runs
them. Seconds add up phase by phase and are, like bytes, linear in the depth of a stack of equal blocks.

What is left out: work that the trace does not see (data loading, logging, kernels' own choices by value), and any
change of speed while a machine runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from .rates import Rates

KINDS: dict[str, tuple[str, ...]] = {  # kind of traffic -> operations, without their "aten::" and trailing underscore
    "function": ("exp", "log", "silu", "gelu", "tanh", "sigmoid", "erf", "pow", "_softmax", "_log_softmax", "sin",
                 "cos", "silu_backward", "gelu_backward", "tanh_backward", "sigmoid_backward", "softplus", "log1p",
                 "native_layer_norm", "native_layer_norm_backward", "softmax"),
    "random": ("native_dropout", "bernoulli", "rand", "rand_like", "randn", "randn_like", "uniform", "normal"),
    "reduction": ("sum", "mean", "linalg_vector_norm", "norm", "amax", "amin", "max", "min", "argmax", "argmin",
                  "all", "any", "var_mean", "logsumexp", "cumsum"),
    "select": ("where", "masked_fill", "gt", "lt", "ge", "le", "eq", "ne", "clamp", "clamp_min", "relu",
               "threshold_backward", "bitwise_and", "bitwise_or", "bitwise_not", "logical_and", "logical_not",
               "triu", "tril", "nonzero", "masked_select", "isin"),
    "index": ("index_select", "gather", "index", "embedding", "scatter_add", "scatter", "index_put", "_index_put_impl",
              "index_add", "index_copy", "embedding_dense_backward", "index_fill", "sort", "topk"),
}  # fmt: skip
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
WRITES_ONLY = ("copy", "fill", "zero", "zeros", "ones", "full", "scatter_add", "scatter", "index_put", "index_add",
               "index_copy", "_index_put_impl")  # fmt: skip
PICKS = ("index_select", "gather", "index", "embedding")  # read as much as they give, not the whole table
PLAIN = 0.35  # of an operation's overhead: its Python and its dispatch (a view: 1.5 us where the overhead was 4.1 us)
PER_ROW = 4  # operations' overhead that a row costs in an update: views of its parts, its norm, the account of it
DIRTY = 0.2  # Linux's default for dirty_ratio
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "lift_fresh",
        "_unsafe_view", "detach", "resize", "set")  # fmt: skip


class Clock:
    """Seconds of the operations it is shown, by phase. One traced step of one model."""

    def __init__(self, rates: Rates):
        self.rates = rates
        self.phases: dict[str, float] = {}
        self.phase, self.operations, self.times, self._overhead = "", 0, 1.0, rates.overhead

    def add(self, phase: str, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        if func._schema.name.startswith("prim::"):  # a fake tensor is asked where it is, a real one is not
            return
        self.operations += 1
        self.spend(self._overhead + work(self.rates, func, args, kwargs, out), phase)

    def spend(self, seconds: float, phase: str | None = None) -> None:
        """Of what is in hand in `phase` (default: the one that was seen last), as often as it comes."""
        self.phase = self.phase if phase is None else phase
        self.phases[self.phase] = self.phases.get(self.phase, 0.0) + seconds * self.times

    def moved(self, size: float, operations: int = 0) -> None:
        """Bytes of a table that are read or written in so many operations beside those that are shown."""
        self.spend(self.rates.far("plain", size) + operations * self._overhead)

    @contextlib.contextmanager
    def repeated(self, times: float) -> Iterator[None]:
        """What is shown within it comes so often in a step: one of many that are alike stands for them.

        Such loops stand in functions of our own, where neither autograd nor a module adds to an operation.
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
    """Seconds in which Adam steps `rows` rows of a table with `size` bytes of values each, as copies or where they lie
    (row_adam.py), and their gradients' norm is taken before."""
    moved = 7 * size / rates.update + rates.far("reduction", size)
    if not copies:
        return rows * (moved + PER_ROW * rates.overhead)
    return rows * (moved + rates.overhead + 7 * rates.far("index", 2 * size))


def written_back(dirty: float, room: int, rates: Rates) -> float | None:
    """Seconds that writing a table's changed pages to its file takes at least, of which a step changes `dirty` bytes.

    The kernel writes them beside the step. It makes the process wait where more than its `dirty_ratio` of the memory
    that is there would be unwritten; None: how fast the disk is is not known.
    """
    if dirty <= DIRTY * max(0, room):
        return 0.0
    return (dirty - DIRTY * max(0, room)) / rates.disk["write"] if rates.disk.get("write") else None


def read_again(mapped: int, room: int, micro_batches: int) -> int:
    """Bytes of a mapped base that a step reads from the disk: what `room` cannot keep is read on each way through it.

    The pass forward and the pass back of each micro-batch go through the whole base.
    """
    return max(0, mapped - max(0, room)) * 2 * micro_batches


def work(rates: Rates, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> float:
    """Seconds of one operation beyond the overhead of starting it."""
    space, _, name = func._schema.name.partition("::")
    if space != "aten":
        return _foreign(rates, name, args, out)
    if name in PRODUCTS:
        return PRODUCTS[name](rates, args, out)
    if "attention" in name:
        return _attention(rates, func._schema, args, kwargs)
    if name in FREE or func.is_view:
        return 0.0
    if name.startswith("_embedding_bag"):  # sums of as many rows as there are indices
        (weight, indices), made = args[:2], out[0]
        return rates.moved(_name(made.dtype), "index", indices.numel() * _bytes(weight[:1]) + _bytes(made))
    if name.startswith("_fused_"):  # adam, adamw, sgd: the update of all parameters at once
        return _size(_tensors((args, kwargs))) * 7 / 4 / rates.update  # reads 4 tensors, writes 3 of them
    return _traffic(rates, name.removeprefix("_foreach_").rstrip("_"), args, kwargs, out)


def _product(rates: Rates, a: Tensor, b: Tensor, batch: int = 1) -> float:
    """(m, k) times (k, n); of a batch the rows are counted together, since the kernel deals them out alike."""
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    turned_a, turned_b = a.stride(-1) != 1 and m > 1 and k > 1, b.stride(-1) != 1 and k > 1 and n > 1
    layout = "TN" if turned_a else "NT" if turned_b else "NN"
    return rates.product(_name(a.dtype), layout, m * batch, k, n)


def _linear(rates: Rates, args: tuple, out: Tensor) -> float:
    x, weight = args[0], args[1]
    return rates.product(_name(x.dtype), "NT", x.numel() // x.shape[-1], x.shape[-1], weight.shape[0])


def _convolution(rates: Rates, args: tuple, out: Tensor) -> float:
    weight = args[1]
    return rates.product(
        _name(out.dtype), "NT", out.numel() // out.shape[1], weight.numel() // weight.shape[0], out.shape[1]
    )


PRODUCTS: dict[str, Callable[..., float]] = {
    "mm": lambda rates, args, out: _product(rates, args[0], args[1]),
    "addmm": lambda rates, args, out: _product(rates, args[1], args[2]),
    "addmm_": lambda rates, args, out: _product(rates, args[1], args[2]),
    "bmm": lambda rates, args, out: _product(rates, args[0], args[1], args[0].shape[0]),
    "baddbmm": lambda rates, args, out: _product(rates, args[1], args[2], args[1].shape[0]),
    "baddbmm_": lambda rates, args, out: _product(rates, args[1], args[2], args[1].shape[0]),
    "mv": lambda rates, args, out: _product(rates, args[0], args[1][:, None]),
    "linear": _linear,
    "convolution": _convolution,
}


def _attention(rates: Rates, schema: Any, args: tuple, kwargs: dict[str, Any]) -> float:
    """Queries (B, H, T, D) and keys (B, H, S, D): two products of the square forward, five back."""
    given = {**dict(zip((argument.name for argument in schema.arguments), args, strict=False)), **kwargs}
    query, key, backward = given["query"], given["key"], "backward" in schema.name
    flops = 4 * query.numel() * key.shape[-2] * (2.5 if backward else 1)
    return rates.attend(_name(query.dtype), bool(given.get("is_causal")), backward, flops)


def _traffic(rates: Rates, name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> float:
    read, written = list(_tensors((args, {k: v for k, v in kwargs.items() if k != "out"}))), list(_tensors(out))
    if not written:
        return 0.0
    if name in PICKS:
        read = [*written, *read[1:]]
    elif name in WRITES_ONLY:
        read = read[1:] if len(read) > 1 else []
        if name not in ("copy", "fill", "zero", "zeros", "ones", "full"):  # they touch as much as they are given
            written = read
    kind = KIND_OF.get(name, "plain")
    widest = max((*read, *written), key=_bytes, default=None)
    if widest is None:
        return 0.0
    if kind == "plain" and any(_turned(t) for t in read if t.numel() * 2 > widest.numel()):
        kind = "turned"
    return rates.moved(_name(widest.dtype), kind, _size(read) + _size(written))


def _foreign(rates: Rates, name: str, args: tuple, out: Any) -> float:
    """Operations of other libraries: bitsandbytes' products on packed weights, and the unpacking of these."""
    tensors, made = list(_tensors(args)), list(_tensors(out))
    if not made:
        return 0.0
    result = made[0]
    packed = next((t for t in tensors if not t.is_floating_point() and t.numel() > 1), None)
    kind = "int8" if "int8" in name else "nf4"
    unpacking = 0.0
    if packed is not None and kind in rates.quantised:
        unpacking = packed.numel() * (2 if kind == "nf4" else 1) / rates.quantised[kind]
    if any(word in name for word in ("gemm", "gemv", "matmul", "linear", "mm")) and result.dim() > 1:
        x = tensors[0]
        rows, wide = x.numel() // x.shape[-1], x.shape[-1]
        dtype = _name(result.dtype if result.is_floating_point() else torch.bfloat16)
        return unpacking + rates.product(dtype, "NT", rows, wide, result.shape[-1])
    return unpacking or rates.moved(_name(result.dtype), "plain", _size(tensors) + _size(made))


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (item for item in tree_iter(tree) if isinstance(item, Tensor))


def _bytes(tensor: Tensor) -> int:
    """Of memory that it covers: an expanded dimension is there once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(map(_bytes, tensors))


def _turned(tensor: Tensor) -> bool:
    """Whether its rows do not lie in memory one number after the other."""
    return tensor.dim() > 1 and tensor.shape[-1] > 1 and tensor.stride(-1) > 1


def _name(dtype: torch.dtype) -> str:
    """The type whose rates count: narrow whole numbers move like 16-bit ones, wide ones like fp32."""
    if dtype.is_floating_point:
        return str(dtype).removeprefix("torch.")
    return "bfloat16" if dtype.itemsize < 4 else "float32"
