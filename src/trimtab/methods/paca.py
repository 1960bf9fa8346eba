"""PaCA: Partial Connection Adaptation for Efficient Fine-Tuning (Woo et al., ICLR 2025, arXiv 2503.01905).

Of each targeted weight W (out x in), r input columns are trained and nothing else; no adapter branch is added.

    y  = x W'^T,   W' = W with W'[:, I] = W[:, I] + s D                                    (forward, section 3.1)
    dx = dy W'     dD = s dy^T x[:, I]                                                      (backward, section 3.1)

So the backward pass needs only the r chosen columns of the input, T x r values instead of T x in. QPaCA (section 3.3)
is the same on a base that is stored in 4 or 8 bits and de-quantised for each product.

    I   the r chosen column indices, drawn once      D   trained delta, zero at first (out x r)      s   alpha / r

What differs from the paper, and why. We train a delta that starts at zero rather than the columns themselves, so that
the base stays intact and s scales the update. Linears that read the same tensor (q/k/v, gate/up) share I and one saved
slice. By default I is a contiguous block at a random position (the order of columns has no meaning), so that the slice
is one strided copy. Two forms compute the same sum: `side` adds x[:, I] D^T to y and leaves W unchanged, so a mapped
base stays mapped; `live` writes the columns into W if they may have changed, which costs nothing per product but makes
all pages of a mapped base anonymous memory. `reselect_every` keeps D as held columns and draws a new I (an extension).

Shapes: T tokens (all leading dimensions), I in, O out, R chosen columns.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bases.linear import LinearPatch, LinearSurgery
from ..contracts import ModulePatch, Place, Portable
from ..errors import BadInput
from ..model import anatomy, packed, quant
from ..model.shared_slice import SharedSlice
from ..quiet import peft


@dataclass(frozen=True)
class PaCA(LinearPatch):
    """Train r columns of each targeted weight (section 3). Defaults are the reference library's, except `selection`."""

    paper: ClassVar[str] = "2503.01905"
    defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-3}
    shards = property(lambda self: self.form == "side" and not self.reselect_every)  # type: ignore[assignment]

    r: int = 8  # columns per linear (section 4: 16 matches LoRA's r 8 in parameters)
    alpha: float | None = None  # s = alpha / r; None: s = 1. Under Adam, s only scales the learning rate
    selection: Literal["block", "random"] = "block"  # a contiguous block at a random place, or r random columns
    form: Literal["side", "live"] = "side"  # add the columns' product beside W x, or write them into W
    share_inputs: bool = True  # q/k/v and gate/up draw one I and save one slice
    reselect_every: int = 0  # draw new columns every n optimizer steps; 0: never (the paper)
    seed: int = 0

    def surgery(self, model: PreTrainedModel) -> PacaSurgery:
        return PacaSurgery(self, model)

    def apply(self, model: PreTrainedModel, place: Place) -> PacaSurgery:
        linears = list(anatomy.target_linears(model, self.targets).values())
        if self.r < 1:
            raise BadInput(f"paca: r: {self.r}", "r is the number of trained columns", "Set r to 1 or more")
        if self.alpha is not None and not 0 < abs(self.alpha) < math.inf:
            raise BadInput(f"paca: alpha: {self.alpha}", "alpha / r scales the columns", "Leave alpha out")
        if self.form == "live" and any(map(quant.is_quantised, linears)):
            raise BadInput("paca: form: live", "the base is quantised, so no column can be written", "Use form: side")
        if self.form == "live" and (tie := anatomy.tied(model, linears)):
            raise BadInput(f"paca: form: live on {tie[0]}", f"it is tied to {tie[1]}", "Use form: side")
        notes, surgery = anatomy.unreached(model, self.targets), super().apply(model, place)
        surgery.notes = notes
        names = list(surgery.layers)
        for group in anatomy.shared_input_groups(names) if self.share_inputs else [[name] for name in names]:
            shared = SharedSlice()
            for name in group:
                layer = surgery.layers[name]
                layer.group, layer.shared = group[0], shared
                layer.draw(0)
        return surgery

    def wrap(self, linear: nn.Module, name: str) -> PartialLinear:
        return PartialLinear(linear, self, name)


