"""LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning (Sung et al., arXiv 2206.06522).

A side network of width d / r runs beside the frozen model and reads what its blocks return. Only the side network is
trained, so no gradient flows through the model, and what its blocks compute is not kept for a backward pass.

    s_0 = D_0 h_0                                                                               (section 3.2)
    s_i = f_i(mu_i D_i h_i + (1 - mu_i) s_{i-1}),   mu_i = sigmoid(alpha_i / T)                 (section 3.2)
    y   = h_out + U norm(s_L)

    h_0: input of the first block   h_i: output of block i   h_out: the model's last hidden states   s: side states
    D: down-projections   U: up-projection   alpha: gates, 0 at first   T: 0.1   f_i: side layer   d / r: width of s

The side layers start as a pruned copy of the model (section 3.3): the d / r coordinates whose rows in the second
matrices of all FFNs are the largest, and in each FFN the m / r units with the largest weights on these. D starts as
the choice of the coordinates. `every: 2` drops each second side layer (section 3.4, layer dropping).

What differs from the paper, and why. f_i is the residual FFN of a block, f(x) = x + FFN(norm(x)), without attention:
the model's own attention has mixed h_i over the tokens, and without one of its own the side network needs no mask, no
positions and no KV cache, so that it is the same for encoders, decoders, packed rows and generation. U reads a norm of
s_L, its result is added to the model's last hidden states (after its last norm), and it starts at zero, so that the
patched model computes at first what the model does. FFNs that cannot be pruned (stacked experts)
are replaced by random ones. Rows are ranked by magnitude; the paper also uses Fisher information.
"""

# Shape letters: ... any leading dimensions, D hidden size, S side width, M units of a side layer.

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..contracts import ModulePatch, Patch, Place, Surgery
from ..errors import BadInput
from ..model import anatomy, quant
from ..model.block_inputs import without_cache
from ..model.freeze import keep_trainable_layout
from ..model.surgery import Swaps, require_unpatched
from ..model.undisturbed import undisturbed

TEMPERATURE = 0.1  # T, section 3.2
ATTRIBUTE = "trimtab_lst"
EPSILON = 1e-6


@dataclass(frozen=True)
class LST(Patch):
    """A ladder side network, 1 / r as wide as the model."""

    paper: ClassVar[str] = "2206.06522"
    exclusive_reason: ClassVar[str] = "no gradient flows through the base under lst, so a patch in it is not trained"
    gradient_reason: ClassVar[str] = "its side layers run after all blocks, where MeZO changes no weights"
    defaults: ClassVar[dict[str, Any]] = {"learning_rate": 3e-3, "warmup_steps": 0.02}

    r: int = 8  # reduction factor, section 4.1
    every: int = 1  # a side layer for each so many blocks, counted from the last: 2 drops half of them
    seed: int = 0  # of FFNs that cannot be pruned from the model's

    def apply(self, model: PreTrainedModel, place: Place) -> LSTSurgery:
        path, stack = anatomy.blocks(model)
        width = model.config.get_text_config().hidden_size
        if not 1 <= self.r <= width:
            raise BadInput(f"lst: r: {self.r}", f"the side network has {width} / r columns", "Set r: 8")
        if not 1 <= self.every <= len(stack):
            have = f"the model has {len(stack)} blocks, and the side network needs one layer or more"
            raise BadInput(f"lst: every: {self.every}", have, "Set every: 1")
        surgery = LSTSurgery(self, model, path)
        require_unpatched(model, surgery.swaps, self.exclusive_reason)
        try:
            surgery.build(stack, width)
            surgery.check()
        except BaseException:
            surgery.revert()
            raise
        return surgery


