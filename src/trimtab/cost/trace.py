"""Traces the memory and time of a training step on tensors that have shapes but no values.

PyTorch's fake tensors run through the same code as training: autograd, custom functions, the optimizer. Each operation
creates storages with a size and a lifetime but no memory, which are counted by kind and phase. Memory that a kernel
allocates internally is not counted, as in the meter's count of live tensors (`meter.LiveTensors`).

If the size of an operation's result depends on data, the largest possible size is assumed (BOUNDS). A peak is recorded
for each phase, not only for the step: in a stack of equal blocks each phase's peak is linear in the depth, so a deep
model can be extrapolated from two shallow ones, although the phase with the highest peak may change.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrimtabError, Untraceable
from ..foreign import DataDependentOutputException, FakeTensorMode
from ..memory.meter import LiveTensors
from ..model import anatomy
from ..model.fused_ops import fresh_biases
from ..model.quant import quantised_state
from ..quiet import silence_libraries
from .fake import BOUNDS, empty_like_meta
from .roofline import Clock

aten = torch.ops.aten
PRODUCTS = {op.default for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)}
PRODUCTS |= {op.out for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)}
Bytes = dict[str, int]  # kind -> bytes
Peaks = dict[str, Bytes]  # phase -> bytes in use when that phase used the most

WEIGHTS, MAPPED, ADAPTER, GRADIENTS = "weights", "mapped weights", "adapter", "gradients"
ROWS = "rows in the slow tier"
EXPERTS, EXPERT_ROWS = "experts", "experts in the slow tier"
OFFLOADED = "training state in the slow tier"  # weights, gradients and moments (tiered/offload.py)
BLOCK_BACKWARD = ("backward of the last block", "backward of the blocks between")
HELD = "activations in the slow tier"
SLOW = (MAPPED, ROWS, EXPERT_ROWS, OFFLOADED, HELD)  # kinds of the slow tier
OPTIMIZER, ACTIVATIONS, LOGITS, TEMPORARIES = "optimizer", "activations", "logits", "temporaries"
CACHE = "cache"
EVALUATION = "evaluation"  # a phase; OPTIMIZER is one too
MICRO_BATCHES = 2  # of an optimizer step that are traced


@dataclass(frozen=True)
class StepCost:
    """The cost of one optimizer step of a model. The fields from `trained` on are set for a whole model only."""

    peaks: Peaks
    backward_transient: int = 0  # most bytes that the backward pass of a block allocates and frees
    product_shapes: int = 0  # distinct shapes of 16-bit matrix products
    seconds: dict[str, float] | None = None  # by phase; None: unknown
    written: float = 0.0  # bytes of tables in files that it changes
    trained: int = 0  # parameters, including rows in the slow tier
    autocast: bool = False
    copied_ahead: int = 0  # most bytes of rows that are copied to a device before they are used
    notes: tuple[str, ...] = ()  # how the patches are applied
    take: Callable[[int], int] | None = None  # how many of so many spare bytes the patches would use (Surgery.take)

    def step_seconds(self, micro_batches: int) -> float | None:
        """Seconds of a step over `micro_batches` (of which at most MICRO_BATCHES were traced); None: unknown."""
        if self.seconds is None:
            return None
        update = self.seconds.get(OPTIMIZER, 0.0)
        passes = sum(taken for phase, taken in self.seconds.items() if phase not in (OPTIMIZER, EVALUATION))
        return passes * micro_batches / min(MICRO_BATCHES, micro_batches) + update


def extend(shallow: StepCost, deep: StepCost, depths: tuple[int, int], depth: int) -> StepCost:
    """The cost of a stack of `depth` equal blocks, from traces of two shallower ones; linear, phase by phase."""
    low, high = depths
    peaks: Peaks = {}
    for phase in shallow.peaks.keys() & deep.peaks.keys():
        one, two = shallow.peaks[phase], deep.peaks[phase]
        at = {kind: (one.get(kind, 0), two.get(kind, 0)) for kind in one.keys() | two.keys()}
        peaks[phase] = {k: max(0, a + (b - a) * (depth - low) // (high - low)) for k, (a, b) in at.items()}

    def linear(a: float, b: float) -> float:
        return max(0.0, a + (b - a) * (depth - low) / (high - low))

    seconds = None
    if shallow.seconds is not None and deep.seconds is not None:
        phases = dict.fromkeys((*shallow.seconds, *deep.seconds))
        seconds = {p: linear(shallow.seconds.get(p, 0.0), deep.seconds.get(p, 0.0)) for p in phases}
    return StepCost(
        peaks, max(shallow.backward_transient, deep.backward_transient),
        max(shallow.product_shapes, deep.product_shapes), seconds, linear(shallow.written, deep.written),
    )  # fmt: skip


def live(bytes_by_kind: Bytes) -> int:
    """Bytes of the fast tier among them."""
    return sum(size for kind, size in bytes_by_kind.items() if kind not in SLOW)


def highest(peaks: Peaks) -> tuple[str, Bytes]:
    """The phase that uses the most of the fast tier, and its bytes by kind."""
    return max(peaks.items(), key=lambda item: live(item[1]))


class Trace(LiveTensors):
    """Counts live storages by kind while active, and records `peaks[phase]`. The caller sets `phase` and `kind`.

    `kind`: that of new storages. `vocabulary`: tensors with so many columns are logits. `counted`: how many positions
    of a batch count in the loss, if known. Mapped storages cost nothing until they are written: then their pages are
    the process's own. `backward_transient` and `products` (shapes) are for `StepCost`.
    """

    def __init__(self, vocabulary: int = 0, counted: int | None = None, clock: Clock | None = None, fake: bool = True):
        super().__init__()
        self.vocabulary, self.counted, self.clock, self.fake = vocabulary, counted, clock, fake
        self.phase, self.kind = "start", ACTIVATIONS
        self.held: Bytes = {}
        self.peaks: Peaks = {}
        self.heights: dict[str, int] = {}
        self.backward_transient = self._entered = self._top = 0
        self.products: set[tuple] = set()
        self._kinds: dict[int, str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, requested = kwargs or {}, func
        if func in PRODUCTS:
            self._product(func, args)
        elif func.name() == "trimtab::rows_by_expert":  # of any number of rows: in powers of two
            sizes = range(args[0].shape[0].bit_length())
            self.products.update((func, size, tuple(args[1].shape), args[1].stride()[-1]) for size in sizes)
        if self.fake and (bound := BOUNDS.get(func.name())):
            func = functools.partial(bound, self.counted)
        elif MAPPED in self.held and func._schema.is_mutable:
            self._written(func._schema, args)
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if self.clock is not None:
                self.clock.add(self.phase, requested, args, kwargs, out)
            return out
        except DataDependentOutputException:
            if func is not aten._local_scalar_dense.default:
                raise
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)

    def watch(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Counts tensors that exist before the trace."""
        before, self.kind = self.kind, kind
        for tensor in tensors:
            self._add(tensor)
        self.kind = before

    def relabel(self, tensor: Tensor, kind: str) -> None:
        if tensor.untyped_storage()._cdata in self._kinds:
            self._move(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes(), kind)

    def kind_of(self, tensor: Tensor) -> str | None:
        """The kind that the tensor's storage counts as; None: it is not counted."""
        return self._kinds.get(tensor.untyped_storage()._cdata)

    def gradient(self, parameter: Tensor) -> None:
        """Counts the parameter's gradient, which is complete, as what it is."""
        if parameter.grad is not None:  # an optimizer that steps in the backward pass has dropped it
            self.relabel(parameter.grad, OFFLOADED if self.kind_of(parameter) == OFFLOADED else GRADIENTS)

    def enter(self, phase: str, kind: str | None = None) -> None:
        if self.phase in BLOCK_BACKWARD:
            self.backward_transient = max(self.backward_transient, self._top - self._entered)
        self.phase, self.kind = phase, kind or self.kind
        self._entered = self._top = self.live
        self._peak()

    def forget_peaks(self) -> None:
        self.peaks, self.heights = {}, {}
        if self.clock is not None:
            self.clock.forget()

    def _born(self, tensor: Tensor, key: int, size: int) -> None:
        kind = self.kind
        if kind in (ACTIVATIONS, TEMPORARIES) and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            kind = LOGITS
        self._kinds[key] = kind
        self.held[kind] = self.held.get(kind, 0) + size
        if kind not in SLOW:
            self.live += size
            self._peak()

    def _died(self, key: int, size: int) -> None:
        kind = self._kinds.pop(key)
        self.held[kind] -= size
        if kind not in SLOW:
            self.live -= size

    def _move(self, key: int, size: int, kind: str) -> None:
        old = self._kinds[key]
        if old == kind:
            return
        self._kinds[key] = kind
        self.held[old] -= size
        self.held[kind] = self.held.get(kind, 0) + size
        if old in SLOW and kind not in SLOW:
            self.live += size
            self._peak()
        elif kind in SLOW and old not in SLOW:
            self.live -= size

    def _peak(self) -> None:
        self._top = max(self._top, self.live)
        if self.live > self.heights.get(self.phase, -1):
            self.heights[self.phase] = self.live
            self.peaks[self.phase] = dict(self.held)

    def _product(self, func: Any, args: tuple) -> None:
        factors = [a for a in args if isinstance(a, Tensor)][-2:]
        if factors[0].dtype in (torch.bfloat16, torch.float16):
            self.products.add((func, *((tuple(f.shape), f.stride()[-1]) for f in factors)))

    def _written(self, schema: Any, args: tuple) -> None:
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in value if isinstance(value, list | tuple) else (value,):
                    if tensor is None:  # an optional argument
                        continue
                    storage = tensor.untyped_storage()
                    if self._kinds.get(storage._cdata) == MAPPED:
                        self._move(storage._cdata, storage.nbytes(), WEIGHTS)


