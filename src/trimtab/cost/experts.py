"""Seconds of a mixture's experts in two tiers: for a decision now, and for machines that are not here.

A recorded routing trace says which experts each pass of each layer used, and for how many tokens. `replay` runs it
through a residency with so many slots and adds up what each pass takes on a Machine. Fiddler's three costs (arXiv
2402.07033) are rooflines here:

    fast(s) = max(bytes / B_fast, s flops / F_fast) + c_fast          the expert is in the fast tier
    move    = bytes / B_link + c_link                                 its weights are moved there
    host(s) = max(bytes / B_host, s flops / F_host) + c_host          it is computed where its weights are

    s: tokens of the expert   bytes: of its weights   flops: of one token

The paper adds the costs of a layer's experts. Here device, link and host work at the same time, so what counts is when
the last of them ends (`makespan`). A figure for a machine that is not here is simulated, and to be labelled so.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..files import write_json
from ..model.experts import TIERS, Uncounted, forward, output
from ..tiered.experts import ExpertStore
from ..tiered.residency import Residency, WorkingSet

MANY = 64  # tokens of an expert at which products are limited by arithmetic
Step = tuple[int, int, dict[int, int]]  # layer, tokens of the pass, row -> tokens that use it


@dataclass(frozen=True)
class Machine:
    """Rates of a device and of what lies below it, per second. Without `host_flops` the slow tier cannot compute.
    `alone`: one processor does all of it, one thing after the other (a CPU, to which a file is mapped)."""

    name: str
    fast_bytes: float
    fast_flops: float
    link_bytes: float
    host_bytes: float = 0.0
    host_flops: float = 0.0
    fast_start: float = 0.0  # seconds that an expert takes on the device besides
    link_start: float = 0.0
    host_start: float = 0.0
    layer_start: float = 0.0  # seconds that a pass of a layer takes besides its experts
    alone: bool = False

    def fast(self, size: float, flops: float) -> float:
        return max(size / self.fast_bytes, flops / self.fast_flops) + self.fast_start

    def move(self, size: float) -> float:
        return size / self.link_bytes + self.link_start

    def host(self, size: float, flops: float) -> float:
        if not self.host_flops:
            return float("inf")
        return max(size / self.host_bytes, flops / self.host_flops) + self.host_start


# A GPU of 24 GB (1.0 TB/s and 165 TFLOP/s in 16 bits by its maker's sheet) over three links, at 80 % of one direction's
# rate, beside a host of two memory channels a socket (80 GB/s, 2 TFLOP/s). Not measured: for simulations.
GPUS = tuple(
    Machine(f"24 GB GPU, PCIe {generation} x16", 1.0e12, 1.65e14, 0.8 * rate, 8e10, 2e12, 3e-5, 2e-5, 2e-5)
    for generation, rate in ((3, 15.75e9), (4, 31.5e9), (5, 63e9))
)


@dataclass
class Trace:
    """Which experts a run used. `rows`: of each layer; `size`: bytes of an expert; `flops`: of one of its tokens."""

    rows: list[range]
    size: int
    flops: float
    steps: list[Step] = field(default_factory=list)

    def save(self, path: Path) -> None:
        steps = [[layer, tokens, list(needed), list(needed.values())] for layer, tokens, needed in self.steps]
        write_json(path, {"layers": [len(rows) for rows in self.rows], "size": self.size, "flops": self.flops,
                          "steps": steps})  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Trace:
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            starts = [sum(found["layers"][:at]) for at in range(len(found["layers"]) + 1)]
            rows = [range(*pair) for pair in zip(starts, starts[1:], strict=False)]
            steps = [(layer, tokens, dict(zip(needed, counts, strict=True)))
                     for layer, tokens, needed, counts in found["steps"]]  # fmt: skip
            return cls(rows, found["size"], found["flops"], steps)
        except (OSError, ValueError, TypeError, KeyError) as error:
            have = f"it cannot be read ({type(error).__name__})"
            raise BadInput(f"trace {path}", have, "Record it again") from None

    @property
    def passes(self) -> int:
        """Passes of the whole stack."""
        return sum(layer == 0 for layer, _, _ in self.steps)


@dataclass
class Replayed:
    """What a trace takes: seconds in the experts, and how their uses were served."""

    seconds: float = 0.0
    hits: int = 0
    misses: int = 0
    moved: int = 0  # misses whose weights were moved to the fast tier, to stay or not
    hosted: int = 0  # misses that were computed on the host

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "hit_rate": self.hit_rate}


def replay(trace: Trace, residency: Residency, slots: int, machine: Machine) -> Replayed:
    """Runs the trace with so many slots, all free at first."""
    working, found = WorkingSet(trace.rows, residency), Replayed()
    working.resize(slots)
    for layer, tokens, needed in trace.steps:
        done = working.use(layer, needed, tokens)
        kept = [row for row, _ in done.moved]
        hosted = makespan(machine, trace.size, trace.flops, needed, [*done.hits], kept, done.streamed)
        found.seconds += hosted.seconds
        found.hits += len(done.hits)
        found.misses += len(kept) + len(done.streamed)
        found.hosted += len(hosted.rows)
        found.moved += len(kept) + len(done.streamed) - len(hosted.rows)
    return found


@dataclass(frozen=True)
class Hosted:
    """The rows that are computed on the host, and the seconds until device, link and host are done."""

    rows: list[int]
    seconds: float


def makespan(
    machine: Machine, size: float, flops: float, needed: Mapping[int, int], hits: Sequence[int],
    kept: Sequence[int], streamed: Sequence[int],
) -> Hosted:  # fmt: skip
    """For one pass of a layer: which of the rows without a slot (`streamed`) the host computes. Rows with a slot
    (`hits`) run on the device at once; `kept` are moved there first, to stay.

    The rows with the most tokens gain the most from the device, and moving costs the same for each. So the rows are
    sorted by tokens, the first k go to the device and the others to the host, and every k is tried.
    """

    def fast(row: int) -> float:
        return machine.fast(size, needed[row] * flops)

    if machine.alone:
        there = sum(machine.host(size, needed[row] * flops) for row in streamed) + machine.layer_start
        return Hosted([*streamed], sum(map(fast, [*hits, *kept])) + len(kept) * machine.move(size) + there)
    device, link = sum(map(fast, hits)) + machine.layer_start, 0.0
    for row in kept:
        link += machine.move(size)
        device = max(device, link) + fast(row)
    order = sorted(streamed, key=lambda row: (-needed[row], row))
    host = sum(machine.host(size, needed[row] * flops) for row in order)
    best, first = max(device, host), 0
    for at, row in enumerate(order):
        link += machine.move(size)
        device = max(device, link) + fast(row)
        host = sum(machine.host(size, needed[other] * flops) for other in order[at + 1 :])
        if max(device, host) < best:
            best, first = max(device, host), at + 1
    return Hosted(order[first:], best)


def best_seconds(
    machine: Machine, size: float, flops: float, needed: Mapping[int, int], hits: Sequence[int],
    streamed: Sequence[int],
) -> float:  # fmt: skip
    """The best of all assignments of `streamed`, tried one by one: to compare `makespan` with."""
    best = float("inf")
    for choice in range(1 << len(streamed)):
        hosted = [row for at, row in enumerate(streamed) if choice >> at & 1]
        device, link = sum(machine.fast(size, needed[row] * flops) for row in hits), 0.0
        for row in sorted((row for row in streamed if row not in hosted), key=lambda row: (-needed[row], row)):
            link += machine.move(size)
            device = max(device, link) + machine.fast(size, needed[row] * flops)
        host = sum(machine.host(size, needed[row] * flops) for row in hosted)
        best = min(best, max(device, host))
    return best


@torch.no_grad()
def measure(experts: nn.Module, store: ExpertStore, name: str = "this machine") -> Machine:
    """Measures Fiddler's costs with experts of `store`, whose module is `experts`: of one token and of MANY."""
    device, (_, dtype) = store.device, next(iter(store.layers[0].shapes.values()))
    rows = [*store.layers[0].rows]
    size, flops = store.slot_bytes, flops_of(store)
    width = hidden_size(experts, store)
    slots = torch.empty(len(rows), size, dtype=torch.uint8, device=device)
    for row in rows:
        store.read(row, slots[row])

    def seconds(tokens: int, weights: Callable[[int], dict[str, Tensor]]) -> float:
        """Of one expert. Each is used in turn, so that none of them is in a cache."""
        x = torch.randn(tokens, width, device=next(iter(weights(0).values())).device).to(dtype)
        return typical_seconds(lambda: [output(experts, x, weights(row)) for row in rows], device) / len(rows)

    kept, there = (lambda row: store.split(row, slots[row])), store.original
    fast, host = ([seconds(tokens, weights) for tokens in (1, MANY)] for weights in (kept, there))
    move = typical_seconds(lambda: [store.read(row, slots[row]) for row in rows], device) / len(rows)
    tiers = Uncounted(getattr(experts, TIERS))
    hidden_1H = torch.randn(1, width, device=device).to(dtype)

    def layer(used: int) -> float:
        """Seconds of a pass of one token that uses so many experts, others in each pass."""
        share_1K = torch.ones(1, used, dtype=dtype, device=device)
        turns = [(torch.arange(used, device=device)[None] + at) % len(rows) for at in range(0, len(rows), used)]
        passes = lambda: [forward(experts, hidden_1H, index_1K, share_1K, tiers) for index_1K in turns]  # noqa: E731
        return typical_seconds(passes, device) / len(turns)

    one, two = layer(1), layer(2)
    there = host[0] if store.in_place else fast[0] + move
    each = max(0.0, two - one - there)  # besides an expert's products
    return Machine(
        name, size / fast[0], MANY * flops / fast[1], size / move, size / host[0], MANY * flops / host[1], each, 0.0,
        each, max(0.0, one - there - each), store.in_place,
    )  # fmt: skip


