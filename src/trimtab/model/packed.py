"""The form of nf4 weights that decodes fast on a CPU: bitsandbytes' kernel for AVX512-BF16, which multiplies the 4-bit
codes themselves. The ordinary form is dequantised before each product, whatever the number of rows.

The kernel needs the codes in another order, and scales in bf16. The order is a permutation of half bytes, which is
undone exactly; the scales are rounded, so the ordinary ones stay beside them. A weight therefore exists once, in one of
two orders, and `hold` costs 2 bytes per block of 64 weights.

    ordinary    byte (n, k):          W[n, 2k] << 4 | W[n, 2k+1]
    packed      byte (g, k, 2b + j):  W[32g + 16 + b, 2k + j] << 4 | W[32g + b, 2k + j]      b < 16, j < 2
    scales      ordinary (N, K/64) as bf16, transposed

Reading `linear.weight`, taking a state dict, or a pass that needs gradients brings that linear's ordinary form back
first. So nothing but `product` ever sees the other order. bitsandbytes' own packing cannot be undone exactly
(model/freeze.py), and takes 12 times as long.

N out, K in, T tokens (all leading dimensions).
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quiet import silence_libraries

STATE = "trimtab_packed"  # attribute of a packed linear: its _State
MOST = 1024  # tokens beyond which dequantising is faster (benchmarks/nf4_decode.py)
PAYS = 3  # new tokens from which packing and unpacking cost less than they save (benchmarks/nf4_decode.py)
GROUP, HALF = 32, 16  # rows of the kernel's group, and those in its lower half bytes


@functools.cache
def available() -> bool:
    """Whether this CPU has the kernel, and the kernel reads this file's order (tested on a small weight)."""
    with silence_libraries():
        try:
            from bitsandbytes.functional import dequantize_4bit, has_avx512bf16, quantize_4bit
        except ImportError:
            return False
    if not has_avx512bf16():
        return False
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        codes, state = quantize_4bit(torch.randn(2 * GROUP, 128, dtype=torch.bfloat16), quant_type="nf4")
        x_TK = torch.randn(3, 128, dtype=torch.bfloat16)
    wanted_TN = F.linear(x_TK, dequantize_4bit(codes, state)).float()
    found_TN = _multiply(x_TK, to_packed(codes, state.shape), _for_kernel(state)).float()
    return bool((found_TN - wanted_TN).norm() < 0.02 * wanted_TN.norm())


def pays(new: int) -> bool:
    """Whether packing is worth it for replies of up to `new` tokens."""
    return new >= PAYS


def packable(model: nn.Module) -> list[nn.Module]:
    """The linears of `model` that the kernel can multiply: nf4, computed in bf16, on a CPU, of whole groups."""
    shared = Counter(id(module._parameters.get("weight")) for module in model.modules())
    return [m for m in model.modules() if shared[id(m._parameters.get("weight"))] == 1 and _suits(m)]


def _suits(linear: nn.Module) -> bool:
    weight = linear._parameters.get("weight")
    state: Any = getattr(weight, "quant_state", None)
    if weight is None or state is None or state.quant_type != "nf4" or weight.device.type != "cpu":
        return False
    if getattr(linear, "compute_dtype", None) is not torch.bfloat16 or len(state.shape) != 2:
        return False
    ordinary = not is_packed(linear) and not getattr(state, "packing_format_for_cpu", False)
    return ordinary and state.shape[0] % GROUP == 0 and state.shape[1] % state.blocksize == 0


@contextlib.contextmanager
def hold(model: nn.Module) -> Iterator[None]:
    """Within it, the model's 4-bit linears are packed for decoding. They are as before afterwards, bit for bit.

    One after the other is packed, so that the most memory is one weight more. Nothing happens without the kernel.
    """
    try:
        if available():
            for linear in packable(model):
                pack(linear)
        yield
    finally:
        unpack_all(model)


def is_packed(linear: nn.Module) -> bool:
    return STATE in vars(linear)


def scales(linear: nn.Module) -> Tensor:
    """What a packed linear has beside its ordinary tensors."""
    return vars(linear)[STATE].kernel.absmax


