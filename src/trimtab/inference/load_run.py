"""The model of a finished run: the recipe's base with the run's adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..artifacts.adapter import Base, load_adapter, read_meta
from ..artifacts.run_folder import place_of
from ..data.chat import use_template
from ..errors import BadInput
from ..model.load import load_model
from ..recipe import Recipe


def load_run(
    recipe: Recipe, adapter_folder: str | Path | None = None, base_only: bool = False
) -> tuple[Any, Any, list, Any]:
    """-> model, tokenizer, surgeries, base: the recipe's model with the adapter of its run, or with another one.

    `base_only`: without the adapter. The labels and the task are the adapter's where there is one.
    """
    folder = Path(adapter_folder) if adapter_folder else Path(recipe.output) / "adapter"
    if not adapter_folder and not base_only and not folder.is_dir():
        do = "Train first, name one with --adapter, or say --base"
        raise BadInput(f"the adapter of {recipe.output}", f"there is no {folder}", do)
    if adapter_folder and not folder.is_dir():
        raise BadInput(f"adapter {folder}", "there is no such folder", "Name the adapter/ folder of a run")
    meta = read_meta(folder).base if folder.is_dir() else Base(recipe.model.name, "", recipe.load_objective().head)
    place = place_of(recipe)
    labels = len(meta.labels) or (1 if meta.task == "classification" else None)
    model, tokenizer = load_model(recipe.model, task=meta.task, labels=labels, device=place.device)
    if meta.reply.template is not None:  # the run's own, also where the file it came from has changed
        tokenizer.chat_template = meta.reply.template
    else:
        use_template(recipe.data, tokenizer)
    if meta.labels:
        model.config.id2label = dict(enumerate(meta.labels))
        model.config.label2id = {label: index for index, label in enumerate(meta.labels)}
    surgeries = [] if base_only else load_adapter(model, folder, place)
    return model.eval(), tokenizer, surgeries, meta
