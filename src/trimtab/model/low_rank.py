"""The product of a frozen linear and a low-rank adapter, and what it keeps for the backward pass.

    y = W x + s B A x        dA = (s dy B)^T x        dB = s dy^T (A x)

T tokens (all leading dimensions), I in, O out, R rank. A that is trained needs x, (T, I). A that is frozen (LoRA-FA,
arXiv 2308.03303) needs only A x, (T, R). `Codes` (VeLoRA, arXiv 2405.17991) keeps of x one number for each of M groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import quant
from .shared_slice import SharedSlice

NUDGE = 1e-8  # added to the diagonal of A A^T before it is inverted, as in peft


class LowRank(torch.autograd.Function):
    """The equations above in the dtype of x. `code_TM`, `v_D`: what `Codes` keeps of x; `code_scale`: dA's factor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor, base: nn.Module, scale: float,
        code_TM: Tensor | None = None, v_D: Tensor | None = None, code_scale: float = 1.0,
    ) -> Tensor:  # fmt: skip
        y = quant.product(base, x)
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        low_TR = x_TI @ a_RI.to(x.dtype).T
        y_TO.addmm_(low_TR, b_OR.to(x.dtype).T, alpha=scale)
        whole = x if ctx.needs_input_grad[1] and code_TM is None else None
        ctx.save_for_backward(low_TR, a_RI, b_OR, whole, code_TM, v_D)
        ctx.base, ctx.scale, ctx.code_scale, ctx.shape = base, scale, code_scale, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        low_TR, a_RI, b_OR, x, code_TM, v_D = ctx.saved_tensors
        dy_TO = dy.reshape(-1, dy.shape[-1])
        dx = d_a_RI = d_b_OR = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            slope_TR = (dy_TO @ b_OR.to(dy.dtype)).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ quant.dense_weight(ctx.base, dy.dtype)
            dx = dx_TI.addmm_(slope_TR, a_RI.to(dy.dtype)).view(ctx.shape)
        if ctx.needs_input_grad[1] and code_TM is None:
            d_a_RI = (slope_TR.T @ x.reshape(-1, ctx.shape[-1])).to(a_RI.dtype)
        elif ctx.needs_input_grad[1]:  # x is never rebuilt: (slope^T code) of each group, along v
            along_RM = (slope_TR.T @ code_TM).to(a_RI.dtype) * ctx.code_scale
            d_a_RI = (along_RM[:, :, None] * v_D.to(a_RI.dtype)).flatten(1)[:, : ctx.shape[-1]]
        if ctx.needs_input_grad[2]:
            d_b_OR = (low_TR.T @ dy_TO).T.to(b_OR.dtype) * ctx.scale
        return dx, d_a_RI, d_b_OR, None, None, None, None, None


class Codes:
    """VeLoRA's compression of one input (2405.17991, section 3.2, algorithm 1), shared by all linears that read it.

    x is cut into `groups` parts of D numbers, the last one padded with zeros. Of each part only its product with a
    vector v of length 1 is kept; in the backward pass the part is that number times v.
    `init`: v is the mean part of the batch ("batch_average"), of the first batch ("batch_average_once"), or "random".
    """

    def __init__(self, groups: int, width: int, init: str, fixed: Callable[[], Tensor]):
        self.groups, self.width, self.size = groups, width, -(-width // groups)
        self.init, self.fixed = init, fixed  # `fixed()`: the tensor (D,) in which v stays; zeros: not yet set
        self.directions, self.codes = SharedSlice(), SharedSlice()

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """-> code (T, M) and v (D,), in the dtype of `x`."""
        v_D = self.directions.take(x, self._direction)
        return self.codes.take(x, lambda x: self._parts(x) @ v_D), v_D

    def _parts(self, x: Tensor) -> Tensor:
        """-> (T, M, D)"""
        x_TI = x.reshape(-1, self.width)
        if missing := self.groups * self.size - self.width:
            x_TI = F.pad(x_TI, (0, missing))
        return x_TI.view(-1, self.groups, self.size)

    def _direction(self, x: Tensor) -> Tensor:
        if self.init != "batch_average" and self.fixed().any():
            return self.fixed().to(x.dtype)
        v_D = unit(self._parts(x).mean((0, 1)))
        if self.init != "batch_average":
            self.fixed().copy_(v_D)
        return v_D.to(x.dtype)


def unit(v_D: Tensor) -> Tensor:
    """`v_D` at length 1 in fp32; of zeros, equal numbers."""
    length = torch.linalg.vector_norm(v_D, dtype=torch.float32)
    return torch.where(length > 0, v_D.float() / length, v_D.shape[0] ** -0.5)


def corrected(a_RI: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
    """A hook for the gradient g of B, (O, R): g (A A^T)^-1 / s^2. Of all steps of B it is the one for which the step of
    s B A is nearest to the weight's own gradient (peft's LoRA-FA optimizer). A is frozen, so it is inverted once."""
    known: dict[tuple[int, int], Tensor] = {}

    def hook(g_OR: Tensor) -> Tensor:
        state = (a_RI._version, a_RI.data_ptr())
        if state not in known:
            known.clear()
            a = a_RI.detach().float()
            known[state] = torch.linalg.pinv(a @ a.T + NUDGE * torch.eye(len(a), device=a.device)) / scale**2
        return g_OR @ known[state].to(g_OR.dtype)

    return hook