def scales_bytes(model: nn.Module) -> int:
    """Bytes that the packed form of `model` uses more than the ordinary one."""
    states = (linear._parameters["weight"].quant_state for linear in packable(model))  # type: ignore[union-attr]
    return sum(2 * state.shape.numel() // state.blocksize for state in states)


def any_packed(model: nn.Module) -> bool:
    return any(map(is_packed, model.modules()))


def unpack_all(model: nn.Module) -> None:
    for module in model.modules():
        unpack(module)


class _State:
    """Of a packed linear: the kernel's QuantState, and the codes in the ordinary order while the weight is written."""

    def __init__(self, kernel: Any, ordinary: Tensor | None):
        self.kernel, self.ordinary = kernel, ordinary


def pack(linear: nn.Module) -> None:
    """Write the linear's codes in the kernel's order, in place: another allocation would leave holes in the heap. An
    interrupt at any point leaves what `unpack` undoes, and what computes the same until then."""
    weight: Any = linear._parameters["weight"]
    codes = to_packed(weight.data, weight.quant_state.shape)
    setattr(linear, STATE, _State(_for_kernel(weight.quant_state), weight.data.clone()))
    linear.__class__ = _decoding(type(linear))
    weight.data.copy_(codes)
    vars(linear)[STATE].ordinary = None


def unpack(linear: nn.Module) -> None:
    """Undo `pack`, or what an interrupted one has done."""
    if not is_packed(linear):
        return
    state = vars(linear)[STATE]
    if state.ordinary is None:
        state.ordinary = ordinary_codes(linear)
    linear._parameters["weight"].data.copy_(state.ordinary)  # type: ignore[union-attr]
    if isinstance(linear, _Decoding):
        linear.__class__ = type(linear).__bases__[1]
    delattr(linear, STATE)


class _Decoding:
    """Mixed into the class of a packed linear."""

    @property
    def weight(self: Any) -> Any:
        unpack(self)
        return self.weight

    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            unpack(self)
            return self.forward(x)
        return product(self, x.to(self.compute_dtype)).to(x.dtype)

    def _save_to_state_dict(self: Any, *args: Any) -> None:
        unpack(self)
        self._save_to_state_dict(*args)


@functools.cache
def _decoding(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Decoding, kind), {"__module__": kind.__module__})


def few(linear: nn.Module, x_TK: Tensor) -> bool:
    """Whether `product` uses the kernel for `x`: the linear is packed, and x is in bf16, without gradients."""
    if not is_packed(linear) or vars(linear)[STATE].ordinary is not None or x_TK.dtype is not torch.bfloat16:
        return False
    return x_TK.numel() <= MOST * x_TK.shape[-1] and not (torch.is_grad_enabled() and x_TK.requires_grad)


def product(linear: nn.Module, x_TK: Tensor) -> Tensor:
    """x W^T + b of a packed linear, a new tensor: by the kernel, or dequantised if `x` has many tokens."""
    bias = None if linear.bias is None else linear.bias.to(x_TK.dtype)
    if not few(linear, x_TK):
        return F.linear(x_TK, dense_weight(linear, x_TK.dtype), bias)
    y_TN = _multiply(x_TK, linear._parameters["weight"].data, vars(linear)[STATE].kernel)  # type: ignore
    return y_TN if bias is None else y_TN.add_(bias)


def dense_weight(linear: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of a packed linear, (N, K): what the ordinary form is dequantised to, bit for bit."""
    from bitsandbytes.functional import dequantize_4bit

    state = linear._parameters["weight"].quant_state  # type: ignore[union-attr]
    dense_NK = dequantize_4bit(ordinary_codes(linear), state)
    return dense_NK if dtype is None else dense_NK.to(dtype)


def ordinary_codes(linear: nn.Module) -> Tensor:
    """The codes of a packed linear in the ordinary order."""
    weight: Any = linear._parameters["weight"]
    if vars(linear)[STATE].ordinary is not None:
        return vars(linear)[STATE].ordinary
    rows, columns = weight.quant_state.shape
    bytes_GKR = weight.data.view(torch.uint8).view(rows // GROUP, columns // 2, GROUP)
    even, odd = bytes_GKR.transpose(1, 2).contiguous().view(rows // GROUP, HALF, 2, columns // 2).unbind(2)
    low, high = even << 4 | odd & 0xF, even & 0xF0 | odd >> 4
    return torch.stack([low, high], 1).view(-1).view(weight.dtype).view(weight.shape)


def to_packed(codes: Tensor, shape: torch.Size) -> Tensor:
    """Codes in the ordinary order -> in the kernel's, of the same shape."""
    rows, columns = shape
    halves = codes.view(torch.uint8).view(rows // GROUP, 2, HALF, columns // 2)
    low, high = halves.unbind(1)
    even, odd = low >> 4 | high & 0xF0, low & 0xF | high << 4
    bytes_GRK = torch.stack([even, odd], 2).view(rows // GROUP, GROUP, columns // 2)
    return bytes_GRK.transpose(1, 2).contiguous().view(-1).view(codes.dtype).view(codes.shape)


def _for_kernel(state: Any) -> Any:
    """A quantised weight's state with the scales that the kernel reads."""
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    scales_NK = scales.view(state.shape[0], state.shape[1] // state.blocksize)
    return QuantState(
        scales_NK.t().to(torch.bfloat16).contiguous(), state.shape, state.code, state.blocksize, state.quant_type,
        torch.bfloat16,
    )  # fmt: skip


def _multiply(x_TK: Tensor, packed: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import gemv_4bit

    if not x_TK.numel():
        return x_TK.new_empty(*x_TK.shape[:-1], state.shape[0])
    return gemv_4bit(x_TK.contiguous(), packed, state=state)
