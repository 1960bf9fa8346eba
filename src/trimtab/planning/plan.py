"""`trimtab plan RECIPE.yaml`: predicts the memory and speed of a run, and whether it fits the budget.

The model is built from its config on the `meta` device, patched, and trained for two steps on fake tensors
(cost/trace.py), with the engine's fused operations, the objective's loss and the recipe's optimizer. No weights are
read, and no method needs a formula.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cost.overhead import Overhead
from ..data.chat import template_of
from ..data.files import read_table
from ..errors import BadInput, Untraceable
from ..memory.budget import Budget, fast_bytes, free_bytes, gib, ram, slow_bytes
from ..quiet import no_dataset_bars, silence_libraries
from ..recipe import Recipe
from ..tiered.mapped_file import require_folder, slow_kind
from .calibrate import known_overhead, known_rates
from .rollouts import largest, phases, with_rollouts
from .step import PlannedStep, step_cost

if TYPE_CHECKING:
    from ..cost.trace import StepCost
    from ..engine.inputs import Foreseen

WHY = {
    "weights": "base weights that are copied: buffers, and weights that are converted or changed",
    "adapter": "trained parameters, and what the patches store with them",
    "experts": "slots for experts of the base",
    "gradients": "of the trained parameters",
    "optimizer": "the optimizer's state, and temporary tensors of its step",
    "activations": "what the forward pass saves for the backward pass",
    "cache": "keys and values of the tokens so far",
    "logits": "one chunk of the head's output, and its gradient",
    "temporaries": "what the backward pass allocates and frees",
}
TABLES, EXPERTS = "rows in the slow tier", "experts in the slow tier"
OFFLOADED, HELD = "training state in the slow tier", "activations in the slow tier"
SLOW = {
    "mapped weights": "base weights in their file's precision, mapped from the file",
    TABLES: "an adapter's table, with its gradients and Adam's state",
    EXPERTS: "the base's experts, one record each",
    OFFLOADED: "trained weights, their gradients and Adam's moments, in a file",
    HELD: "what checkpointed blocks keep for the backward pass, in RAM",
}
USED = 0.95  # of the budget: a plan is not more exact
TIERS = "fast: memory that budget.fast limits, of the process or a GPU; slow: larger memory below it, files or RAM"

CUDA = [
    "traced with the CPU's kernels: the workspaces of CUDA kernels and the allocator's rounding are not included",
    "the fast tier is the memory that PyTorch's allocator reserves; the driver's context adds 0.3 to 1 GiB",
    "not yet measured on a GPU",
]


@dataclass(frozen=True)
class Plan:
    """The predicted memory of a run at its peak, in bytes, and its speed."""

    kinds: dict[str, int]  # kind -> bytes of tensors at the peak (cost/trace.py)
    phase: str  # the phase of the step with the peak
    process: int  # interpreter, libraries, data
    overhead: int  # beside the tensors, from the first step on (cost/overhead.py)
    backward_transient: int  # allocated and freed by the backward pass of a block; partly included in the overhead
    budget: Budget
    machine: int | None  # size of the fast tier; None if this machine has no such device
    rows: int
    tokens: int
    counted: int | None = None  # tokens of a row in the loss, if known
    tokens_per_second: float | None = None  # if the machine's rates are known (cost/rates.py)
    trained: int = 0  # parameters
    efficiency: float = 1.0  # speed of a step over that of its single operations (cost/overhead.py)
    disk_bytes_per_step: int = 0  # of the mapped base, if it exceeds free memory
    notes: list[str] = field(default_factory=list)
    phases: list[tuple[str, int, str]] = field(default_factory=list)  # of a step that samples replies (rollouts.py)
    disk: int | None = None  # free space on the disk of the tables; None if they are in RAM or allocated already
    take: Callable[[int], int] | None = None  # how many of so many spare bytes the patches would use

    @property
    def slow_bytes(self) -> int:
        return sum(self.kinds.get(kind, 0) for kind in SLOW)

    @property
    def live_peak_bytes(self) -> int:
        return sum(self.kinds.values()) - self.slow_bytes

    @property
    def start_bytes(self) -> int:
        """Memory of the process when training begins, with weights and adapter."""
        return self.process + self.kinds.get("weights", 0) + self.kinds.get("adapter", 0)

    @property
    def fast_peak_bytes(self) -> int:
        return self.process + self.overhead + self.live_peak_bytes

    def step_seconds(self, micro_batches: int) -> float | None:
        """Seconds of a step of the largest batch; None if the speed is unknown."""
        speed = self.tokens_per_second
        return micro_batches * self.rows * self.tokens / speed if speed else None

    @property
    def fits(self) -> bool:
        slow = self.budget.slow is None or self.slow_bytes <= self.budget.slow
        return self.fast_peak_bytes <= self.fast and slow and (self.disk is None or self.table_bytes <= self.disk)

    @property
    def table_bytes(self) -> int:
        return self.kinds.get(TABLES, 0) + self.kinds.get(OFFLOADED, 0)

    @property
    def fast(self) -> int:
        """The limit of the fast tier: the budget, else the size of the fast tier."""
        found = self.machine if self.budget.fast is None else self.budget.fast
        assert found is not None, "a plan for another machine has a budget"
        return found

    def settled(self, device: Any, take: Callable[[int], int] | None = None) -> Plan:
        """The plan with what the patches use of the bytes that are left (`take`; default: its own), a margin apart.
        Without a budget nothing is left on a CPU, whose memory others need too."""
        take = take or self.take
        if take is None or (self.budget.fast is None and device.type == "cpu"):
            return self
        more = take(max(0, int(USED * self.fast) - self.fast_peak_bytes))
        return dataclasses.replace(self, kinds={**self.kinds, "experts": self.kinds.get("experts", 0) + more})

    @property
    def items(self) -> list[dict[str, Any]]:
        """One row per kind: what, tier, bytes, why."""
        rows = [{"what": kind, "tier": "fast", "bytes": self.kinds[kind], "why": WHY[kind]}
                for kind in WHY if self.kinds.get(kind)]  # fmt: skip
        rows.insert(0, {"what": "process", "tier": "fast", "bytes": self.process,
                        "why": "interpreter and libraries"})  # fmt: skip
        rows.append({"what": "overhead", "tier": "fast", "bytes": self.overhead,
                     "why": "threads, generated code, and gaps that malloc leaves between tensors"})  # fmt: skip
        rows += [{"what": kind, "tier": "slow", "bytes": self.kinds[kind], "why": SLOW[kind]}
                 for kind in SLOW if self.kinds.get(kind)]  # fmt: skip
        return rows

    def predicted(self) -> dict[str, Any]:
        """The `predicted` part of run.json."""
        return {
            "fast_peak_bytes": self.fast_peak_bytes, "fast_growth_bytes": self.fast_peak_bytes - self.start_bytes,
            "process_bytes": self.process, "overhead_bytes": self.overhead,
            "backward_transient_bytes": self.backward_transient, "live_peak_bytes": self.live_peak_bytes,
            "live_growth_bytes": growth(self.kinds), "slow_bytes": self.slow_bytes, "phase": self.phase,
            "batch": {"rows": self.rows, "tokens": self.tokens}, "bytes": self.kinds,
            "tokens_per_second": self.tokens_per_second and round(self.tokens_per_second, 2),
            "efficiency": self.efficiency, "disk_bytes_per_step": self.disk_bytes_per_step,
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `trimtab plan --json`."""
        return {
            **{key: value for key, value in self.predicted().items() if key != "bytes"}, "fits": self.fits,
            "budget": dataclasses.asdict(self.budget), "items": self.items, "notes": self.notes,
            "disk_free_bytes": self.disk, "phases": self.phases,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """The table for people."""
        width = max(len("mapped weights"), *(len(row["what"]) for row in self.items))
        yield f"{'what':<{width}}  {'tier':<5} {'size':>12}  why"
        for row in self.items:
            yield f"{row['what']:<{width}}  {row['tier']:<5} {gib(row['bytes']):>12}  {row['why']}"
        for name, size, why in self.phases:
            yield f"{name:<{width}}  {'fast':<5} {gib(size):>12}  {why}"
        yield f"{'peak':<{width}}  {'fast':<5} {gib(self.fast_peak_bytes):>12}  {self.phase}"
        if self.tokens_per_second:
            speed = f"{self.tokens_per_second:,.0f} t/s"
            yield f"{'speed':<{width}}  {'':<5} {speed:>12}  predicted, for rows of this length"
        if self.trained:
            yield f"{'trained':<{width}}  {'':<5} {self.trained:>12,}  parameters"
        yield TIERS
        yield from self.notes
        fast = "this machine's memory" if self.budget.fast is None else "the budget"
        summary = f"{gib(self.fast_peak_bytes)} of {gib(self.fast)}, {fast}"
        if self.budget.slow is not None:
            summary += f"; {gib(self.slow_bytes)} of {gib(self.budget.slow)}, the slow tier's"
        if self.disk is not None and self.table_bytes:
            what = "tables" if self.kinds.get(TABLES) else "training state"
            summary += f"; {gib(self.table_bytes)} of {what}, {gib(self.disk)} free on their disk"
        yield f"{'fits' if self.fits else 'does not fit'}: {summary}"


@silence_libraries()
@no_dataset_bars()
def plan(
    recipe: Recipe,
    *,
    rows: int | None = None,
    tokens: int | None = None,
    counted: int | None = None,
    filled: float = 1.0,
    lengths: int = 1,
    prompt: int | None = None,
    process: int | None = None,
    args: Any = None,
    rates: Any = None,
) -> Plan:
    """Plans a run of the recipe. BadInput for a recipe that cannot be run, and for what the planner does not cover.

    `rows`, `tokens`: the largest batch (default: that of `data.train`, or else the recipe's batch size and max_length).
    `counted`: the largest number of tokens of a row in the loss (default: all). `filled`: the share of tokens that are
    not padding; only these count for the speed. `prompt`: tokens of the longest prompt, if replies are sampled.
    `lengths`: how many distinct lengths the batches of a run have.

    `process`: anonymous bytes that the process uses beside the tensors (default: `process_bytes`). `args`: the training
    arguments of an existing trainer (creating new ones would reset its accelerator). `rates`: those of a machine
    (cost/rates.py; default: this one's, if `trimtab doctor` has measured them).
    """
    import torch

    from ..cost.trace import highest
    from ..engine.arguments import check_optimizer, training_arguments
    from ..engine.objectives import arguments_class
    from ..tiered.threads import extra_threads

    place, objective = recipe.place, recipe.load_objective()
    if not recipe.patches:
        raise BadInput("plan", "the recipe has no patch", "Add one under patches, or use planning.search.search")
    device = place.device
    template_of(recipe.data)  # BadInput for a missing file, as in `train`
    for patch in recipe.load_patches():
        if patch.calibration_file:
            read_table([patch.calibration_file], 1, "train")
    machine, budget = limits(recipe)
    args = args or training_arguments(recipe, arguments_class(objective), Path(recipe.output), device.type == "cpu")
    check_optimizer(recipe, args)
    notes: list[str] = []
    beside = Overhead(fixed=0, share=0.0) if device.type == "cuda" else known_overhead()
    if tokens is None:
        at_start = process_bytes(beside)
        if (seen := foreseen(recipe, notes)) is not None:
            tokens, counted, filled, lengths = (seen.batch[key] for key in ("tokens", "counted", "filled", "lengths"))
            prompt = seen.batch.get("prompt")
            rows, process = rows or seen.batch["rows"], at_start + seen.nbytes if process is None else process
            recipe = seen.recipe
        else:
            tokens = longest_allowed(recipe)
            if hasattr(args, "num_generations"):
                prompt = max(1, tokens - args.max_completion_length)
                rows, tokens, counted = largest(objective, args, prompt).values()
    rows = rows or args.per_device_train_batch_size
    if device.type == "cuda":
        notes += CUDA
        process = 0
    elif not beside.measured:
        notes.append("the overhead was measured on another machine: `trimtab doctor` measures this one")
    if process is None:
        process = process_bytes(beside)
    rates = rates or known_rates(device.type)
    if beside.quick:
        notes.append("this machine was measured quickly: `trimtab doctor --thorough` makes plans more accurate")
    with torch.random.fork_rng(devices=[]):
        try:
            cost = step_cost(recipe, args, rows, tokens, counted, rates)
        except Untraceable as error:
            cost = _real_step(recipe, args, rows, tokens, counted, rates, error)
            notes.append(f"a real step was run, since {error.have}; other data may use more memory")
    parts: list[tuple[str, int, str]] = []
    if prompt is not None:
        cost, said = with_rollouts(cost, recipe, args, prompt)
        parts = phases(cost, said)
    phase, kinds = highest(cost.peaks)
    notes += cost.notes
    micro_batches = args.gradient_accumulation_steps
    speed, read = _speed(cost, rates, beside.efficiency, kinds, micro_batches, rows * tokens * filled, notes)
    if recipe.engine.compile:
        notes.append("traced without torch.compile")
    if cost.copied_ahead:
        notes.append(f"the overhead includes {gib(cost.copied_ahead)} for rows that are copied before they are used")
    on_cpu = device.type == "cpu"
    threads = extra_threads() if kinds.get(TABLES) and on_cpu else 0
    transient = cost.backward_transient if on_cpu else 0
    shapes = cost.product_shapes * (lengths - 1) if on_cpu else 0
    overhead = beside.of(growth(kinds), transient, cost.autocast, threads, shapes) + cost.copied_ahead
    disk = None
    if slow_kind(place.slow, device) == "disk":
        if (kinds.get(TABLES) or kinds.get(OFFLOADED)) and recipe.place.folder:
            require_folder(recipe.place.folder)
        disk = free_bytes(recipe.place.folder or recipe.output)
    return Plan(
        kinds, phase, process, overhead, transient, budget, machine, rows, tokens, counted, speed, cost.trained,
        beside.efficiency, read, notes, parts, disk, cost.take,
    )  # fmt: skip


def limits(recipe: Recipe) -> tuple[int | None, Budget]:
    """-> the bytes of the fast tier (None: this machine has no such device), and the budget."""
    device = recipe.place.device
    machine = fast_bytes(device)
    if machine is None and not (recipe.budget or {}).get("fast"):
        raise BadInput(f"plan a run on {device}", "this machine has none", 'Set its memory: budget: {fast: "24GiB"}')
    return machine, Budget.of(recipe.budget, machine, slow_bytes(device, recipe.place.folder or recipe.output))


def foreseen(recipe: Recipe, notes: list[str]) -> Foreseen | None:
    """The largest batch of the run's rows (engine/inputs.py); None, with a note, if the rows cannot be read."""
    from ..engine.inputs import foresee, unread

    length = recipe.training_values()["max_length"]
    if why := unread(recipe):
        notes.append(f"{why}: for rows of {length} tokens (max_length); if all are shorter, the run uses less")
        return None
    seen = foresee(recipe)
    notes.append(f"for the longest rows of data.train: {seen.batch['tokens']} tokens")
    notes += seen.notes
    return seen


def longest_allowed(recipe: Recipe) -> int:
    """`max_length`, for rows that are not known."""
    if (length := recipe.training_values()["max_length"]) is None:
        raise BadInput("plan: max_length: none", "rows may then have any length", "Give training: max_length")
    return length


def process_bytes(beside: Overhead) -> int:
    """Bytes of a run's process at its start: as measured, else those of this process now."""
    from ..memory.meter import process_memory

    return beside.process or process_memory()["anon"]


def growth(kinds: dict[str, int]) -> int:
    """Bytes of the tensors that training allocates: those of the fast tier except weights and adapter."""
    return sum(size for kind, size in kinds.items() if kind not in (*SLOW, "weights", "adapter"))


def _real_step(
    recipe: Recipe, args: Any, rows: int, tokens: int, counted: int | None, rates: Any, why: Untraceable
) -> StepCost:
    """The cost of a step with real weights and random ids, for a model that cannot be traced without values."""
    from ..model.load import weights_at_hand

    if not weights_at_hand(recipe.model):
        raise why
    step = PlannedStep(recipe, args, None, real=True)
    return step.complete(step.trace(rows, tokens, counted, rates))


def _speed(
    cost: StepCost, rates: Any, efficiency: float, kinds: dict[str, int], micro_batches: int, tokens: float,
    notes: list[str],
) -> tuple[float | None, int]:  # fmt: skip
    """-> (tokens per second (None: unknown), bytes read from the disk per step); appends to `notes`."""
    from ..cost.roofline import read_again, written_back
    from ..cost.trace import MAPPED, live

    mapped, tables = kinds.get(MAPPED, 0) + kinds.get(EXPERTS, 0), kinds.get(TABLES, 0)
    free = ram().get("MemAvailable", mapped + tables + live(kinds)) - live(kinds)
    read = read_again(mapped, free, micro_batches)
    seconds = cost.step_seconds(micro_batches)
    if read:
        notes.append(f"the mapped base exceeds free memory: {gib(read)} are read from the disk in each step")
    if rates is None:
        notes.append("the speed is predicted once `trimtab doctor` has measured this machine")
    elif seconds is None:
        notes.append("the speed of MEFT is predicted only with semantics: per_token, adam: lazy, moments: fp32")
    elif tables > free:
        notes.append("the speed is not predicted: the tables exceed free memory, and rows are read from the disk")
        return None, read
    if seconds is None or (read and not rates.disk.get("read")):
        return None, read
    if (written := written_back(cost.written, free, rates)) is None:
        return None, read
    seconds = seconds / efficiency + (read / rates.disk["read"] if read else 0.0)
    if written > seconds:
        notes.append(
            f"each step changes {gib(cost.written)} of tables: the speed is limited by writing them to the disk"
        )
    return micro_batches * tokens / max(seconds, written), read
