"""Counts a real training step as the planner counts a fake one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..memory.meter import file_ranges, is_mapped
from ..model.quant import quantised_state
from .trace import ACTIVATIONS, ADAPTER, GRADIENTS, MAPPED, OPTIMIZER, ROWS, TEMPORARIES, WEIGHTS, Trace, phases


@contextlib.contextmanager
def metered(
    trainer: Any,
    model: Any,
    own: Sequence[Tensor],
    optimizer: Any,
    tables: Iterable[Tensor] = (),
    aside: Iterable[torch.UntypedStorage] = (),
    outside: Iterable[tuple[str, list[Tensor]]] = (),
) -> Iterator[Trace]:
    """Within it, a real step of `trainer` is counted as the planner counts a fake one, by kind and phase.

    `own`: the tensors of the patches; `tables`: those of them in the slow tier. Tensors in mapped files are `MAPPED`.
    `aside`: storages of the loaded model, some of which patches may keep for reverting. `outside`: other tensors of
    patches, by kind.
    """
    maps = file_ranges()
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    trace = Trace(vocabulary, fake=False)
    trace.watch(tables, ROWS)
    for kind, tensors in outside:
        trace.watch(tensors, kind)
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
    trace.watch([t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)], OPTIMIZER)
    loss = trainer.compute_loss

    def marked(*args: Any, **kwargs: Any) -> Any:
        trace.enter("embedding", ACTIVATIONS)
        value = loss(*args, **kwargs)
        trace.enter("backward of the head", TEMPORARIES)
        return value

    trainer.compute_loss, trainer.trace = marked, trace
    try:
        with phases(trace, model), trace:
            yield trace
    finally:
        del trainer.compute_loss, trainer.trace
