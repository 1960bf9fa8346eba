"""EDoRA: Efficient Weight-Decomposed Low-Rank Adaptation via Singular Value Decomposition (Nasiri and Garraghan, arXiv
2501.12067).

DoRA (2402.09353) trains the norm of each row of a weight apart from the row's direction. EDoRA keeps that, and takes
the two wide factors of the direction's change from the weight itself; between them it trains an r x r matrix.

    W  ~  U S V^T            truncated SVD of rank r;   A = S V^T and B = U are frozen
    W' =  diag(m / n) (W + s B R A)                     n_i = || w_i + s b_i R A ||, the norm of row i
    m  =  || w_i ||,  R = 0  before training            s = alpha / r

    W: the frozen weight, (out, in)   A: `a_RI`   B: `b_OR`   R: `core`, (r, r)   m: `magnitude`, (out,)

r^2 + out numbers are trained for each linear. n counts as a constant in the backward pass (DoRA, section 4.3).

The norm costs out x r^2 and never forms an out x in matrix. With P = B R, and with G = W A^T, K = A A^T and
c_i = || w_i ||^2, which are constant since A is frozen:

    n^2 = c + 2 s <P, G> + s^2 <P K, P>                 row by row; exact for any A and B, rounded ones too     (1)

What differs from the paper, and why. R starts at zero, not at noise: A and B are not zero, so gradients reach R, and
the model is unchanged at first. The adapter has R, m and r check numbers for each linear; A and B are computed again
from the base when it is loaded. So the SVD is seeded (randomised subspace iteration, Halko et al. 2011), runs in fp64,
and the largest entry of each column of U is positive. The check numbers are A times a fixed random vector: they tell a
base whose factors have other values, signs or order. The product W x is computed once. A 4- or 8-bit base is supported:
its factors are those of the de-quantised weight. `detach_norm: false` gives the exact gradient of R; by (1) it costs
out x r^2 more (an extension).

Shapes: T tokens (all leading dimensions), I in, O out, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bases.linear import LinearPatch, LinearSurgery
from ..contracts import ModulePatch, Place, Portable
from ..errors import BadInput
from ..model import anatomy, quant
from ..quiet import peft

MORE, SWEEPS = 8, 4  # of the randomised SVD: columns beyond r, and products with W W^T
ZERO = 1e-6  # of the largest singular value: those below count as zero
APART = 1e-2  # of a singular value: by how much a check number may differ when an adapter is loaded
SMALLEST = 1e-24  # n^2 of a row of zeros


@dataclass(frozen=True)
class EDoRA(LinearPatch):
    """Trains an r x r core between the weight's own singular vectors, and each row's norm."""

    paper: ClassVar[str] = "2501.12067"
    defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-3}  # of the paper's grid, 1e-4 to 5e-3
    shards: ClassVar[bool] = True

    r: int = 16  # singular vectors per linear; at most its smaller width
    alpha: float = 16.0  # s = alpha / r (the paper's alpha at each rank)
    detach_norm: bool = True  # the norm is a constant in the backward pass, as in DoRA; false: the exact gradient
    seed: int = 0  # of the SVD

    def apply(self, model: PreTrainedModel, place: Place) -> EDoraSurgery:
        if self.r < 1:
            raise BadInput(f"edora: r: {self.r}", "a rank is at least 1", "Set r to 16, for example")
        if not 0 < self.alpha < math.inf:
            raise BadInput(f"edora: alpha: {self.alpha}", "alpha / r scales the core", "Set alpha to 16, for example")
        for name, linear in anatomy.target_linears(model, self.targets).items():
            if self.r > (most := min(anatomy.widths(linear))):
                wide = " x ".join(map(str, reversed(anatomy.widths(linear))))
                have = f"{name} is {wide}, so its rank is at most {most}"
                raise BadInput(f"edora: r: {self.r}", have, f"Set r to {most} or less, or leave it out of targets")
        notes = anatomy.unreached(model, self.targets)
        surgery = super().apply(model, place)
        surgery.notes = notes
        return surgery

    def surgery(self, model: PreTrainedModel) -> EDoraSurgery:
        return EDoraSurgery(self, model)

    def wrap(self, linear: nn.Module, name: str) -> DecomposedLinear:
        return DecomposedLinear(linear, self, name)


class DecomposedLinear(ModulePatch):
    """A frozen linear (`base`) with the trained `core` and `magnitude`.

    `g_OR`, `k_RR` and `c_O` are the constants of equation (1). They, A and B are not part of the state dict.
    """

    def __init__(self, base: nn.Module, patch: EDoRA, name: str):
        super().__init__()
        self.base, self.patch, self.name = base, patch, name
        self.in_features, self.out_features = anatomy.widths(base)
        self.scale = patch.alpha / patch.r
        self.quantised = quant.is_quantised(base)
        self.dtype = torch.bfloat16 if self.quantised else base.weight.dtype
        r, device = patch.r, base.weight.device
        self.core = nn.Parameter(torch.zeros(r, r, device=device))
        self.magnitude = nn.Parameter(torch.empty(self.out_features, device=device))
        self.register_buffer("check", torch.empty(r, device=device))
        a_RI = torch.empty(r, self.in_features, dtype=self.dtype, device=device)
        constants = {"a_RI": a_RI, "b_OR": a_RI.new_empty(self.out_features, r)}
        constants["g_OR"] = torch.empty(self.out_features, r, device=device)
        constants |= {"k_RR": torch.empty_like(self.core.data), "c_O": torch.empty_like(self.magnitude.data)}
        for key, constant in constants.items():
            self.register_buffer(key, constant, persistent=False)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # core, magnitude and g - 1 of a pass without gradients
        if not a_RI.is_meta:  # a plan has shapes but no values
            self.factorise()

    def extra_repr(self) -> str:
        return f"r={self.patch.r}, scale={self.scale:g}"

    @torch.no_grad()
    def factorise(self) -> None:
        """Compute A, B, the constants of equation (1), m and the check numbers from the base's weight, in fp64."""
        weight_OI = quant.dense_weight(self.base, torch.float64)
        if not weight_OI.isfinite().all():
            raise BadInput(f"edora: {self.name}", "its weight has NaN or infinity", "Use an intact model")
        u_OR, s_R, v_RI = truncated_svd(weight_OI, self.patch.r, self.patch.seed)
        if (rank := int((s_R > ZERO * s_R[0]).sum())) < self.patch.r:
            have = f"only {rank} singular values of {self.name} are above zero"
            raise BadInput(f"edora: r: {self.patch.r}", have, "Set a smaller r, or leave it out of targets")
        a_RI = s_R[:, None] * v_RI
        self.check.copy_(a_RI @ _normal(self.in_features, 1, seed=0).to(a_RI)[:, 0])
        self.a_RI.copy_(a_RI)
        self.b_OR.copy_(u_OR)
        a_RI = self.a_RI.double()  # as rounded
        self.g_OR.copy_(weight_OI @ a_RI.t())
        self.k_RR.copy_(a_RI @ a_RI.t())
        self.c_O.copy_(torch.linalg.vector_norm(weight_OI, dim=1).square())
        self.magnitude.copy_(self.c_O.sqrt())

    def norm(self) -> tuple[Tensor, Tensor]:
        """-> n (out,) by equation (1), and n dn/dP, (out, r)."""
        p_OR = self.b_OR.to(self.core.dtype) @ self.core
        slope_OR = self.scale * (self.g_OR + self.scale * (p_OR @ self.k_RR))
        square_O = self.c_O + (p_OR * (self.scale * self.g_OR + slope_OR)).sum(1)
        return square_O.clamp_min(SMALLEST).sqrt(), slope_OR

    def gain(self) -> Tensor:
        """g - 1 with g = m / n, (out,). It is small: 16 bits represent it, but not g. Without gradients on a CPU, the
        last one is used again if core and magnitude are equal to those that it was computed from."""
        core_RR, magnitude_O = self.core.detach(), self.magnitude.detach()
        if (last := self._last) is not None and torch.equal(last[0], core_RR) and torch.equal(last[1], magnitude_O):
            return last[2]
        with torch.no_grad():
            gain_O = magnitude_O / self.norm()[0] - 1
        keep = not torch.is_grad_enabled() and gain_O.device.type == "cpu"
        self._last = (core_RR.clone(), magnitude_O.clone(), gain_O) if keep else None
        return gain_O

    def forward(self, x_TI: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x_TI.device.type):
            x_TI = x_TI.to(torch.get_autocast_dtype(x_TI.device.type))
        with torch.autocast(x_TI.device.type, enabled=False):  # the norm is computed in the core's precision
            return _Decomposed.apply(x_TI, self.core, self.magnitude, self.gain(), self)

    def whole(self) -> Tensor:
        """W', (out, in), in the core's precision; gradients reach the core and the magnitude."""
        norm_O, _ = self.norm()
        norm_O = norm_O.detach() if self.patch.detach_norm else norm_O
        low_OR = self.scale * (self.b_OR.to(self.core.dtype) @ self.core)
        weight_OI = quant.dense_weight(self.base, self.core.dtype) + low_OR @ self.a_RI.to(self.core.dtype)
        return (self.magnitude / norm_O)[:, None] * weight_OI

    @property
    def weight(self) -> Tensor:
        """The effective weight, for models that read a linear's weight (Mamba)."""
        weight_OI = self.whole().to(self.dtype)
        return weight_OI.t() if isinstance(self.base, anatomy.Conv1D) else weight_OI

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @torch.no_grad()
    def merge_into_base(self) -> nn.Module:
        """The linear that replaces this one after merging: the base (de-quantised if needed) with the weight W'."""
        linear = quant.dense_linear(self.base) if self.quantised else self.base
        anatomy.dense_view(linear).data.copy_(self.whole())
        return linear

    def require_same(self, check: Tensor | None) -> None:
        """BadInput unless the check numbers of a saved adapter, (r,), are those of this base."""
        if check is None or check.shape != self.check.shape:  # `load_tensors` says what is wrong
            return
        apart_R = (check.to(self.check) - self.check).abs() / self.k_RR.diagonal().sqrt()
        if not apart_R.max() <= APART:
            raise BadInput(
                f"load the core of {self.name}",
                f"the singular vectors of this base are others than those it was trained with (by {apart_R.max():.2g})",
                "Load the base that the adapter was trained on, in the same precision and with the same pruning",
            )


