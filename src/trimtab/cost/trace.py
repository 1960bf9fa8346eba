"""What a training step will hold, found by running it on tensors that have a shape and no content.

PyTorch's fake tensors go through the very code that trains: autograd, our own functions, the optimiser. Each operation
makes storages with a size and a lifetime but no memory, and these are counted, by kind, phase by phase. What a kernel
allocates inside itself is not seen; that is so for the meter's count of live tensors (`meter.LiveTensors`) too.

Where an operation's result depends on data, the largest it can be is taken (BOUNDS): all positions of a batch count in
the loss. A peak is kept for each phase and not only for the step: in a stack of equal blocks each phase's peak is
linear in the depth, so that a deep model follows from two shallow ones, while the phase that holds the most may change.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrimtabError, Untraceable
from ..foreign import DataDependentOutputException, FakeTensorMode
from ..memory.meter import LiveTensors, file_ranges, is_mapped
from ..model import anatomy
from ..model.efficient import biases_apart
from ..model.quant import is_quantised, quantised_state, rebuild
from .roofline import Clock

aten = torch.ops.aten
PRODUCTS = {op.default for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)}
PRODUCTS |= {op.out for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)}
Bytes = dict[str, int]  # kind -> bytes
Peaks = dict[str, Bytes]  # phase -> what was held when that phase held the most

WEIGHTS, MAPPED, ADAPTER, GRADIENTS = "weights", "mapped weights", "adapter", "gradients"
ROWS = "rows in the slow tier"
WAYS_BACK = ("backward of the last block", "backward of the blocks between")
SLOW = (MAPPED, ROWS)  # what is not the fast tier's
OPTIMISER, ACTIVATIONS, LOGITS, TEMPORARIES = "optimiser", "activations", "logits", "temporaries"


def _nonzero(counted: int | None, x: Tensor) -> Tensor:
    return x.new_empty((x.numel() if counted is None else min(counted, x.numel()), x.dim()), dtype=torch.int64)


def _unique(
    _: int | None, x: Tensor, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False
) -> tuple:
    index = functools.partial(x.new_empty, dtype=torch.int64)
    return x.new_empty(x.numel()), index(x.shape if return_inverse else 0), index(x.numel() if return_counts else 0)


def _int8(_: int | None, x: Tensor, threshold: float = 0.0) -> tuple:
    """bitsandbytes' quantising of activations; no column of theirs is taken for an outlier (a few of them are)."""
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32),
        (x.new_empty(0, dtype=torch.int64) if threshold > 0 else None),
    )


BOUNDS: dict[str, Callable[..., Any]] = {  # by name: bitsandbytes may not be there
    "aten::nonzero": _nonzero, "aten::_unique2": _unique, "bitsandbytes::int8_vectorwise_quant": _int8,
}  # fmt: skip