def typical_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """The median time of `work()` after a first one: runs are predicted as they are, not as they could be."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def flops_of(store: ExpertStore) -> float:
    """Floating-point operations of one expert for one token."""
    shapes = store.layers[0].shapes.items()
    return 2.0 * sum(math.prod(shape) for name, (shape, _) in shapes if not name.endswith("_bias"))


def hidden_size(experts: nn.Module, store: ExpertStore) -> int:
    """What an expert reads."""
    rising, _ = next(iter(store.layers[0].shapes.values()))
    return rising[0] if experts.is_transposed else rising[1]


def best_hits(steps: Iterable[Step], slots: int) -> int:
    """Belady's bound: the most uses that so many slots can serve, if the future is known. A row may pass without a
    slot; of the rows that could stay, those whose next use is nearest do."""
    uses: dict[int, list[int]] = defaultdict(list)
    steps = list(steps)
    for at, (_, _, needed) in enumerate(steps):
        for row in needed:
            uses[row].append(at)
    order: list[tuple[int, int]] = []  # (next use, row) of the resident rows, rising
    resident: dict[int, int] = {}  # row -> its next use
    hits = 0
    for at, (_, _, needed) in enumerate(steps):
        for row in needed:
            hits += row in resident
        for row in needed:
            if row in resident:
                order.pop(bisect.bisect_left(order, (resident.pop(row), row)))
        for row in needed:
            later = bisect.bisect_right(uses[row], at)
            if later == len(uses[row]):
                continue
            resident[row] = uses[row][later]
            bisect.insort(order, (resident[row], row))
        while len(resident) > slots:
            del resident[order.pop()[1]]
    return hits
