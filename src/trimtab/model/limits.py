"""What a model's tables can hold: learned positions and token ids. Beyond them torch ends with an index error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import BadInput


def learned_positions(model: nn.Module) -> int | None:
    """How many tokens of a row the model has learned positions for; None where it computes them (RoPE, ALiBi).

    A table of positions is an embedding whose name says so. OPT and its kin begin at an `offset`, RoBERTa and its kin
    after the padding index.
    """
    found = []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (leaf == "wpe" or "position" in leaf) and "relative" not in leaf:
            skipped = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            found.append(module.num_embeddings - int(skipped))
    found += [len(table) for name, table in model.named_buffers() if name.endswith(".embed_positions")]  # GPT-J
    return min(found, default=None)


def vocabulary(model: Any) -> int | None:
    """How many tokens the model has embeddings of; None where its input is no table."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is None or weight.dim() != 2 else weight.shape[0]


def check_ids(model: Any, ids: Sequence[int], asked: str) -> None:
    """Refuse a token that the model has no embedding of."""
    rows = vocabulary(model)
    if rows is not None and ids and max(ids) >= rows:
        raise BadInput(
            asked, f"it holds the token {max(ids)}, and the model has embeddings of {rows} tokens (0 to {rows - 1})",
            "Use the tokenizer that the model was trained with",
        )  # fmt: skip


def check_dataset(model: Any, dataset: Any, part: str, max_length: int | None = None) -> None:
    """Refuse tokenised rows that the model's tables cannot hold, and rows without a token to train on.

    `dataset`: `input_ids` (and `labels`) of each row; read as arrow, without decoding the table. `max_length`: rows are
    cut there afterwards.
    """
    import numpy
    from pyarrow import compute

    places, rows, start = learned_positions(model), vocabulary(model), 0
    for batch in dataset.with_format("arrow").iter(1000):
        ids = batch["input_ids"].combine_chunks()
        sizes = numpy.asarray(compute.list_value_length(ids))
        row = numpy.asarray(compute.list_parent_indices(ids))
        flat = numpy.asarray(ids.flatten())
        if rows is not None and len(flat) and flat.max() >= rows:
            check_ids(model, [int(flat.max())], f"use data.{part}, row {start + int(row[flat.argmax()]) + 1}")
        held = numpy.minimum(sizes, max_length) if max_length else sizes
        if places is not None and len(held) and held.max() > places:
            raise BadInput(
                f"use data.{part}, row {start + int(held.argmax()) + 1}",
                f"it has {int(held.max())} tokens, and the model has learned {places} positions",
                f"Set training.max_length to {places}, and data.too_long to cut or drop",
            )
        kinds = [name for name in ("labels", "completion_mask", "assistant_masks") if name in batch.column_names]
        if kinds and "List" in str(dataset.features[kinds[0]]):
            values = batch[kinds[0]].combine_chunks()
            flat = numpy.asarray(values.flatten())
            counts = flat != -100 if kinds[0] == "labels" else flat != 0
            # the first token of a row has nothing before it to be predicted from
            offsets = numpy.concatenate([[0], numpy.cumsum(numpy.asarray(compute.list_value_length(values)))])
            counts[offsets[:-1][offsets[:-1] < len(counts)]] = False
            trained = numpy.bincount(numpy.asarray(compute.list_parent_indices(values))[counts], minlength=len(sizes))
        else:
            trained = sizes - 1
        if kinds[:1] == ["labels"] and "List" not in str(dataset.features["labels"]):  # a classifier's, one a row
            trained = numpy.ones_like(sizes)
        if len(trained) and trained.min() < 1:
            raise BadInput(
                f"use data.{part}, row {start + int(trained.argmin()) + 1}", "it has no token to train on",
                "Leave the row out, or give it an answer (a text of two tokens or more)",
            )  # fmt: skip
        start += len(sizes)
