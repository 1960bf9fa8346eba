"""Runs calibration batches through a model block by block, so that each block can be changed before the next one runs.

A full forward pass records the arguments of each block. Then the blocks run one by one on the hidden states that the
changed blocks before them returned. Only the hidden states of one block are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BadInput
from . import anatomy
from .undisturbed import undisturbed


@dataclass
class _Recorded:
    """One batch: the hidden states that the next block reads, and the other arguments of each block."""

    hidden: Tensor | None = None
    second: Tensor | None = None  # what the second block read in the full pass
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    mask: Tensor | None = None  # (rows, tokens): 1 where a token counts


@torch.no_grad()
def by_blocks(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]
) -> Iterator[tuple[str, nn.Module, Callable[[], Iterator[Tensor | None]]]]:
    """Yields (path, block, run) for each block in order. `run()` runs the block on each batch and then yields that
    batch's mask (rows, tokens). Change the block after `run`: the changed block computes the input of the next one.
    """
    path, stack = anatomy.blocks(model)
    with undisturbed(model):
        recorded = [_record(model, stack, batch) for batch in batches]
        for number, block in enumerate(stack):

            def run(number: int = number, block: nn.Module = block) -> Iterator[Tensor | None]:
                for batch in recorded:
                    _call(block, batch, number)
                    yield batch.mask

            if number == 0 and len(stack) > 1:
                for batch in recorded[:1]:
                    _require_chain(model, block, batch)
            yield f"{path}.{number}", block, run
            for batch in recorded:
                batch.hidden = _call(block, batch, number)
                batch.calls[number] = ((), {})


def _record(model: PreTrainedModel, stack: nn.ModuleList, batch: dict[str, Tensor]) -> _Recorded:
    made = _Recorded(mask=batch.get("attention_mask"))

    def seen(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not made.calls:
            made.hidden = hidden
        elif len(made.calls) == 1:
            made.second = hidden
        made.calls.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

    handles = [block.register_forward_pre_hook(seen, with_kwargs=True) for block in stack]
    try:
        model.base_model(**{k: v for k, v in batch.items() if k != "labels"}, **without_cache(model))
    finally:
        for handle in handles:
            handle.remove()
    if len(made.calls) != len(stack):
        raise BadInput(f"calibrate {type(model).__name__}", "its blocks do not run once each, in order", "Leave it out")
    return made


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """The argument that makes a forward pass use no KV cache."""
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


def _call(block: nn.Module, batch: _Recorded, number: int) -> Tensor:
    assert batch.hidden is not None
    return call_block(block, batch.hidden, *batch.calls[number])


def call_block(block: nn.Module, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a block returns."""
    output = block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _require_chain(model: PreTrainedModel, block: nn.Module, batch: _Recorded) -> None:
    """BadInput if the second block does not read what the first one returns."""
    if not torch.equal(_call(block, batch, 0), batch.second):
        have = "its second block does not read what the first one returns"
        raise BadInput(f"calibrate {type(model).__name__}", have, "Use a model whose blocks are a plain stack")