class PartialLinear(ModulePatch):
    """A frozen linear (`base`) of which the columns `indices` are trained through `delta`."""

    def __init__(self, base: nn.Module, patch: PaCA, name: str):
        super().__init__()
        self.base, self.patch, self.name = base, patch, name
        self.in_features, self.out_features = anatomy.widths(base)
        self.r = min(patch.r, self.in_features)
        self.scale = 1.0 if patch.alpha is None else patch.alpha / patch.r
        self.quantised = quant.is_quantised(base)
        device = base.weight.device
        self.delta = nn.Parameter(torch.zeros(self.out_features, self.r, device=device))
        self.register_buffer("indices", torch.zeros(self.r, dtype=torch.int64, device=device))
        self.register_buffer("held_indices", torch.zeros(0, dtype=torch.int64, device=device))
        self.register_buffer("held_delta", torch.zeros(self.out_features, 0, device=device))
        self.group, self.shared, self.start = name, SharedSlice(), None
        self._original, self._written = None, None  # live form: values of the chosen and held columns; their state

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, selection={self.patch.selection}, form={self.patch.form}"

    def draw(self, round_: int) -> None:
        """Choose I for the `round_`-th time; all linears of one group draw the same."""
        rng = torch.Generator().manual_seed((self.patch.seed << 20) + zlib.crc32(f"{self.group}#{round_}".encode()))
        if self.patch.selection == "block":
            self.start = int(torch.randint(self.in_features - self.r + 1, (), generator=rng))
            chosen = torch.arange(self.start, self.start + self.r)
        else:
            chosen = torch.randperm(self.in_features, generator=rng)[: self.r].sort().values
        self.indices.copy_(chosen)
        if not self.indices.is_meta:  # a plan has shapes but no values
            self.note_indices()

    def note_indices(self) -> None:
        """After the indices changed: check them, and note whether I is one block, which can be sliced by strides."""
        low, high = torch.cat([self.indices, self.held_indices]).aminmax()
        if low < 0 or high >= self.in_features or (self.indices.diff() < 1).any():
            raise BadInput(f"load {self.name}", f"its indices are not {self.r} different columns", "Use an intact copy")
        start = int(self.indices[0])
        self.start = start if int(self.indices[-1]) - start == self.r - 1 else None

    def columns_of(self, x_TI: Tensor) -> Tensor:
        if self.start is not None:
            return x_TI[..., self.start : self.start + self.r].contiguous()
        return x_TI.index_select(-1, self.indices)

    def forward(self, x_TI: Tensor) -> Tensor:
        if self.patch.form == "live":
            self.refresh()
        if torch.is_autocast_enabled(x_TI.device.type):
            x_TI = x_TI.to(torch.get_autocast_dtype(x_TI.device.type))
        x_TR = self.shared.take(x_TI, self.columns_of)
        return _Partial.apply(x_TI, x_TR, self.delta, self)

    @property
    def weight(self) -> Tensor:
        """The effective weight, for models that read a linear's weight (Mamba); gradients reach `delta`."""
        dtype = torch.bfloat16 if self.quantised else self.base.weight.dtype
        weight_OI, holds_delta = self.weight_now(dtype)
        delta_OR = self.delta - self.delta.detach() if holds_delta else self.delta
        if not holds_delta and self.held_indices.numel():
            weight_OI = weight_OI.index_add(1, self.held_indices, self.held_delta.to(dtype))
        weight_OI = weight_OI.index_add(1, self.indices, (delta_OR * self.scale).to(dtype))
        return weight_OI.t() if isinstance(self.base, anatomy.Conv1D) else weight_OI

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def weight_now(self, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """-> the (out, in) weight to multiply by, and whether it already includes the trained columns."""
        if self.patch.form == "live" and self._written is None:  # a state dict was taken since the forward pass
            self.refresh()
        if not self.quantised:
            return anatomy.dense_view(self.base).to(dtype), self.patch.form == "live"
        weight_OI = quant.dense_weight(self.base, dtype)
        self.add_columns(weight_OI)
        return weight_OI, True

    @torch.no_grad()
    def add_columns(self, weight_OI: Tensor) -> None:
        """Add s D to weight[:, I], and the columns held from earlier draws; in place, in the weight's dtype."""
        if self.held_indices.numel():
            weight_OI.index_add_(1, self.held_indices, self.held_delta.to(weight_OI.dtype))
        step_OR = (self.delta * self.scale).to(weight_OI.dtype)
        if self.start is not None:
            weight_OI[:, self.start : self.start + self.r] += step_OR
        else:
            weight_OI.index_add_(1, self.indices, step_OR)

    def refresh(self) -> None:
        """Live form: write the columns if `delta` may have changed since they were last written.

        The version counter misses optimizers that write through `.data` or in their own kernels. So the columns are
        also written after each backward pass, and whenever gradients are off.
        """
        state = (self.delta._version, self.delta.untyped_storage()._cdata)
        if self._written == state and torch.is_grad_enabled():
            return
        weight_OI = anatomy.dense_view(self.base).data  # `.data`: hidden from autograd, since we order the writes
        if self._original is None:
            self._touched = torch.cat([self.indices, self.held_indices]).unique()
            self._original = weight_OI[:, self._touched].clone()
        fresh_OC = self._original.clone()
        place = torch.searchsorted(self._touched, self.indices)
        held = torch.searchsorted(self._touched, self.held_indices)
        with torch.no_grad():
            fresh_OC.index_add_(1, held, self.held_delta.to(fresh_OC.dtype))
            fresh_OC.index_add_(1, place, (self.delta * self.scale).to(fresh_OC.dtype))
            weight_OI[:, self._touched] = fresh_OC
        self._written = state

    def restore(self) -> None:
        """Live form: restore the original columns, bit for bit."""
        if self._original is not None:
            anatomy.dense_view(self.base).data[:, self._touched] = self._original
            self._original = self._written = None

    detach_base = restore

    def _save_to_state_dict(self, *args, **kwargs):
        self.restore()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state, prefix, *args):
        self.make_room(state, prefix)
        super()._load_from_state_dict(state, prefix, *args)
        self.note_indices()

    def make_room(self, saved: dict[str, Tensor], prefix: str) -> None:
        """Before values are loaded: restore the base, and make the held columns as many as those in `saved`."""
        self.restore()
        held = [saved.get(f"{prefix}held_{key}") for key in ("indices", "delta")]
        if all(t is not None for t in held) and held[1].shape == (self.out_features, *held[0].shape):
            self.held_indices = self.indices.new_zeros(held[0].shape)
            self.held_delta = self.delta.data.new_zeros(held[1].shape)

    def reselect(self, round_: int) -> None:
        """Keep the trained columns as held columns, and start new ones from zero."""
        with torch.no_grad():
            self.restore()
            self.held_indices = torch.cat([self.held_indices, self.indices.clone()])
            self.held_delta = torch.cat([self.held_delta, self.delta.detach() * self.scale], 1)
            self.delta.zero_()
        self.draw(round_)

    def merge_into_base(self) -> nn.Module:
        """The linear that replaces this one after merging: the base (de-quantised if needed) plus the columns."""
        self.restore()
        linear = quant.dense_linear(self.base) if self.quantised else self.base
        self.add_columns(anatomy.dense_view(linear).data)
        return linear


