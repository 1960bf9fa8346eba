"""The collator for packed rows."""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..model.block_mask import block_mask


class PackedRows(DataCollatorForLanguageModeling):
    """Collates packed documents into rows (B, T) with restarting position ids, not into one sequence of B x T.

    transformers builds the block mask from the position ids, and attention over B rows of T costs 1/B of attention
    over one row of B x T. The first token of each document is not a target (its label is masked).

    For models that do not derive a mask from position ids (packing_probe.py): `block` is the dtype of an explicit mask
    (B, 1, T, T), added to the scores; `positions` is whether the rows have position ids.
    """

    block: torch.dtype | None = None
    positions: bool = True

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        step = self.pad_to_multiple_of or 1
        width = -(-max(len(e["input_ids"]) for e in examples) // step) * step
        ids = torch.full((len(examples), width), self.pad_token_id)
        labels = torch.full((len(examples), width), -100)
        positions = torch.zeros((len(examples), width), dtype=torch.int64)
        for row, example in enumerate(examples):
            size = len(example["input_ids"])
            ids[row, :size] = torch.tensor(example["input_ids"])
            labels[row, :size] = torch.tensor(example["labels"])
            lengths = list(example.get("seq_lengths", [size])) + ([width - size] if size < width else [])
            positions[row] = torch.cat([torch.arange(n) for n in lengths])
        labels[positions == 0] = -100
        batch = {"input_ids": ids, "labels": labels}
        if self.positions:
            batch["position_ids"] = positions
        if self.block is not None:
            batch["attention_mask"] = block_mask(positions, self.block)
        return batch
