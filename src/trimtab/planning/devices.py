"""`trimtab plan --on rtx-4090,2xl40s`: the plan of a run on GPUs that this machine does not have.

Memory is planned as for any run on a GPU. The speed comes from the makers' published figures (DEVICES), of which a
program reaches a part (REACHED), the same for all devices and not measured on any of them: it ranks devices and says
what limits them, within a factor of about two. Several devices are processes of `torchrun` with DDP: each holds the
whole model and its own rows, and DDP's buckets are a copy of the gradients; their communication is not counted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..cost.rates import Rates
from ..errors import BadInput, DoesNotFit, nearest
from ..memory.budget import gib
from ..recipe import Recipe
from .plan import Plan, plan


@dataclass(frozen=True)
class Device:
    """Published figures: GiB of memory, TB/s of it, dense TFLOP/s in bf16 (products accumulate in fp32) and fp32."""

    memory: float
    bandwidth: float
    bf16: float
    fp32: float


DEVICES = {
    "rtx-3090": Device(24, 0.936, 71, 35.6),
    "rtx-4090": Device(24, 1.008, 165, 82.6),
    "rtx-5090": Device(32, 1.792, 209, 104.8),
    "t4": Device(16, 0.320, 8.1, 8.1),  # it has no bf16: products run as in fp32
    "l4": Device(24, 0.300, 121, 30.3),
    "a10": Device(24, 0.600, 125, 31.2),
    "l40s": Device(48, 0.864, 362, 91.6),
    "a100-40g": Device(40, 1.555, 312, 19.5),
    "a100-80g": Device(80, 2.039, 312, 19.5),
    "h100": Device(80, 3.350, 989, 66.9),
    "h200": Device(141, 4.800, 989, 66.9),
}
USABLE = 0.97  # of the memory: the driver keeps the rest
REACHED = {"large": 0.5, "small": 0.1, "attention": 0.4, "bandwidth": 0.8}  # of the published figures
LAUNCH = 8e-6  # seconds until an operation has started, Python and autograd included
LINK = 2.5e10  # bytes/s between host and GPU, PCIe 4.0 x16
NOTE = (
    "speeds follow from the makers' published figures, and are not measured: they rank devices, within a factor of two"
)


@dataclass(frozen=True)
class OnDevice:
    """The plan of a run on `count` devices of a kind; None if it cannot be planned, with the reason."""

    name: str
    count: int
    plan: Plan | None
    buckets: int = 0  # bytes of DDP's copies of the gradients, in each process
    refused: str = ""

    @property
    def peak(self) -> int:
        assert self.plan is not None
        return self.plan.fast_peak_bytes + self.buckets

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits and (self.plan.fast is None or self.peak <= self.plan.fast)

    @property
    def speed(self) -> float | None:
        """Tokens per second of all devices."""
        return (
            None if self.plan is None or not self.plan.tokens_per_second else self.count * self.plan.tokens_per_second
        )

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"device": self.name, "count": self.count, "fits": self.fits, "refused": self.refused}
        if self.plan is not None:
            found |= {"fast_peak_bytes": self.peak, "slow_bytes": self.plan.slow_bytes, "ddp_bytes": self.buckets,
                      "tokens_per_second": self.speed and round(self.speed), "figures": "published"}  # fmt: skip
        return found


def parse(text: str) -> list[tuple[str, int]]:
    """ "rtx-4090,2xl40s" -> [("rtx-4090", 1), ("l40s", 2)]; BadInput for a name that is not in DEVICES."""
    found = []
    for part in (part.strip().lower() for part in text.split(",") if part.strip()):
        match = re.fullmatch(r"(?:(\d+)x)?(.+)", part)
        assert match is not None
        count, name = int(match[1] or 1), match[2]
        if name not in DEVICES or not 1 <= count <= 1024:
            have = f"the devices are {', '.join(DEVICES)}; 2x before a name is two of them"
            raise BadInput(f"plan --on {part}", have, nearest(name, list(DEVICES)))
        found.append((name, count))
    if not found:
        raise BadInput("plan --on", "no device is named", f"Name some of {', '.join(DEVICES)}")
    return found


def plan_on(recipe: Recipe, devices: Sequence[tuple[str, int]]) -> list[OnDevice]:
    """The recipe's plan on each of the devices, in their order. Its own budget is kept where it is smaller."""
    plans: dict[str, Plan | str] = {}  # by name; text: why there is none
    for name in dict.fromkeys(name for name, _ in devices):
        size = int(DEVICES[name].memory * USABLE * 2**30)
        budget = {**(recipe.budget or {})}
        budget["fast"] = size if budget.get("fast") is None else budget["fast"]
        place = dataclasses.replace(recipe.place, fast="cuda")
        moved = dataclasses.replace(recipe, place=place, budget=budget)
        try:
            plans[name] = dataclasses.replace(plan(moved, rates=rates_of(DEVICES[name])), machine=size)
        except DoesNotFit as error:
            plans[name] = error.have
    return [_on(name, count, plans[name]) for name, count in devices]


def _on(name: str, count: int, found: Plan | str) -> OnDevice:
    if isinstance(found, str):
        return OnDevice(name, count, None, refused=found)
    return OnDevice(name, count, found, 4 * found.trained if count > 1 else 0)


def rates_of(device: Device) -> Rates:
    """What a program reaches of a device's published figures."""
    tera = 1e12
    products = {
        dtype: [flops * tera * REACHED["small"], flops * tera * REACHED["large"]]
        for dtype, flops in (("bfloat16", device.bf16), ("float16", device.bf16), ("float32", device.fp32))
    }
    attention = {dtype: large / REACHED["large"] * REACHED["attention"] for dtype, (_, large) in products.items()}
    bandwidth = device.bandwidth * tera * REACHED["bandwidth"]
    return Rates(
        machine={}, products=products, attention=attention, bandwidth=bandwidth, random=bandwidth / 8, update=bandwidth,
        overhead=LAUNCH, link={"up": LINK, "down": LINK}, unpacking=bandwidth / 4,
    )  # fmt: skip


def lines(found: Sequence[OnDevice]) -> Iterator[str]:
    """The table for people."""
    yield f"{'device':<14} {'memory':>9} {'fast peak':>11} {'slow':>11} {'tokens/s':>9}  fits"
    for each in found:
        name = each.name if each.count == 1 else f"{each.count} x {each.name}"
        memory = f"{DEVICES[each.name].memory:g} GiB"
        if each.plan is None:
            yield f"{name:<14} {memory:>9}  {each.refused}"
            continue
        speed = f"{each.speed:,.0f}" if each.speed else "-"
        yield (f"{name:<14} {memory:>9} {gib(each.peak):>11} {gib(each.plan.slow_bytes):>11} {speed:>9}  "
               f"{'yes' if each.fits else 'no'}")  # fmt: skip
    if any(each.count > 1 for each in found):
        yield "of several devices, memory is that of each process; DDP's communication is not counted"
    yield NOTE