class LSTSurgery(Surgery):
    """`rungs`: number of a block -> its side layer; `ends`: what is before and after them."""

    patch: LST

    def __init__(self, patch: LST, model: PreTrainedModel, path: str):
        self.patch, self.model, self.path = patch, model, path
        self.swaps = Swaps(model)
        self.rungs: dict[int, Rung] = {}
        self.read: list[tuple[int, Tensor]] = []  # (number, hidden states) of this pass; -1: what block 0 read
        self.graph: list[bool] = []  # whether autograd recorded around the pass
        self.misfit: BadInput | None = None  # why the last pass had no place for the side network

    def build(self, stack: nn.ModuleList, width: int) -> None:
        patch, swaps = self.patch, self.swaps
        keep_trainable_layout(self.model, swaps)
        for parameter in self.model.parameters():
            swaps.set_requires_grad(parameter, False)
        numbers = range((len(stack) - 1) % patch.every, len(stack), patch.every)
        pruned = _Pruned(self.model, len(stack), width, patch.r)
        random = torch.Generator().manual_seed(patch.seed)
        side = width // patch.r
        for number in numbers:
            device = next(stack[number].parameters()).device
            self.rungs[number] = rung = Rung(width, *pruned.shape(number), pruned.activation, device)
            if device.type != "meta":
                pruned.fill(number, rung, random)
            swaps.set_attribute(stack[number], ATTRIBUTE, rung)
        holder = self.model.get_submodule(self.path.rpartition(".")[0])
        self.ends = Ends(width, side, next(stack[numbers[0]].parameters()).device)
        if pruned.chosen is not None:
            self.ends.first.data.copy_(pruned.selection())
        swaps.set_attribute(holder, ATTRIBUTE, self.ends)
        swaps.hook(holder.register_forward_pre_hook(self._enter))
        swaps.hook(stack[0].register_forward_pre_hook(self._begins, with_kwargs=True))
        for number in numbers:
            swaps.hook(stack[number].register_forward_hook(self._keeps(number)))
        swaps.hook(holder.register_forward_hook(self._leave, always_call=True))
        if random_ones := [n for n in numbers if n not in pruned.ffns]:
            self.notes = (f"lst: {len(random_ones)} of {len(numbers)} side layers start at random: their block's FFN "
                          "has no pair of linears to prune",)  # fmt: skip

    # --- a pass: the model without autograd, then the side network -------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self.read.clear()
        self.graph.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def _begins(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.read[:] = [(-1, args[0] if args else kwargs["hidden_states"])]

    def _keeps(self, number: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            self.read.append((number, output[0] if isinstance(output, tuple | list) else output))

        return keep

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        read, self.read = self.read, []
        torch.set_grad_enabled(self.graph.pop())
        if output is None:  # the pass failed
            return None
        plain = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        self.misfit = self._misfit(read, plain)
        if self.misfit is not None:
            raise self.misfit
        side = self.ends.down(read[0][1])
        for number, hidden in read[1:]:
            side = self.rungs[number](hidden, side)
        added = plain + self.ends.up(side, plain.dtype)
        if isinstance(output, tuple):
            return (added, *output[1:])
        output.last_hidden_state = added
        return output

    def _misfit(self, read: list[tuple[int, Tensor]], plain: Tensor | None) -> BadInput | None:
        """Why the model is no plain stack of blocks between its embeddings and its last hidden states."""
        have = ""
        if plain is None:
            have = "the module that holds its blocks returns no last hidden states"
        elif [number for number, _ in read] != [-1, *self.rungs]:
            have = "its blocks do not run once each, in order"
        elif any(hidden.shape != plain.shape for _, hidden in read) or plain.shape[-1] != len(self.ends.last):
            have = "its blocks and its last hidden states differ in shape"
        return BadInput(f"lst on {type(self.model).__name__}", have, "Use lora or paca") if have else None

    def check(self) -> None:
        """BadInput if a small pass finds that the side network has no place in the model."""
        if self.model.device.type == "meta":
            return
        ids = torch.ones(2, 3, dtype=torch.int64, device=self.model.device)
        with undisturbed(self.model), torch.no_grad(), contextlib.suppress(Exception):
            self.model.base_model(input_ids=ids, **without_cache(self.model))
        if self.misfit is not None:
            raise self.misfit

    # --- what it saves -----------------------------------------------------------------------------------------------

    def own_tensors(self) -> dict[str, Tensor]:
        holder = self.path.rpartition(".")[0]
        parts = {f"{self.path}.{number}": rung for number, rung in self.rungs.items()} | {holder: self.ends}
        return {f"{path}.{ATTRIBUTE}.{key}": p for path, part in parts.items() for key, p in part.named_parameters()}

    def revert(self) -> None:
        self.swaps.undo()


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPSILON)


class Rung(ModulePatch):
    """A side layer and its ladder: D_i, alpha_i and f_i. Its parameters are fp32; products are in the model's dtype."""

    def __init__(self, width: int, side: int, units: int, gated: bool, act: Callable[[Tensor], Tensor], device: Any):
        super().__init__()
        self.act = act
        shapes = {"down": (side, width), "first": (units, side), "second": (side, units)}
        if gated:
            shapes["gate"] = (units, side)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)))
        self.alpha = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))
        self.norm = nn.Parameter(torch.ones(side, dtype=torch.float32, device=device))
        self.gated = gated

    def forward(self, hidden: Tensor, side: Tensor) -> Tensor:
        """(..., D), (..., S) -> (..., S)."""
        dtype = hidden.dtype
        mu = torch.sigmoid(self.alpha / TEMPERATURE).to(dtype)
        x = mu * F.linear(hidden, self.down.to(dtype)) + (1 - mu) * side
        n = _norm(x, self.norm)
        units = F.linear(n, self.first.to(dtype))
        fired = self.act(F.linear(n, self.gate.to(dtype))) * units if self.gated else self.act(units)
        return x + F.linear(fired, self.second.to(dtype))


