"""Diff pruning: Parameter-Efficient Transfer Learning with Diff Pruning (Guo, Rush, Kim, ACL 2021, arXiv 2012.07463).

A task is a sparse change of the base. Which entries change is learned, by gates that open and close:

    theta = theta_0 + delta      delta_i = z_i w_i                  structured: delta_i = z_i z_G w_i
    z = clip(s (r - l) + l, 0, 1)      s = sigmoid(log u - log(1 - u) + alpha)      u ~ U(0, 1)    (hard concrete)
    minimise  L(theta_0 + delta) + lambda E||delta||_0
    E||delta||_0 = sum_G p(alpha_G) sum_{i in G} p(alpha_i)      p(alpha) = sigmoid(alpha - log(-l / r))

    w   trained values, 0 at first     alpha   logits of the gates, alpha_0 at first     G   a weight matrix
    l, r = -1.5, 1.5

Three phases: gates and values are trained together; then the `density` N largest |delta| of the whole model stay (N is
the number of the model's parameters); then their values are trained alone. The gates' phase is `gate_share` of a run.

What differs from the paper, and why.
- Gates are put on `candidates` of the targeted weights only, the best by a score of gradients (model/scores.py), and
  nothing is dense. The authors' code holds 15 copies of the model; this has 44 bytes a candidate, then 20 a kept entry.
- lambda is found by dual ascent on E||delta||_0 / target - 1, so that the density asked for is reached without a search
  for lambda. The target falls from all candidates to `density` N within the gates' phase.
- The gates are drawn once per optimizer step, by (seed, step, layer), so all micro-batches see one draw. Outside
  training the gates are those of u = 1/2; delta is projected with these and not with a random draw.
- The optimizer steps a shift of alpha that is zero before each step. alpha moves by the shift in units of the learning
  rate, times `gate_rate`. So one optimizer trains w at its learning rate and alpha at the paper's constant 0.1. The
  shift's gradient is scaled (by kept / sqrt(candidates)), since Adam's epsilon would stop those of single gates.
- The penalty on alpha_G is that of one entry, as in the authors' code, whose structured results are the published ones.
  With the product, Adam closes whole matrices before it closes any entry. Density is counted with the product.
- The last phase starts from z w. Embeddings, norms and biases are not changed.

Shapes: K entries of a layer; gates are K, or K + 1 if structured: the last is the group's.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..bases.sparse import SparsePatch, SparseSurgery
from ..contracts import Place
from ..errors import BadInput
from ..model import anatomy, quant
from ..model.scores import Best, enough_candidates, entries_of, largest_share
from ..model.sparse_delta import Pattern
from ..model.sparse_linear import SparseLinear, resize

LOW, HIGH = -1.5, 1.5  # l and r (section 3.1). As l = -r, log(-l / r) is zero
ALPHA_0 = 5.0  # section 4: nearly all gates are open at first
TRAVEL, FASTEST = 20.0, 1.0  # how far a gate can move within the gates' phase, at least, at up to 1 per step
ANNEAL = 0.75  # share of the gates' phase after which the target is the final one
FIRST, ASCENT, DAMPING = 0.01, 0.1, 4.0  # lambda at first (nats per target), the rate of log lambda, see `penalty`
MOST = math.log(1e6)  # of log lambda
MULTIPLIER = "diff_pruning.multiplier"  # log lambda among the own tensors


@dataclass(frozen=True)
class DiffPruning(SparsePatch):
    """Learns which `density` of the model's parameters a task changes, and their changes."""

    paper: ClassVar[str] = "2012.07463"
    defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-3}
    gradient_reason: ClassVar[str] = "its gates are told apart by small gradients, and its parameters become fewer"

    density: float = 0.005  # share of the whole model's parameters that change in the end (section 4: 0.5 %)
    structured: bool = True  # a further gate for each weight matrix (section 3.2)
    candidates: float = 0.05  # share of the targeted weights that get a gate
    gate_share: float = 0.5  # share of the run's optimizer steps that train the gates
    gate_rate: float = 0.1  # learning rate of alpha (section 4); more in a run too short for gates to close

    @property
    def share(self) -> float:
        return self.candidates

    def wrap(self, linear: nn.Module, name: str) -> GatedLinear:
        columns, rows = anatomy.widths(linear)
        return GatedLinear(linear, entries_of(self.share, (rows, columns)), self.structured)

    def surgery(self, model: PreTrainedModel) -> GatedSurgery:
        return GatedSurgery(self, model)

    def apply(self, model: PreTrainedModel, place: Place) -> GatedSurgery:
        whole = quant.parameters_of(model)
        sizes = [anatomy.widths(linear) for linear in anatomy.target_linears(model, self.targets).values()]
        usual = {field: getattr(DiffPruning, field) for field in ("density", "candidates", "gate_share")}
        wrong = [field for field in usual if not 0 < getattr(self, field) <= 1]
        share = usual["candidates"] if "candidates" in wrong else self.candidates
        kept, found = max(1, round(self.density * whole)), sum(entries_of(share, size) for size in sizes)
        fits, every = largest_share(share, sizes, whole), largest_share(1.0, sizes, whole)
        enough = enough_candidates(kept, sizes)
        for field in wrong:
            advice = {**usual, "density": min(usual["density"], fits)}
            if "density" not in wrong:
                advice["candidates"] = max(usual["candidates"], enough)
            have = "it is a share, above 0 and up to 1"
            raise BadInput(f"diff_pruning: {field}: {getattr(self, field)}", have, f"Set {field}: {advice[field]}")
        if not 0 < self.gate_rate < math.inf:
            raise BadInput(f"diff_pruning: gate_rate: {self.gate_rate}", "it is a learning rate", "Set gate_rate: 0.1")
        if kept > found and model.device.type != "meta":  # a plan also traces models with fewer blocks
            have = f"it is {kept:,} of the model's {whole:,} parameters, and the candidates are {found:,}"
            do = f"Set density: {fits}" + (f", or density: {every} with candidates: 1.0" if every > fits else "")
            do = f"Set candidates: {enough}, or density: {fits}" if self.density <= every else f"{do}, or more targets"
            raise BadInput(f"diff_pruning: density: {self.density}", have, do)
        surgery: GatedSurgery = super().apply(model, place)
        surgery.kept = min(kept, found)
        surgery.notes += (
            f"diff_pruning will change {kept:,} of {whole:,} parameters, chosen from {found:,} candidates",
        )
        return surgery


