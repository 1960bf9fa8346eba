"""A frozen linear with a sparse change: y = x (W + S)^T, where S has K entries that are trained.

    y = x (W + S)^T + b        dx = dy (W + S)        dS[j] = sum over tokens of dy[:, row_j] x[:, column_j]

The base W is never written. W + S exists for the duration of one product, in the dtype of the product, as the weight of
any mixed-precision training does; the values themselves are fp32. So a merged model computes the same. For few tokens
without gradients (decoding) S is added to the output of W instead, which reads W once. Backward saves the input and the
values only, and forms no gradient of W if S is sparse enough.

Shapes: T tokens (all leading dimensions), I in, O out, K entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import anatomy, packed, quant
from .sparse_delta import Part, Pattern
from .surgery import ModulePatch

FEW, FEW_PACKED = 16, 128  # tokens up to which S is added to the output; of a 4-bit base that is packed for decoding
SPARSE = 0.01  # share of entries up to which dS is computed entry by entry: beyond it one dense product is faster
CHUNK = 2**20  # elements of the input that are gathered at once


class SparseLinear(ModulePatch):
    """A frozen linear (`base`) with the sparse change `values` at the entries of `pattern`.

    `variants`: within a pass without gradients, the values for each of several equal groups of rows of the batch.
    """

    def __init__(self, base: nn.Module, entries: int):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = anatomy.widths(base)
        self.quantised = quant.is_quantised(base)
        device = base.weight.device
        self.values = nn.Parameter(torch.zeros(entries, device=device))
        self.register_buffer("columns", torch.zeros(entries, dtype=torch.int32, device=device))
        self.register_buffer("counts", torch.zeros(self.out_features, dtype=torch.int32, device=device))
        self.variants: Sequence[Tensor] | None = None

    def extra_repr(self) -> str:
        return f"{len(self.values):,} entries of {self.out_features} x {self.in_features}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.columns, self.counts, self.shape)

    def set_pattern(self, pattern: Pattern) -> None:
        """New entries, with values of zero. The parameter stays the same object."""
        self.columns, self.counts = pattern.columns.to(self.columns.device), pattern.counts.to(self.counts.device)
        resize(self.values, self.values.data.new_zeros(len(pattern)))

    def part(self) -> Part:
        return Part(self.pattern, self.settled().detach().float())

    def effective(self) -> Tensor:
        """The values that are added, (K,); a method may derive them from its parameters, and add noise in training."""
        return self.values

    def settled(self) -> Tensor:
        """The values without noise: those that are merged and exported."""
        return self.effective()

    def forward(self, x_TI: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x_TI.device.type):
            x_TI = x_TI.to(torch.get_autocast_dtype(x_TI.device.type))
        if self.variants is not None:
            groups = x_TI.chunk(len(self.variants))
            return torch.cat([self._product(x, v) for x, v in zip(groups, self.variants, strict=True)])
        values = self.effective()
        if torch.is_grad_enabled() and (x_TI.requires_grad or values.requires_grad):
            return _Sparse.apply(x_TI, values, self)
        return self._product(x_TI, values)

    def _product(self, x_TI: Tensor, values_K: Tensor) -> Tensor:
        few = (FEW_PACKED if packed.few(self.base, x_TI) else 0) if self.quantised else FEW
        if x_TI.numel() > few * self.in_features:
            return quant.product(self.base, x_TI, self.weight_with(values_K, x_TI.dtype))
        y_TO = quant.product(self.base, x_TI)
        columns_IT = x_TI.reshape(-1, self.in_features).t().contiguous()
        added_OT = F.embedding_bag(
            self.columns, columns_IT, self.pattern.starts, mode="sum", per_sample_weights=values_K.to(x_TI.dtype)
        )
        return y_TO + added_OT.t().reshape(y_TO.shape)

    def weight_with(self, values_K: Tensor, dtype: torch.dtype) -> Tensor:
        """A new W + S, (O, I), contiguous."""
        weight_OI = quant.dense_weight(self.base, dtype)
        if not self.quantised or not weight_OI.is_contiguous():
            weight_OI = weight_OI.clone(memory_format=torch.contiguous_format)
        with torch.no_grad():
            weight_OI.view(-1).index_add_(0, self.pattern.flat, values_K.detach().to(dtype))
        return weight_OI

    @property
    def weight(self) -> Tensor:
        """The effective weight, for models that read a linear's weight (Mamba); gradients reach the values."""
        dtype = torch.bfloat16 if self.quantised else self.base.weight.dtype
        weight_OI = quant.dense_weight(self.base, dtype).reshape(-1)
        weight_OI = weight_OI.index_add(0, self.pattern.flat, self.effective().to(dtype)).view(self.shape)
        return weight_OI.t() if isinstance(self.base, anatomy.Conv1D) else weight_OI

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def merge_into_base(self) -> nn.Module:
        """The linear that replaces this one after merging: the base (dequantised if needed) plus the change."""
        linear = quant.dense_linear(self.base) if self.quantised else self.base
        weight_OI = anatomy.dense_view(linear).data
        weight_OI.copy_(self.weight_with(self.settled(), weight_OI.dtype))
        return linear


def resize(parameter: nn.Parameter, data: Tensor) -> None:
    """Gives a parameter data of another shape. While a graph that has the parameter is alive, autograd would check the
    next gradient against the old shape; a change of dtype on the way makes it forget that."""
    parameter.data = torch.empty(0, dtype=torch.float16, device=data.device)
    parameter.data = data
    parameter.grad = None


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI: Tensor, values_K: Tensor, layer: SparseLinear) -> Tensor:
        ctx.save_for_backward(x_TI if ctx.needs_input_grad[1] else x_TI.new_empty(0), values_K)
        ctx.layer = layer
        bias = None if layer.base.bias is None else layer.base.bias.to(x_TI.dtype)
        return F.linear(x_TI, layer.weight_with(values_K, x_TI.dtype), bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        layer: SparseLinear = ctx.layer
        x_TI, values_K = ctx.saved_tensors
        dy_TO = dy.reshape(-1, layer.out_features)
        dx = d_values = None
        if ctx.needs_input_grad[0]:
            dx = (dy_TO @ layer.weight_with(values_K, dy.dtype)).view(*dy.shape[:-1], layer.in_features)
        if ctx.needs_input_grad[1]:
            d_values = sampled_product(dy_TO, x_TI.reshape(-1, layer.in_features), layer.pattern).to(values_K.dtype)
        return dx, d_values, None


def sampled_product(dy_TO: Tensor, x_TI: Tensor, pattern: Pattern) -> Tensor:
    """Entries of dy^T x, (K,): each is a sum over the tokens."""
    if len(pattern) > SPARSE * pattern.shape[0] * pattern.shape[1]:
        return (dy_TO.t() @ x_TI).view(-1).index_select(0, pattern.flat)
    rows, columns = pattern.rows, pattern.columns
    dy_OT, x_IT = dy_TO.t().contiguous(), x_TI.t().contiguous()
    found = dy_TO.new_empty(len(pattern))
    step = max(1, CHUNK // max(1, len(x_TI)))
    for start in range(0, len(pattern), step):
        few = slice(start, start + step)
        found[few] = torch.linalg.vecdot(dy_OT.index_select(0, rows[few]), x_IT.index_select(0, columns[few]))
    return found
