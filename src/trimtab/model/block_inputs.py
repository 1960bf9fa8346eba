"""Runs calibration batches through a model block by block, so that each block can be changed before the next one runs.

A full forward pass records the arguments of each block. Then the blocks run one by one on the hidden states that the
changed blocks before them returned. The hidden states are in files: only those of one batch are in memory at a time.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BadInput
from ..files import writing
from . import anatomy
from .undisturbed import undisturbed


@dataclass
class _Recorded:
    """One batch: the hidden states that the next block reads, and the other arguments of each block."""

    file: Path
    hidden: Tensor | None = None
    second: Tensor | None = None  # what the second block read in the full pass; of the first batch only
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    mask: Tensor | None = None  # (rows, tokens): 1 where a token counts

    def keep(self, hidden: Tensor) -> None:
        if self.hidden is not None and self.hidden.shape == hidden.shape and self.hidden.dtype == hidden.dtype:
            self.hidden.copy_(hidden)
        else:
            self.hidden = stored(hidden, self.file)


@torch.no_grad()
def by_blocks(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], folder: str | None = None
) -> Iterator[tuple[str, nn.Module, Callable[[], Iterator[Tensor | None]]]]:
    """Yields (path, block, run) for each block in order. `run()` yields the mask (rows, tokens) of each batch, and
    runs the block on that batch before it yields the next. Change the block after `run`: the changed block computes
    the input of the next one.
    `folder`: for the files of hidden states (None: that of temporary files).
    """
    path, stack = anatomy.blocks(model)
    with undisturbed(model), tempfile.TemporaryDirectory(dir=folder) as files:
        recorded: list[_Recorded] = []
        known: list[Tensor] = []
        for number, batch in enumerate(batches):
            recorded.append(_record(model, stack, batch, Path(files) / f"{number}", known, first=not number))
        for number, block in enumerate(stack):

            @torch.no_grad()
            def run(number: int = number, block: nn.Module = block) -> Iterator[Tensor | None]:
                for batch in recorded:
                    yield batch.mask
                    _call(block, batch, number)

            if number == 0 and len(stack) > 1:
                for batch in recorded[:1]:
                    _require_chain(model, block, batch)
            yield f"{path}.{number}", block, run
            for batch in recorded:
                batch.keep(_call(block, batch, number))
                batch.calls[number] = ((), {})


Seen = Callable[[str, Tensor], None]


@torch.no_grad()
def by_linears(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], linears: dict[str, nn.Module],
    folder: str | None = None,
) -> Iterator[tuple[dict[str, nn.Module], Callable[[Seen], None]]]:  # fmt: skip
    """Yields (those of `linears` in the block, read) for each block in order. `read(seen)` runs the block on each batch
    and calls `seen(path, x)` for each linear, x (tokens that count, in) its input. Change the linears after `read`."""
    names = {id(linear): name for name, linear in linears.items()}
    for _, block, run in by_blocks(model, batches, folder):
        within = {names[id(m)]: m for m in block.modules() if id(m) in names}

        @torch.no_grad()
        def read(
            seen: Seen, within: dict[str, nn.Module] = within, run: Callable[[], Iterator[Tensor | None]] = run
        ) -> None:
            mask: list[Tensor | None] = []

            def hook(_: nn.Module, args: tuple, name: str) -> None:
                seen(name, _counting(args[0], mask[0]))

            handles = [m.register_forward_pre_hook(functools.partial(hook, name=n)) for n, m in within.items()]
            try:
                for mask_BT in run():
                    mask[:] = [mask_BT]
            finally:
                for handle in handles:
                    handle.remove()

        yield within, read


def _counting(x: Tensor, mask_BT: Tensor | None) -> Tensor:
    """(tokens that count, in); all tokens if the mask does not fit the input (that of an expert)."""
    fits = mask_BT is not None and mask_BT.dim() == 2 and mask_BT.shape == x.shape[:2]
    return (x[mask_BT.bool()] if fits else x).reshape(-1, x.shape[-1])  # type: ignore[union-attr]


def _record(
    model: PreTrainedModel, stack: nn.ModuleList, batch: dict[str, Tensor], file: Path, known: list[Tensor], first: bool
) -> _Recorded:
    made = _Recorded(file, mask=batch.get("attention_mask"))

    def seen(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not made.calls:
            made.keep(hidden)
        elif len(made.calls) == 1 and first:
            made.second = hidden
        made.calls.append(_shared((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}), known))

    handles = [block.register_forward_pre_hook(seen, with_kwargs=True) for block in stack]
    try:
        model.base_model(**{k: v for k, v in batch.items() if k != "labels"}, **without_cache(model))
    finally:
        for handle in handles:
            handle.remove()
    if len(made.calls) != len(stack):
        raise BadInput(f"calibrate {type(model).__name__}", "its blocks do not run once each, in order", "Leave it out")
    return made


def _shared(value: Any, known: list[Tensor]) -> Any:
    """`value`, with each tensor replaced by an equal one of `known`: batches share masks and rotary angles."""
    if isinstance(value, dict):
        return {key: _shared(item, known) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_shared(item, known) for item in value)
    if not isinstance(value, Tensor):
        return value
    for other in reversed(known):
        if other is value or (
            other.dtype == value.dtype and other.device == value.device and torch.equal(other, value)
        ):
            return other
    known.append(value)
    return value


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """The argument that makes a forward pass use no KV cache."""
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


def _call(block: nn.Module, batch: _Recorded, number: int) -> Tensor:
    assert batch.hidden is not None
    device = next(block.parameters()).device
    return call_block(block, batch.hidden.to(device), *batch.calls[number])


def call_block(block: nn.Module, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a block returns."""
    output = block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _require_chain(model: PreTrainedModel, block: nn.Module, batch: _Recorded) -> None:
    """BadInput if the second block does not read what the first one returns."""
    second, batch.second = batch.second, None
    if second is None or not torch.equal(_call(block, batch, 0), second):
        have = "its second block does not read what the first one returns"
        raise BadInput(f"calibrate {type(model).__name__}", have, "Use a model whose blocks are a plain stack")


def stored(tensor: Tensor, file: Path) -> Tensor:
    """A copy that is mapped from a file, so that it uses no anonymous memory."""
    if tensor.device.type != "cpu":
        return tensor.detach().to("cpu")
    with writing(f"write hidden states to {file.parent}", "Free some space, or lower the number of calibration rows"):
        with file.open("wb") as made:
            os.posix_fallocate(made.fileno(), 0, max(1, tensor.nbytes))
    mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return mapped.copy_(tensor.detach())