class GatedLinear(SparseLinear):
    """A frozen linear with the change z z_G w at its candidates; after `keep`, with plain trained values."""

    def __init__(self, base: nn.Module, entries: int, structured: bool):
        super().__init__(base, entries)
        self.groups = int(structured)
        gates = torch.zeros(entries + self.groups, device=base.weight.device)
        self.shift = nn.Parameter(gates.clone())
        self.register_buffer("alpha", gates + ALPHA_0)
        self.register_buffer("noise", gates, persistent=False)  # log u - log(1 - u) of this step
        self.gated, self.scale = True, 1.0  # of the shift: it scales the gradients of the gates

    def set_pattern(self, pattern: Pattern) -> None:
        """New candidates, with values of zero and open gates."""
        super().set_pattern(pattern)
        self._set_gates(len(pattern) + self.groups)

    def _set_gates(self, count: int) -> None:
        self.gated = count > 0
        resize(self.shift, self.shift.data.new_zeros(count))
        self.alpha = self.alpha.new_full((count,), ALPHA_0)
        self.noise = self.noise.new_zeros(count)

    def draw(self, key: str) -> None:
        """New gates for a step. The same key gives the same gates on every device."""
        rng = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        self.noise.copy_(torch.rand(len(self.noise), generator=rng).logit_(eps=1e-6))

    def effective(self) -> Tensor:
        if not self.gated:
            return self.values
        return _Gated.apply(self.values, self.shift, self.alpha, self.noise if self.training else None, self.scale)

    def settled(self) -> Tensor:
        return _Gated.apply(self.values, self.shift, self.alpha, None, self.scale) if self.gated else self.values

    def open(self) -> Tensor:
        """p(alpha) of each gate: the probability that it is not zero."""
        return torch.sigmoid(torch.add(self.alpha, self.shift, alpha=self.scale))

    def expected(self) -> Tensor:
        """E||delta||_0 of this layer, shape ()."""
        open_K = self.open()
        return open_K[:-1].sum() * open_K[-1] if self.groups else open_K.sum()

    def pressed(self) -> Tensor:
        """What the penalty sums, shape (): a group's gate is pressed as one entry is, and not as all of its entries."""
        open_K = self.open()
        return open_K[:-1].sum() * open_K[-1].detach() + open_K[-1] if self.groups else open_K.sum()

    @torch.no_grad()
    def take_shift(self, rate: float) -> None:
        """Moves alpha by `rate` times the shift that the optimizer made."""
        self.alpha.add_(self.shift, alpha=rate)
        self.shift.zero_()

    @torch.no_grad()
    def worth(self) -> Tensor:
        """What the projection ranks entries by, (K,): |delta|, and below all those log p where the gate is closed."""
        delta_K, log_K = self.settled().abs(), F.logsigmoid(self.alpha)
        return torch.where(delta_K > 0, delta_K, log_K[:-1] + log_K[-1] if self.groups else log_K)

    @torch.no_grad()
    def keep(self, chosen: Tensor) -> None:
        """Keeps only these of the candidates (rising numbers), with delta as their values, and no gates."""
        delta_K, flat = self.settled()[chosen], self.pattern.flat[chosen]
        self.set_pattern(Pattern.of(flat, self.shape))
        self.values.data.copy_(delta_K)
        self.close()

    def close(self) -> None:
        """Removes the gates."""
        self._set_gates(0)


