"""Checks token ids and row lengths against a model's embedding tables; beyond them torch raises an index error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import BadInput


def learned_positions(model: nn.Module) -> int | None:
    """The number of positions that the model has learned; None if it computes them (RoPE, ALiBi).

    A table of positions is an embedding with "position" (or "wpe") in its name. OPT-type models start at an `offset`,
    RoBERTa-type models after the padding index.
    """
    found = []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (leaf == "wpe" or "position" in leaf) and "relative" not in leaf:
            skipped = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            found.append(module.num_embeddings - int(skipped))
    found += [len(table) for name, table in model.named_buffers() if name.endswith(".embed_positions")]  # GPT-J
    return min(found, default=None)


def rows_depend(model: Any) -> bool:
    """Whether a row's output depends, beyond rounding, on the rows beside it: with 8-bit weights (outliers are chosen
    over the batch), and with positions scaled by the longest row (RoPE of type "dynamic" or "longrope")."""
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (found, *found.values()) if isinstance(part, dict)}
    return bool(kinds & {"dynamic", "longrope"}) or getattr(model, "is_loaded_in_8bit", False)


def vocabulary(model: Any) -> int | None:
    """The number of tokens in the model's embedding table; None if its input layer is not a table."""
    table = model.get_input_embeddings()
    weight = getattr(table, "weight", None)
    if weight is None or weight.dim() != 2:
        return None
    return getattr(table, "num_embeddings", weight.shape[0])  # the weight may hold some rows only


def check_ids(model: Any, ids: Sequence[int], asked: str) -> None:
    """BadInput if the model has no embedding for one of `ids`."""
    rows = vocabulary(model)
    if rows is not None and ids and max(ids) >= rows:
        raise BadInput(
            asked, f"it has the token {max(ids)}, and the model has embeddings of {rows} tokens (0 to {rows - 1})",
            "Use the tokenizer that the model was trained with",
        )  # fmt: skip


def check_dataset(model: Any, dataset: Any, part: str, max_length: int | None = None) -> None:
    """BadInput for rows with token ids or lengths beyond the model's tables, and for rows without a token to train on.

    `dataset`: tokenised rows with `input_ids` (and `labels`), read as arrow without decoding the table. `max_length`:
    the length to which rows are cut afterwards.
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
        lengths = numpy.minimum(sizes, max_length) if max_length else sizes
        if places is not None and len(lengths) and lengths.max() > places:
            raise BadInput(
                f"use data.{part}, row {start + int(lengths.argmax()) + 1}",
                f"it has {int(lengths.max())} tokens, and the model has learned {places} positions",
                f"Set training.max_length to {places}, and data.too_long to cut or drop",
            )
        kinds = [name for name in ("labels", "completion_mask", "assistant_masks") if name in batch.column_names]
        if kinds and "List" in str(dataset.features[kinds[0]]):
            values = batch[kinds[0]].combine_chunks()
            flat = numpy.asarray(values.flatten())
            counts = flat != -100 if kinds[0] == "labels" else flat != 0
            # the first token of a row is not predicted
            offsets = numpy.concatenate([[0], numpy.cumsum(numpy.asarray(compute.list_value_length(values)))])
            counts[offsets[:-1][offsets[:-1] < len(counts)]] = False
            trained = numpy.bincount(numpy.asarray(compute.list_parent_indices(values))[counts], minlength=len(sizes))
        else:
            trained = sizes - 1
        if kinds[:1] == ["labels"] and "List" not in str(dataset.features["labels"]):  # a classifier: one per row
            trained = numpy.ones_like(sizes)
        if len(trained) and trained.min() < 1:
            raise BadInput(
                f"use data.{part}, row {start + int(trained.argmin()) + 1}", "it has no token to train on",
                "Leave the row out, or give it an answer (a text of two tokens or more)",
            )  # fmt: skip
        start += len(sizes)