class Ends(ModulePatch):
    """D_0, and U with its norm."""

    def __init__(self, width: int, side: int, device: Any):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(side, width, dtype=torch.float32, device=device))
        self.norm = nn.Parameter(torch.ones(side, dtype=torch.float32, device=device))
        self.last = nn.Parameter(torch.zeros(width, side, dtype=torch.float32, device=device))

    def down(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.first.to(hidden.dtype))

    def up(self, side: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(_norm(side, self.norm), self.last.to(side.dtype)).to(dtype)


class _Pruned:
    """The model's FFNs, pruned to 1 / r of their columns and rows. `chosen`: the kept coordinates, (S,); None: a plan,
    whose model has no values."""

    def __init__(self, model: PreTrainedModel, depth: int, width: int, r: int):
        self.width, self.side, self.r, config = width, width // r, r, model.config.get_text_config()
        names = ("hidden_activation", "hidden_act", "activation_function", "activation")
        act = next((name for key in names if isinstance(name := getattr(config, key, None), str)), "gelu")
        self.activation = ACT2FN[act if act in ACT2FN else "gelu"].__call__  # not a submodule of the side layers
        units = getattr(config, "intermediate_size", None)
        self.units = units if isinstance(units, int) else 4 * width
        try:
            found = [_matrices(ffn, width) for ffn in anatomy.ffns(model)]
        except BadInput:
            found = []
        self.ffns = {number: found[number] for number in range(depth) if number < len(found) and found[number]}
        self.chosen: Tensor | None = None
        if next(model.parameters()).device.type != "meta":
            rows_D = torch.zeros(width)
            for _, second, _ in self.ffns.values():
                rows_D += quant.dense_weight(second).detach().abs().float().sum(1).cpu()
            self.chosen = rows_D.topk(self.side).indices.sort().values

    def shape(self, number: int) -> tuple[int, int, bool]:
        """-> side width, units, and whether the FFN is gated."""
        first, _, gate = self.ffns.get(number) or (None, None, None)
        units = anatomy.widths(first)[1] if first is not None else self.units
        return self.side, max(1, units // self.r), gate is not None

    def selection(self) -> Tensor:
        """(S, D): picks the kept coordinates."""
        assert self.chosen is not None
        return torch.eye(self.width)[self.chosen]

    @torch.no_grad()
    def fill(self, number: int, rung: Rung, random: torch.Generator) -> None:
        rung.down.copy_(self.selection())
        if number not in self.ffns:
            for weight in (rung.first, rung.second):
                weight.copy_(torch.randn(weight.shape, generator=random) * (0.02 / math.sqrt(self.r)))
            return
        first, second, gate = self.ffns[number]
        wide_MS = quant.dense_weight(first).detach()[:, self.chosen].float()
        narrow_SM = quant.dense_weight(second).detach()[self.chosen].float()
        units = (wide_MS.abs().sum(1) + narrow_SM.abs().sum(0)).topk(len(rung.first)).indices.sort().values
        rung.first.copy_(wide_MS[units])
        rung.second.copy_(narrow_SM[:, units])
        if gate is not None:
            rung.gate.copy_(quant.dense_weight(gate).detach()[units][:, self.chosen].float())


def _matrices(ffn: anatomy.Ffn, width: int) -> tuple[nn.Module, nn.Module, nn.Module | None] | None:
    """-> (first, second, gate or None) of an FFN of linears; None where it is another."""
    if ffn.kind == "pair":
        named = [("fc1", ffn.module.fc1), ("fc2", ffn.module.fc2)]
    else:
        named = [pair for part in {ffn.reader, ffn.module} for pair in part.named_modules()]
    linears = [(name.rpartition(".")[2], module) for name, module in named if anatomy.is_linear(module)]
    firsts = [(name, m) for name, m in linears if anatomy.widths(m)[0] == width != anatomy.widths(m)[1]]
    seconds = [m for _, m in linears if anatomy.widths(m)[1] == width != anatomy.widths(m)[0]]
    gates = [m for name, m in firsts if "gate" in name or name == "w1"]
    plain = [m for _, m in firsts if m not in gates]
    if len(firsts) == 1 and gates and seconds:  # w1 and w2 without a gate
        gates, plain = [], gates
    fits = len(plain) == 1 == len(seconds) and len(gates) <= 1
    if not fits or {anatomy.widths(m)[1] for _, m in firsts} != {anatomy.widths(seconds[0])[0]}:
        return None
    return plain[0], seconds[0], gates[0] if gates else None