@dataclass
class Step:
    """The parts of a training step for `trace_steps`, each as the trainer would create it."""

    model: Any  # patched; on meta, or with its values
    device: torch.device
    batch: Callable[[], dict[str, Tensor]]
    loss: Callable[[dict[str, Tensor]], Tensor]
    backward: Callable[[Callable[[], Tensor], Callable[[Tensor], None]], Any]  # the stepper's
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    kind_of: Callable[[str, Tensor], str]  # (path, tensor) -> the kind that a parameter or buffer counts as
    evaluation: Callable[[], dict[str, Tensor]] | None = None  # an evaluation batch, if the run evaluates
    micro_batches: int = 1  # at most MICRO_BATCHES of them are traced
    clip: float = 0.0
    counted: int | None = None  # positions of a batch that count in the loss
    full_rows: bool = False  # no row of a batch is padded
    offload: bool = False  # what checkpointed blocks keep lies in the slow tier
    clock: Clock | None = None  # counts the seconds of the operations


def trace_steps(step: Step, fake: bool = True) -> StepCost:
    """The cost of the second optimizer step of `step.model`, without tables in the slow tier.

    The model keeps fake tensors afterwards; with `fake=False` a real step runs, which uses the counted memory.
    """
    trace = Trace(step.model.config.get_text_config().vocab_size, step.counted, step.clock, fake)
    with _traced(trace, step.model, step.device, step.kind_of, step.full_rows):
        if step.offload:
            _hold_in_slow_tier(trace, step.model)
        trained = [p for p in step.model.parameters() if p.requires_grad]
        optimizer = step.optimizer(trained)
        for _ in range(2):
            trace.forget_peaks()
            _train(step, trace, optimizer, trained)
        if step.evaluation is not None:
            step.model.eval()
            with torch.no_grad():
                trace.enter(EVALUATION, TEMPORARIES)
                step.loss(step.evaluation())
    seconds = None if step.clock is None else step.clock.phases
    return StepCost(trace.peaks, trace.backward_transient, len(trace.products), seconds)


