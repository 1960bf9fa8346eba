"""Checks training arguments against the data, before the model is loaded or trained."""

from __future__ import annotations

from typing import Any

from ..data.rows import Rows, marks_answers
from ..errors import BadInput
from ..recipe import Recipe


def check_data_fields(args: Any, recipe: Recipe, rows: Rows, tokenizer: Any) -> None:
    """BadInput for training arguments that the rows do not allow.

    `args`: SFTConfig or TrainingArguments. `rows`: of `data.train`.
    """
    if args.eval_strategy != "no" and not recipe.data.test:
        raise BadInput(
            f"training: eval_strategy: {getattr(args.eval_strategy, 'value', args.eval_strategy)}",
            "the recipe names no data.test",
            "Add data.test, or remove eval_strategy",
        )
    if getattr(args, "assistant_only_loss", False):
        chat = "messages" in rows.dataset.column_names or not isinstance(rows.dataset[0].get("prompt", ""), str)
        if not chat:
            raise BadInput(
                "training: assistant_only_loss: true", f"the {rows.form} rows of data.train are not conversations",
                "Remove it: the loss of a prompt and its answer covers only the answer anyway",
            )  # fmt: skip
        if not marks_answers(tokenizer.chat_template):
            raise BadInput(
                "training: assistant_only_loss: true", "the chat template does not mark the assistant's turns",
                "Remove it (the loss then covers the last turn), or set a data.chat_template with {% generation %}",
            )  # fmt: skip


def check_batches(trainer: Any) -> None:
    """BadInput for a run that would train on nothing, because `dataloader_drop_last` drops its only batch."""
    args, rows = trainer.args, len(trainer.train_dataset)
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise BadInput(
            "training: dataloader_drop_last: true", f"{rows} rows are fewer than one batch of {batch}",
            "Remove it, or lower per_device_train_batch_size",
        )  # fmt: skip