class Trace(LiveTensors):
    """Counts live storages by kind while active, and keeps `peaks[phase]`. The caller names `phase` and `kind`.
    `churn`: the most bytes that a block's backward pass used beside what was there when it began. `products`: the
    matrix products in 16 bits, each form once.

    `kind` is what storages made from now on are. `vocabulary`: tensors of so many columns are logits. `counted`: how
    many positions of a batch count in the loss, where that is known. Mapped storages cost nothing here until something
    writes into them: then their pages are the process's own.
    """

    def __init__(self, vocabulary: int = 0, counted: int | None = None, clock: Clock | None = None, fake: bool = True):
        super().__init__()
        self.vocabulary, self.counted, self.clock, self.fake = vocabulary, counted, clock, fake
        self.phase, self.kind = "start", ACTIVATIONS
        self.held: Bytes = {}
        self.peaks: Peaks = {}
        self.heights: dict[str, int] = {}
        self.churn = self._entered = self._top = 0
        self.products: set[tuple] = set()
        self._kinds: dict[int, str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, asked = kwargs or {}, func
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
                self.clock.add(self.phase, asked, args, kwargs, out)
            return out
        except DataDependentOutputException:
            if func is not aten._local_scalar_dense.default:
                raise
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)

    def watch(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count what was there before the trace began."""
        before, self.kind = self.kind, kind
        for tensor in tensors:
            self._add(tensor)
        self.kind = before

    def relabel(self, tensor: Tensor, kind: str) -> None:
        if tensor.untyped_storage()._cdata in self._kinds:
            self._move(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes(), kind)

    def enter(self, phase: str, kind: str | None = None) -> None:
        if self.phase in WAYS_BACK:
            self.churn = max(self.churn, self._top - self._entered)
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
        if old == MAPPED:
            self.live += size
            self._peak()

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
                    storage = tensor.untyped_storage()
                    if self._kinds.get(storage._cdata) == MAPPED:
                        self._move(storage._cdata, storage.nbytes(), WEIGHTS)


@contextlib.contextmanager
def metered(
    trainer: Any,
    model: Any,
    own: Sequence[Tensor],
    optimizer: Any,
    tables: Iterable[Tensor] = (),
    aside: Iterable[torch.UntypedStorage] = (),
) -> Iterator[Trace]:
    """Within it, a real step of `trainer` is counted as the planner counts a fake one: by kind, phase by phase.

    `own`: the tensors of the patches; `tables`: those of them that lie in the slow tier. What a mapped file holds is in
    `MAPPED`. `aside`: storages of the model as it was loaded, of which a patch may keep some for the way back.
    """
    maps = file_ranges()
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    trace = Trace(vocabulary, fake=False)
    trace.watch(tables, ROWS)
    adapters = {t.untyped_storage()._cdata for t in own}
    for tensor in (*model.parameters(), *model.buffers()):
        mapped = is_mapped(tensor, maps)
        ours = tensor.untyped_storage()._cdata in adapters or tensor.requires_grad
        trace.watch([tensor], MAPPED if mapped else ADAPTER if ours else WEIGHTS)
        if tensor.grad is not None:
            trace.watch([tensor.grad], GRADIENTS)
    trace.watch(own, ADAPTER)
    for storage in aside:
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        trace.watch([whole], MAPPED if is_mapped(whole, maps) else WEIGHTS)
    trace.watch(quantised_state(model), WEIGHTS)
    trace.watch([t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)], OPTIMISER)
    loss = trainer.compute_loss

    def marked(*args: Any, **kwargs: Any) -> Any:
        trace.enter("embedding", ACTIVATIONS)
        value = loss(*args, **kwargs)
        trace.enter("backward of the head", TEMPORARIES)
        return value

    trainer.compute_loss = marked
    try:
        with _told(trace, model), trace:
            yield trace
    finally:
        del trainer.compute_loss


def empty_like_meta(model: nn.Module, device: torch.device) -> None:
    """Inside a FakeTensorMode: every parameter and buffer of `model` becomes a fake one on `device`; ties stay ties."""
    made: dict[int, Any] = {}

    def empty(old: Tensor) -> Tensor:
        return torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)

    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        if anatomy.is_linear(module) and is_quantised(module):
            rebuild(module, empty)
            made[id(module._parameters["weight"])] = module._parameters["weight"]
        for table in tables:
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = empty(old)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[id(old)]


@dataclass
class Step:
    """What `trace_steps` runs: the parts of a training step, each as the trainer would make it."""

    model: Any  # patched; on meta, or with its values
    device: torch.device
    batch: Callable[[], dict[str, Tensor]]
    loss: Callable[[dict[str, Tensor]], Tensor]
    backward: Callable[[Callable[[], Tensor], Callable[[Tensor], None]], Any]  # the stepper's
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    kind_of: Callable[[str, Tensor], str]  # (path, tensor) -> what a parameter or buffer counts as
    evaluation: Callable[[], dict[str, Tensor]] | None = None  # a batch of it, where the run evaluates on the way
    micro_batches: int = 1
    clip: float = 0.0
    counted: int | None = None  # positions of a batch that count in the loss
    full_rows: bool = False  # no row of a batch is padded
    clock: Clock | None = None  # is shown the operations of that step


def trace_steps(step: Step, fake: bool = True) -> tuple[Peaks, int, int]:
    """-> bytes by phase and kind at each phase's peak, in the second optimiser step of `step.model`; `Trace.churn`;
    how many `Trace.products` there were.

    The model is left with fake tensors in it; with `fake=False` real ones are stepped, which costs what is counted.
    """
    model = step.model
    kinds = {n: step.kind_of(n, t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    with contextlib.ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(biases_apart(step.full_rows))
            empty_like_meta(model, step.device)
        trace = Trace(model.config.get_text_config().vocab_size, step.counted, step.clock, fake)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            trace.watch([tensor], kinds[name])
        trace.watch(quantised_state(model), WEIGHTS)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = step.optimizer(trained)
        try:
            with _told(trace, model), trace:
                for _ in range(2):
                    trace.forget_peaks()
                    _train(step, trace, optimizer, trained)
                if step.evaluation is not None:
                    model.eval()
                    with torch.no_grad():
                        trace.enter("evaluation", TEMPORARIES)
                        step.loss(step.evaluation())
        except TrimtabError:
            raise
        except Exception as error:  # a stranger's model may do what has no meaning without values
            raise Untraceable(
                f"plan a step of {type(model).__name__}",
                f"the planner cannot follow it ({type(error).__name__}: {_operation(error)})",
                "Take budget: out; run.json will say what was held",
            ) from error
    return trace.peaks, trace.churn, len(trace.products)


def _operation(error: Exception) -> str:
    return str(getattr(error, "func", None) or " ".join(str(error).split())[:200])


def _train(step: Step, trace: Trace, optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    def loss() -> Tensor:
        trace.enter("embedding", ACTIVATIONS)
        return step.loss(step.batch())

    def back(value: Tensor) -> None:
        trace.enter("backward of the head", TEMPORARIES)
        value.backward()

    for _ in range(step.micro_batches):
        step.backward(loss, back)
    trace.enter("optimiser", OPTIMISER)
    if step.clip:
        nn.utils.clip_grad_norm_(trained, step.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _told(trace: Trace, model: Any) -> Iterator[None]:
    """Within it, hooks tell the trace what is a gradient, and which part of the stack is at work.

    They keep no tensor and change no graph.
    """
    stack = anatomy.blocks(model)[1]
    last = len(stack) - 1

    def before(_: Any, args: tuple, index: int) -> None:
        if trace.kind == ACTIVATIONS:  # not a block that is computed again in the backward pass
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
    handles = [p.register_post_accumulate_grad_hook(lambda p: trace.relabel(p.grad, GRADIENTS)) for p in trained]
    for index, block in enumerate(stack):
        handles.append(block.register_forward_pre_hook(functools.partial(before, index=index)))
        handles.append(block.register_forward_hook(functools.partial(after, index=index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def extend(shallow: Peaks, deep: Peaks, depths: tuple[int, int], depth: int) -> Peaks:
    """The peaks of a stack of `depth` equal blocks, from traces of two shallower ones; linear kind by kind."""
    low, high = depths
    found: Peaks = {}
    for phase in shallow.keys() & deep.keys():
        kinds = shallow[phase].keys() | deep[phase].keys()
        at = {kind: (shallow[phase].get(kind, 0), deep[phase].get(kind, 0)) for kind in kinds}
        found[phase] = {k: max(0, a + (b - a) * (depth - low) // (high - low)) for k, (a, b) in at.items()}
    return found


def live(bytes_by_kind: Bytes) -> int:
    """Bytes of the fast tier among them."""
    return sum(size for kind, size in bytes_by_kind.items() if kind not in SLOW)


def highest(peaks: Peaks) -> tuple[str, Bytes]:
    """The phase that holds the most of the fast tier, and what it holds."""
    return max(peaks.items(), key=lambda item: live(item[1]))
