"""MeZO: Fine-Tuning Language Models with Just Forward Passes (Malladi et al., NeurIPS 2023, arXiv 2305.17333).

No backward pass. Along random directions z_j the loss is computed at two points, and the weights move along z_j by how
much it differs (definitions 1 and 2, n-SPSA):

    g_j = (L(w + eps z_j) - L(w - eps z_j)) / (2 eps)       u = mean over j of g_j z_j       w <- w - lr u

    z_j ~ N(0, 1) for every trained weight    eps    `directions`: how many z_j a step has

z_j is never stored: it is drawn again from (seed, step, j, parameter) wherever it is needed. `update: momentum | adam`
feed u to that rule (appendix B.2). With `senszoq` this is SensZOQ (arXiv 2406.02913), with `full` it is MeZO; `lora`,
`paca`, `edora` and `parallel_adapter` work too.

What differs from the paper, and why. The paper's code adds eps z to the weights in place, twice, and back again: four
sweeps over all of them, after which 16-bit weights are not what they were. Here the weights are not touched before the
update (model/perturbed.py), and sparse changes compute both signs and all directions in one batch. Updates are smaller
than half of a 16-bit weight's last place most of the time, and would be lost: `full` trains fp32 copies, and with
`dtype: bf16` the update is rounded up or down at random, so that it is right on average. A step whose loss is not
finite is skipped. Every step's g_j are kept: with them `replay` computes a run's result again, bit for bit.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Stepper, Surgery
from ..errors import BadInput
from ..model.perturbed import Points

LOG = "log"  # in the state of the first parameter: for each step (learning rate, 0 if it was skipped, g_1, ...)


@dataclass(frozen=True)
class Mezo(Stepper):
    """Steps by differences of losses: as much memory as inference."""

    defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "warmup_steps": 0}
    uses_gradients: ClassVar[bool] = False
    ignored: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("max_grad_norm", "activation_checkpointing", "gradient_checkpointing"), "there is no gradient"
        ),
        **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), "the stepper has its own momentum and beta2"),
    }

    eps: float = 1e-3  # distance of the two points (appendix E: 1e-3; 1e-2 for LoRA)
    directions: int = 1  # pairs of points in a step; more average out noise, and take as much more time
    update: Literal["sgd", "momentum", "adam"] = "sgd"  # the rule that u is fed to
    momentum: float = 0.9  # of momentum; Adam's first beta
    beta2: float = 0.999  # Adam's second
    patience: int = 10  # steps in a row without a finite loss, after which the run ends
    seed: int = 0

    @functools.cached_property
    def run(self) -> Run:
        return Run(self)

    def prepare(self, model: PreTrainedModel) -> Surgery | None:
        most = {"eps": 1.0, "directions": math.inf, "patience": math.inf, "momentum": 1.0, "beta2": 1.0}
        for name, top in most.items():
            value, low = getattr(self, name), 0 if name in ("momentum", "beta2") else 1e-12
            if not low <= value < top:
                have = f"it must be {'above 0' if low else '0 or more'}"
                have += f", and below {top:g}" if top < math.inf else ""
                raise BadInput(f"mezo: {name}: {value}", have, f"Set {name}: {getattr(type(self), name)}")
        self.run.model = model
        return None

    def optimizer(self, parameters: Sequence[nn.Parameter], args: Any) -> torch.optim.Optimizer:
        if args.world_size > 1:
            have = "each process would step along the differences of its own rows"
            raise BadInput("stepper: mezo with several processes", have, "Train in one process")
        return MezoOptimizer(parameters, self.run, args.learning_rate, args.weight_decay)

    def backward(self, loss: Callable[[], Tensor], back: Callable[[Tensor], None] = Tensor.backward) -> Tensor:
        return self.run.differences(loss)

    def record(self) -> dict[str, Any]:
        """How many steps were skipped, and how many had no difference between the losses of their points."""
        run = self.run
        return {"skipped_steps": int(run.skipped), "flat_steps": int(run.flat)} if not run.skipped.dim() else {}


class Run:
    """One training run: its points, and the differences since the last step."""

    def __init__(self, mezo: Mezo):
        self.mezo, self.step = mezo, 0
        self.model: PreTrainedModel | None = None
        self.points: Points | None = None
        self.slopes: Tensor | None = None  # (directions,): sums of g_j since the last step
        self.finite = self.skipped = self.flat = self.in_a_row = self.last = torch.empty(0)

    def _start(self, device: torch.device) -> None:
        self.slopes = torch.zeros(self.mezo.directions, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        if not self.skipped.dim():
            return
        self.skipped, self.flat, self.in_a_row = torch.zeros(3, dtype=torch.int32, device=device).unbind()
        self.last = torch.full((), torch.nan, device=device)  # of the newest finite loss

    def z(self, number: int, direction: int, like: Tensor) -> Tensor:
        return noise(self.mezo.seed, self.step, direction, number, like)

    def differences(self, loss: Callable[[], Tensor]) -> Tensor:
        """Adds the g_j of one micro-batch; -> its mean loss. After `patience` steps without a finite loss it is NaN."""
        assert self.model is not None, "prepare was called"
        mezo = self.mezo
        self.points = self.points or Points(self.model)
        signs = [(j, sign) for j in range(mezo.directions) for sign in (1.0, -1.0)]
        near = [
            lambda number, p, j=j, sign=sign: p.add(self.z(number, j, p).to(p.dtype), alpha=sign * mezo.eps)
            for j, sign in signs
        ]
        losses = torch.stack(self.points.losses(loss, near)).float().view(-1, 2)
        if self.slopes is None:
            self._start(losses.device)
        assert self.slopes is not None
        finite, mean = losses.isfinite().all(), losses.mean()
        slopes = (losses[:, 0] - losses[:, 1]) / (2 * mezo.eps)
        self.slopes = self.slopes + torch.where(finite, slopes, 0.0)
        self.finite = self.finite & finite
        self.last = torch.where(finite, mean, self.last)
        gone = self.in_a_row + (~finite).int() >= mezo.patience
        return torch.where(finite | ~gone, self.last, mean)

    def stepped(self) -> None:
        assert self.slopes is not None
        self.skipped = self.skipped + (~self.finite).int()
        self.flat = self.flat + (self.finite & (self.slopes == 0).all()).int()
        self.in_a_row = torch.where(self.finite, 0, self.in_a_row + 1)
        self.slopes = None
        self.step += 1


class MezoOptimizer(torch.optim.Optimizer):
    """Moves the parameters along the directions of the step; they need no gradients.

    The number of steps and every step's g_j are in its state, so that a resumed run goes on with the next directions.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], run: Run, learning_rate: float, weight_decay: float = 0.0):
        self.run = run
        super().__init__(list(parameters), {"lr": learning_rate, "weight_decay": weight_decay})
        every = self._every()
        if weight_decay and all(p.dim() < 2 for p in every):
            have = "only matrices are decayed, and the patch trains none"
            raise BadInput(f"training: weight_decay: {weight_decay} with mezo", have, "Remove it")
        if any(p.dtype == torch.float16 for p in every):
            have = "they cannot take steps as small as these"
            raise BadInput("stepper: mezo on fp16 weights", have, "Use full: {dtype: fp32}, or a base in bf16")
        self.state[every[0]][LOG] = torch.zeros(0, run.mezo.directions + 2, dtype=torch.float64)

    def _every(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        state = self.state[self._every()[0]]
        state[LOG] = state_dict["state"][0][LOG].to(torch.float64)  # the library gives it the parameter's dtype
        self.run.step = len(state[LOG])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        run, mezo = self.run, self.run.mezo
        if run.slopes is None:
            run._start(self._every()[0].device)
        assert run.slopes is not None
        live = run.finite.double()
        slopes = torch.where(run.finite, run.slopes, 0.0) / mezo.directions
        rate = self.param_groups[0]["lr"]
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                u = torch.zeros_like(p, dtype=torch.float32)
                for j in range(mezo.directions):
                    u.add_(run.z(number, j, p) * slopes[j].to(u))
                self._move(p, self._ruled(p, u, live.to(u)), group, live.to(u), number)
                number += 1
        state = self.state[self._every()[0]]
        row = torch.cat([torch.tensor([rate], dtype=torch.float64), live.cpu()[None], run.slopes.double().cpu()])
        state[LOG] = torch.cat([state[LOG], row[None]])
        run.stepped()

    def _ruled(self, p: nn.Parameter, u: Tensor, live: Tensor) -> Tensor:
        """The step's direction by the update rule."""
        mezo, state = self.run.mezo, self.state[p]
        if mezo.update == "sgd":
            return u
        first = state.setdefault("exp_avg" if mezo.update == "adam" else "momentum_buffer", torch.zeros_like(u))
        if mezo.update == "momentum":
            first.add_(u - (1 - mezo.momentum) * first * live)
            return first
        second = state.setdefault("exp_avg_sq", torch.zeros_like(u))
        count = state["step"] = state.get("step", torch.zeros((), device=p.device)) + live
        first.add_((u - first) * ((1 - mezo.momentum) * live))
        second.add_((u * u - second) * ((1 - mezo.beta2) * live))
        down = (1 - mezo.beta2**count).clamp_(min=1e-12).sqrt_()
        return first / (1 - mezo.momentum**count).clamp_(min=1e-12) / (second.sqrt() / down + 1e-8)

    def _move(self, p: nn.Parameter, u: Tensor, group: dict[str, Any], live: Tensor, number: int) -> None:
        decay = group["weight_decay"] if p.dim() > 1 else 0.0  # as the paper: not of biases and norms
        change = (u + decay * p.float() if decay else u) * (-group["lr"] * live)
        if p.dtype == torch.bfloat16:
            p.copy_(rounded_at_random(p.float().add_(change), self.run.mezo.seed, self.run.step, number))
        else:
            p.add_(change.to(p.dtype))


def noise(seed: int, step: int, direction: int, number: int, like: Tensor) -> Tensor:
    """N(0, 1) in fp32 with the shape of `like`: always the same for the same numbers, whatever was drawn before."""
    rng = _generator(like.device, seed, step, direction, number)
    return torch.randn(like.shape, generator=rng, dtype=torch.float32, device=like.device)


def rounded_at_random(x: Tensor, seed: int, step: int, number: int) -> Tensor:
    """`x`, fp32, as bf16: rounded up or down with probabilities such that the mean is x."""
    rng = _generator(x.device, seed, step, -1, number)
    low = torch.randint(0, 2**16, x.shape, generator=rng, dtype=torch.int32, device=x.device)
    return (x.view(torch.int32).add(low) & -(2**16)).view(torch.float32).to(torch.bfloat16)


def _generator(device: torch.device, *numbers: int) -> torch.Generator:
    name = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(name, "little") >> 1)


def replay(mezo: Mezo, parameters: Sequence[nn.Parameter], log: Tensor, weight_decay: float = 0.0) -> None:
    """Repeats the steps in `log`, (steps, 2 + directions), from the parameters that the run began with: bit for bit the
    run's result. `log` is in the state of its optimizer; it has 8 bytes for each number."""
    run = Run(mezo)
    optimizer = MezoOptimizer(parameters, run, 0.0, weight_decay)
    for rate, live, *slopes in log.tolist():
        optimizer.param_groups[0]["lr"] = rate
        run._start(optimizer._every()[0].device)
        run.slopes, run.finite = torch.tensor(slopes), torch.tensor(bool(live))
        optimizer.step()
