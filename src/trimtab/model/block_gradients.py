"""Gradients of a loss with respect to the weights of linears, one block at a time, from the last to the first.

A forward pass of each row writes the input of every block to a file. Then each block is computed again with autograd on
its stored input, for all rows, before the block below it. So only one block's activations are in memory, and nothing of
a weight's size is kept from one block to the next: the weights need no gradient, and may be stored in 4 or 8 bits.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BadInput
from . import anatomy
from .block_inputs import call_block, stored, without_cache
from .undisturbed import undisturbed

Seen = Callable[[str, Tensor, Tensor], None]


class _Row:
    """One row: the calls of its blocks without their hidden states, where those are stored, and the gradient so far."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple, dict[str, Any]]] = []
        self.hidden: list[Tensor] = []
        self.gradient: Tensor | None = None


def backward_by_blocks(
    model: PreTrainedModel, rows: Iterable[dict[str, Tensor]], linears: dict[str, nn.Module], seen: Seen,
    folder: str | None = None,
) -> Iterator[dict[str, nn.Module]]:  # fmt: skip
    """Yields the `linears` of each block, the last block's first, after `seen(path, x, dy)` was called for each of them
    and each row: x (tokens, in) its input, dy (tokens, out) the gradient of its output.

    `rows`: batches of one row with labels; the loss is the model's own. `folder`: for the file of hidden states.
    BadInput if the blocks are not a plain stack. The model is left as it was.
    """
    path, stack = anatomy.blocks(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with undisturbed(model), tempfile.TemporaryDirectory(dir=folder) as files, contextlib.ExitStack() as stacked:
        for parameter, flag in flags:
            parameter.requires_grad_(False)
            stacked.callback(parameter.requires_grad_, flag)
        read = [_forward(model, stack, row, Path(files) / f"{number}") for number, row in enumerate(rows)]
        for number in range(len(stack) - 1, -1, -1):
            within = {name: linear for name, linear in linears.items() if name.startswith(f"{path}.{number}.")}
            with _watched(within, seen):
                for row in read:
                    _back(model, stack[number], row, number)
            yield within


def _forward(model: PreTrainedModel, stack: nn.ModuleList, batch: dict[str, Tensor], file: Path) -> _Row:
    """Runs the model on one row; the gradient of its loss with respect to the last block's output is kept."""
    made = _Row()
    ends: list[Tensor] = []

    def reads(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        made.hidden.append(stored(hidden, file.with_name(f"{file.name}-{len(made.hidden)}")))
        made.calls.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

    def last(module: nn.Module, args: tuple, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        ends.append(first.detach().requires_grad_())
        return (ends[0], *rest) if isinstance(output, tuple) else ends[0]

    handles = [block.register_forward_pre_hook(reads, with_kwargs=True) for block in stack]
    handles.append(stack[-1].register_forward_hook(last))
    try:
        with torch.enable_grad():
            loss = model(**batch, **without_cache(model)).loss
    finally:
        for handle in handles:
            handle.remove()
    if len(made.calls) != len(stack) or len(ends) != 1:
        raise BadInput(f"calibrate {type(model).__name__}", "its blocks do not run once each, in order", "Leave it out")
    (made.gradient,) = torch.autograd.grad(loss, ends)
    return made


def _back(model: PreTrainedModel, block: nn.Module, row: _Row, number: int) -> None:
    """Computes one block of one row again, and its input's gradient from its output's."""
    x = row.hidden.pop().clone().requires_grad_()
    args, kwargs = row.calls.pop()
    with torch.enable_grad():
        output = call_block(block, x, args, kwargs)
    if number + 1 < len(anatomy.blocks(model)[1]) and output.shape != row.gradient.shape:  # type: ignore[union-attr]
        have = "its blocks do not pass one tensor from each to the next"
        raise BadInput(f"calibrate {type(model).__name__}", have, "Use a model whose blocks are a plain stack")
    (row.gradient,) = torch.autograd.grad(output, [x], row.gradient)


@contextlib.contextmanager
def _watched(linears: dict[str, nn.Module], seen: Seen) -> Iterator[None]:
    def after(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        x = args[0].detach()
        output.register_hook(lambda dy: seen(name, x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])))

    handles = [
        linear.register_forward_hook(lambda module, args, output, name=name: after(name, module, args, output))
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