def trace_inference(
    model: Any, kind_of: Callable[[str, Tensor], str], run: Callable[[Trace], None], fake: bool = True
) -> StepCost:
    """The cost of `run`, which uses `model` without gradients and enters the trace's phases; without tables."""
    trace = Trace(model.config.get_text_config().vocab_size, fake=fake)
    with _traced(trace, model, torch.device("cpu"), kind_of), torch.no_grad():
        trace.kind = TEMPORARIES
        run(trace)
    return StepCost(trace.peaks, 0, len(trace.products))


@contextlib.contextmanager
def _traced(
    trace: Trace, model: Any, device: torch.device, kind_of: Callable[[str, Tensor], str], full_rows: bool = False
) -> Iterator[None]:
    """Within it `trace` is active. A fake trace leaves fake tensors on `device` in `model`."""
    kinds = {n: kind_of(n, t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    with contextlib.ExitStack() as stack:
        stack.enter_context(silence_libraries())
        if trace.fake:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(fresh_biases(full_rows))
            empty_like_meta(model, device)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            trace.watch([tensor], kinds[name])
        trace.watch(quantised_state(model), WEIGHTS)
        try:
            with phases(trace, model), trace:
                yield
        except TrimtabError:
            raise
        except Exception as error:  # a model's own code may need values
            raise Untraceable(
                f"plan {type(model).__name__}",
                f"the planner cannot trace it ({type(error).__name__}: {_operation(error)})",
                "Remove budget:; run.json will show what the run used",
            ) from error


def _hold_in_slow_tier(trace: Trace, model: Any) -> None:
    """From now on the inputs that checkpointed blocks save are copied to the slow tier, and back when they are needed,
    as under transformers' `activation_checkpointing_kwargs: {offload: true}` on a GPU."""

    def pack(tensor: Tensor) -> Tensor:
        before, trace.kind = trace.kind, HELD
        copied = tensor.clone()
        trace.kind = before
        return copied

    def held(checkpointed: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(pack, Tensor.clone):
                return checkpointed(*args, **kwargs)

        return run

    for module in model.modules():
        if checkpointed := vars(module).get("_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = held(checkpointed)


def _operation(error: Exception) -> str:
    return str(getattr(error, "func", None) or " ".join(str(error).split())[:200])


def _train(step: Step, trace: Trace, optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    def loss() -> Tensor:
        trace.enter("embedding", ACTIVATIONS)
        return step.loss(step.batch())

    def back(value: Tensor) -> None:
        trace.enter("backward of the head", TEMPORARIES)
        value.backward()

    for _ in range(min(MICRO_BATCHES, step.micro_batches)):
        step.backward(loss, back)
    trace.enter("optimizer", OPTIMIZER)
    if step.clip:
        nn.utils.clip_grad_norm_(trained, step.clip)
    optimizer.step()
    for parameter in trained:
        if trace.kind_of(parameter) == OFFLOADED:
            for tensor in (t for t in optimizer.state[parameter].values() if t.dim()):  # not the number of steps
                trace.relabel(tensor, OFFLOADED)
    optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def phases(trace: Trace, model: Any) -> Iterator[None]:
    """Within it, hooks set the trace's phase as the model runs, and label gradients."""
    stack = anatomy.blocks(model)[1]
    last = len(stack) - 1

    def before(_: Any, args: tuple, index: int) -> None:
        if trace.kind == ACTIVATIONS:  # not a block that is recomputed in the backward pass
            trace.enter("blocks")

    def after(_: Any, args: tuple, output: Any, index: int) -> None:
        if trace.kind != ACTIVATIONS:
            return
        if index == last:
            trace.enter("loss")
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            where = "last block" if index == last else "first block" if index == 0 else "blocks between"
            hidden.register_hook(lambda grad: trace.enter(f"backward of the {where}"))

    trained = (p for p in model.parameters() if p.requires_grad)
    handles = [p.register_post_accumulate_grad_hook(trace.gradient) for p in trained]
    for index, block in enumerate(stack):
        handles.append(block.register_forward_pre_hook(functools.partial(before, index=index)))
        handles.append(block.register_forward_hook(functools.partial(after, index=index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