class _Partial(torch.autograd.Function):
    """Equations of section 3.1. Saved for backward: x[:, I] and D; the layer has the weight."""

    @staticmethod
    def forward(ctx, x_TI: Tensor, x_TR: Tensor, delta_OR: Tensor, layer: PartialLinear) -> Tensor:
        apart = packed.few(layer.base, x_TI)  # decoding in 4 bits: the columns are added to the output
        weight_OI, holds_delta = (None, False) if apart else layer.weight_now(x_TI.dtype)
        y_TO = quant.product(layer.base, x_TI, weight_OI)
        if not holds_delta:
            flat_TO = y_TO.view(-1, layer.out_features)
            flat_TO.addmm_(x_TR.reshape(-1, layer.r), delta_OR.to(x_TI.dtype).t(), alpha=layer.scale)
            if layer.held_indices.numel():
                held_TH = x_TI.reshape(-1, layer.in_features)[:, layer.held_indices]
                flat_TO.addmm_(held_TH, layer.held_delta.to(x_TI.dtype).t())
        ctx.save_for_backward(x_TR, delta_OR)
        ctx.layer = layer
        return y_TO

    @staticmethod
    def backward(ctx, dy: Tensor):
        layer: PartialLinear = ctx.layer
        x_TR, delta_OR = ctx.saved_tensors
        dy_TO = dy.reshape(-1, layer.out_features)
        dx_TI = d_delta_OR = None
        if ctx.needs_input_grad[0]:
            weight_OI, holds_delta = layer.weight_now(dy.dtype)
            dx_TI = dy_TO @ weight_OI
            if not holds_delta:
                delta_OR = delta_OR.to(dy.dtype)
                if layer.start is not None:
                    dx_TI[:, layer.start : layer.start + layer.r].addmm_(dy_TO, delta_OR, alpha=layer.scale)
                else:
                    dx_TI.index_add_(1, layer.indices, dy_TO @ delta_OR, alpha=layer.scale)
                if layer.held_indices.numel():
                    dx_TI.index_add_(1, layer.held_indices, dy_TO @ layer.held_delta.to(dy.dtype))
            dx_TI = dx_TI.view(*dy.shape[:-1], layer.in_features)
        if ctx.needs_input_grad[2]:
            layer._written = None  # an optimizer may step now
            # (x_R^T dy)^T is twice as fast as dy^T x_R, since the wide side stays contiguous
            d_delta_OR = (x_TR.reshape(-1, layer.r).t() @ dy_TO).t().to(torch.float32)
            if layer.scale != 1.0:
                d_delta_OR = d_delta_OR * layer.scale
        return dx_TI, None, d_delta_OR, None