def truncated_svd(weight_OI: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> U (out, r), S (r,) in falling order, V^T (r, in), by randomised subspace iteration (Halko, Martinsson and
    Tropp 2011, algorithms 4.4 and 5.1); the largest entry of each column of U is positive."""
    out, width = weight_OI.shape
    basis_OQ = weight_OI @ _normal(width, min(r + MORE, out, width), seed).to(weight_OI)
    for _ in range(SWEEPS):
        basis_OQ = weight_OI @ torch.linalg.qr(weight_OI.t() @ torch.linalg.qr(basis_OQ).Q).Q
    basis_OQ = torch.linalg.qr(basis_OQ).Q
    u_QQ, s_Q, v_QI = torch.linalg.svd(basis_OQ.t() @ weight_OI, full_matrices=False)
    u_OR = basis_OQ @ u_QQ[:, :r]
    sign_R = u_OR.gather(0, u_OR.abs().argmax(0, keepdim=True))[0].sign()
    return u_OR * sign_R, s_Q[:r], v_QI[:r] * sign_R[:, None]


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class _Decomposed(torch.autograd.Function):
    """y = g o (W x + s B R h) + b with h = A x and g = m / n. Saved for backward: h and y, of which (y - b) / m is the
    output before the scaling, divided by n: what the gradient of m needs."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, core_RR: Tensor, magnitude_O: Tensor, gain_O: Tensor, layer: Any) -> Tensor:
        dtype, bias = x_TI.dtype, None if layer.base.bias is None else layer.base.bias.to(x_TI.dtype)
        low_OR = (layer.scale * (1 + gain_O))[:, None] * (layer.b_OR.to(core_RR.dtype) @ core_RR)
        y_TO = quant.product(layer.base, x_TI)
        h_TR = x_TI.reshape(-1, layer.in_features) @ layer.a_RI.to(dtype).t()
        flat_TO = y_TO.view(-1, layer.out_features)
        flat_TO.addcmul_(flat_TO, gain_O.to(dtype))
        flat_TO.addmm_(h_TR, low_OR.to(dtype).t())
        if bias is not None:
            flat_TO.sub_(bias * gain_O.to(dtype))
        ctx.save_for_backward(h_TR, y_TO if ctx.needs_input_grad[2] else None, core_RR, magnitude_O, gain_O)
        ctx.layer = layer
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        layer: DecomposedLinear = ctx.layer
        h_TR, y, core_RR, magnitude_O, gain_O = ctx.saved_tensors
        dy_TO = dy.reshape(-1, layer.out_features)
        dz_TO = torch.addcmul(dy_TO, dy_TO, gain_O.to(dy.dtype))
        dz_TR = (dz_TO @ layer.b_OR.to(dy.dtype)).mul_(layer.scale)
        dx = d_core_RR = d_magnitude_O = None
        if ctx.needs_input_grad[0]:
            dx_TI = dz_TO @ quant.dense_weight(layer.base, dy.dtype)
            dx_TI.addmm_(dz_TR @ core_RR.to(dy.dtype), layer.a_RI.to(dy.dtype))
            dx = dx_TI.view(*dy.shape[:-1], layer.in_features)
        del dz_TO
        if ctx.needs_input_grad[1]:
            d_core_RR = (dz_TR.t() @ h_TR).to(core_RR.dtype)
        if ctx.needs_input_grad[2]:
            sum_O = (dy_TO * y.view(-1, layer.out_features)).sum(0, dtype=magnitude_O.dtype)
            if layer.base.bias is not None:
                sum_O -= layer.base.bias.to(sum_O) * dy_TO.sum(0, dtype=sum_O.dtype)
            d_magnitude_O = (sum_O / magnitude_O).masked_fill_(magnitude_O == 0, 0)
            if d_core_RR is not None and not layer.patch.detach_norm:  # dL/dn = -sum / n
                norm_O, slope_OR = layer.norm()
                d_core_RR -= layer.b_OR.to(slope_OR.dtype).t() @ ((sum_O / norm_O.square())[:, None] * slope_OR)
        return dx, d_core_RR, d_magnitude_O, None, None


class EDoraSurgery(LinearSurgery):
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            layer.require_same(tensors.get(f"{name}.check"))
        super().load_tensors(tensors)

    def portable(self) -> Portable:
        """A DoRA with lora_A = A and lora_B = s B R; since lora_alpha = r, peft's own scale is 1."""
        tensors = {}
        for name, layer in self.layers.items():
            prefix = f"base_model.model.{name}.lora_"
            core_RR = layer.core.detach()
            tensors[f"{prefix}A.weight"] = layer.a_RI.to(core_RR.dtype)
            tensors[f"{prefix}B.weight"] = layer.scale * (layer.b_OR.to(core_RR.dtype) @ core_RR)
            tensors[f"{prefix}magnitude_vector"] = layer.magnitude.detach()
        turned = any(isinstance(layer.base, anatomy.Conv1D) for layer in self.layers.values())
        r, targets = self.patch.r, sorted(self.layers)
        config = peft().LoraConfig(r=r, lora_alpha=r, use_dora=True, target_modules=targets, fan_in_fan_out=turned)
        return Portable(config, tensors)