class _Gated(torch.autograd.Function):
    """z z_G w. Saved for backward are the inputs only; the gates are computed again."""

    @staticmethod
    def forward(ctx, w_K: Tensor, shift: Tensor, alpha: Tensor, noise: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(w_K, shift, alpha, noise)
        ctx.scale = scale
        z_K, z_G, *_ = _gates(w_K, shift, alpha, noise, scale)
        return z_K * w_K * z_G

    @staticmethod
    def backward(ctx, g_K: Tensor):
        w_K, shift, alpha, noise = ctx.saved_tensors
        z_K, z_G, slope_K, slope_G = _gates(w_K, shift, alpha, noise, ctx.scale)
        each_K = g_K * w_K
        d_alpha = torch.cat([each_K * slope_K * z_G, (each_K * z_K).sum() * slope_G])
        return g_K * z_K * z_G, d_alpha * ctx.scale, None, None, None


def _gates(
    w_K: Tensor, shift: Tensor, alpha: Tensor, noise: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | float, Tensor, Tensor]:
    """-> z (K,), z_G (1,) or 1.0, and dz / dalpha of both: (r - l) s (1 - s) where z is not clipped."""
    logits = torch.add(alpha, shift, alpha=scale)
    s = torch.sigmoid(logits if noise is None else logits + noise)
    stretched = s * (HIGH - LOW) + LOW
    slope = torch.where((stretched > 0) & (stretched < 1), (HIGH - LOW) * s * (1 - s), 0)
    z, K = stretched.clamp(0, 1), len(w_K)
    return z[:K], z[K:] if len(z) > K else 1.0, slope[:K], slope[K:]


class GatedSurgery(SparseSurgery):
    """While `gated`, the gates are trained; the number of kept entries is then `kept`."""

    patch: DiffPruning
    layers: dict[str, GatedLinear]
    kept: int

    gated = True
    gate_steps = 0  # optimizer steps that train the gates; 0: until `project` is called
    rate = 0.0  # of the gates
    target = 0.0  # of E||delta||_0 in this step
    log_lambda = math.log(FIRST)

    # --- training ------------------------------------------------------------------------------------------------

    def begin(self, steps: int) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if (processes := torch.distributed.get_world_size()) > 1:
                have = "its parameters become fewer during the run, which data parallelism does not allow"
                raise BadInput(f"train diff_pruning on {processes} processes", have, "Train on one, or use senszoq")
        self.gate_steps = min(steps, max(1, math.ceil(self.patch.gate_share * steps)))
        self.rate = max(self.patch.gate_rate, min(FASTEST, TRAVEL / self.gate_steps))
        candidates = sum(len(layer.values) for layer in self.layers.values())
        for layer in self.layers.values():
            layer.scale = self.kept / math.sqrt(candidates)

    def before_step(self, step: int) -> None:
        if self.gated:
            self.target = self.target_at(step)
            for name, layer in self.layers.items():
                layer.draw(f"{self.patch.seed}/{step}/{name}")

    def target_at(self, step: int) -> float:
        """Falls by the same factor in each step, from the number of candidates to `kept`."""
        candidates = sum(len(layer.values) for layer in self.layers.values())
        left = max(0.0, 1 - step / (ANNEAL * self.gate_steps)) if self.gate_steps else 1.0
        return self.kept * (candidates / self.kept) ** left

    def expected(self) -> Tensor:
        """E||delta||_0, shape ()."""
        return torch.stack([layer.expected() for layer in self.layers.values()]).sum()

    def penalty(self) -> Tensor | None:
        """lambda E||delta||_0 / kept. Beside the multiplier, lambda follows the excess at once, which damps the ascent
        as the quadratic term of an augmented Lagrangian does."""
        if not self.gated:
            return None
        excess = (self.expected().detach() / (self.target or self.target_at(0)) - 1).clamp(-1, 1)
        pressed = torch.stack([layer.pressed() for layer in self.layers.values()]).sum()
        return torch.exp(self.log_lambda + DAMPING * excess) * pressed / self.kept

    @torch.no_grad()
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if not self.gated:
            return
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        for layer in self.layers.values():
            if (learning_rate := rates.get(id(layer.shift), 0.0)) > 0:
                layer.take_shift((self.rate or self.patch.gate_rate) / learning_rate)
        excess = float(self.expected()) / (self.target or self.target_at(0)) - 1
        self.log_lambda = min(MOST, self.log_lambda + ASCENT * max(-1.0, min(1.0, excess)))
        if self.gate_steps and step + 1 >= self.gate_steps:
            self.project()
            for layer in self.layers.values():
                for parameter in (layer.values, layer.shift):
                    optimizer.state.pop(parameter, None)

    def project(self) -> None:
        """Keeps exactly the `kept` entries with the largest |delta| of all layers, and ends the gates."""
        best = Best(self.kept)
        for number, layer in enumerate(self.layers.values()):
            best.add(number, layer.worth())
        for number, layer in enumerate(self.layers.values()):
            layer.keep(best.flat(number).to(layer.values.device))
        self.gated = False

    # --- files ---------------------------------------------------------------------------------------------------

    def set_patterns(self, patterns: dict[str, Pattern]) -> None:
        super().set_patterns(patterns)
        if not self.gated:
            for layer in self.layers.values():
                layer.close()

    def own_tensors(self) -> dict[str, Tensor]:
        """With gates: also their logits and log lambda. Without: a plain sparse change."""
        found = super().own_tensors()
        if self.gated:
            return found | {MULTIPLIER: torch.tensor([self.log_lambda], dtype=torch.float64)}
        return {key: tensor for key, tensor in found.items() if not key.endswith((".shift", ".alpha"))}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Tensors saved in either phase; the phase is then theirs."""
        self.gated = any(key.endswith(".alpha") for key in tensors)
        super().load_tensors(tensors)
        if self.gated:
            self.log_lambda = float(tensors[MULTIPLIER])