class PacaSurgery(LinearSurgery):
    patch: PaCA

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        every = self.patch.reselect_every
        if every and (step + 1) % every == 0:
            for layer in self.layers.values():
                layer.reselect((step + 1) // every)
                for moment in optimizer.state.get(layer.delta, {}).values():
                    if isinstance(moment, Tensor):
                        moment.zero_()  # new columns have no history; `step` too, for Adam's bias correction

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            layer.make_room(tensors, f"{name}.")
        super().load_tensors(tensors)
        for layer in self.layers.values():
            layer.note_indices()

    def portable(self) -> Portable:
        """LoRA with a one-hot A: A = rows I of the identity, B = s D."""
        tensors = {}
        rank = max(layer.r + layer.held_indices.numel() for layer in self.layers.values())
        for name, layer in self.layers.items():
            columns = torch.cat([layer.indices, layer.held_indices])
            b_OR = torch.cat([layer.delta.detach() * layer.scale, layer.held_delta], 1)
            a_RI = torch.zeros(rank, layer.in_features)
            a_RI[torch.arange(len(columns)), columns.cpu()] = 1.0
            wide_OR = torch.zeros(layer.out_features, rank)
            wide_OR[:, : len(columns)] = b_OR.cpu()
            tensors[f"base_model.model.{name}.lora_A.weight"] = a_RI
            tensors[f"base_model.model.{name}.lora_B.weight"] = wide_OR
        turned = any(isinstance(layer.base, anatomy.Conv1D) for layer in self.layers.values())
        targets = sorted(self.layers)
        config = peft().LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, fan_in_fan_out=turned)
        return Portable(config, tensors)
