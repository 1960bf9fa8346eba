"""Reads a run's tokenizer and rows, and builds its trainer with the tokenised rows.

A plan does the same on a model without values: it refuses what the run would refuse, finds the longest batch, and
measures the process memory that tokenizer and rows use.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contracts import Batch, Objective, Patch
from ..data.files import is_hub
from ..data.rows import Rows, read_rows
from ..data.spec import DataSpec
from ..errors import BadInput
from ..memory.meter import process_memory
from ..methods import find
from ..model.limits import vocabulary
from ..model.vocabulary import TOKENIZER, count_tokens, token_parts
from ..recipe import Recipe
from .arguments import training_arguments
from .checks import check_batches, check_data_fields
from .job import Inputs, Job
from .objectives import arguments_class, trainer_class

Say = Callable[[str], None]
LEAST_TEXT = 64  # tokens of a calibration file


def read_inputs(recipe: Recipe, objective: Objective, args: Any, say: Say) -> Inputs:
    """The tokenizer and rows of a recipe. BadInput for training arguments that they do not allow."""
    from ..model.load import config_folder, load_tokenizer

    spec, task = recipe.model, objective.head
    tokenizer = load_tokenizer(config_folder(spec, say), trust_remote_code=spec.trust_remote_code)
    rows, test = read_rows(recipe.data, "train", tokenizer, task), None
    check_data_fields(args, recipe, rows, tokenizer)
    if recipe.data.test and args.eval_strategy != "no":
        test = read_rows(recipe.data, "test", tokenizer, task, like=rows)
    return Inputs(tokenizer, rows, test)


def make_trainer(job: Job, recipe: Recipe, model: Any, args: Any, inputs: Inputs) -> Any:
    """The objective's trainer, with the tokenised rows."""
    made = trainer_class(job.objective).build(job, recipe, model, args, inputs)
    check_batches(made)
    return made


def calibration_batches(recipe: Recipe, inputs: Inputs, args: Any, device: Any) -> Callable[[Patch], Iterator[Batch]]:
    """-> a function (patch) that yields the rows which the patch is calibrated with, in batches on `device`, collated
    as in a run: the first ones of `data.train`, or of the patch's own file; for a patch that counts tokens, only their
    ids on the CPU, in parts. BadInput for too little text."""
    from torch.utils.data import DataLoader
    from transformers import IntervalStrategy

    from ..model.load import empty_model

    if hasattr(recipe.load_objective(), "own_loss"):  # it samples replies: calibrated with those of the rows
        recipe, args = _supervised(recipe, args)

    def batches(patch: Patch) -> Iterator[Batch]:
        rows = _text(patch, recipe, inputs.tokenizer) if patch.calibration_file else inputs.rows
        count = min(patch.calibration_rows, len(rows.dataset))
        few = dataclasses.replace(rows, dataset=rows.dataset.select(range(count)))
        objective, own = recipe.load_objective(), copy.copy(args)
        own.dataloader_drop_last, own.eval_strategy = False, IntervalStrategy.NO
        own.per_device_eval_batch_size = own.per_device_train_batch_size
        model, _ = empty_model(recipe.model, task=objective.head, labels=inputs.labels)
        job = Job.without_patches(recipe, model)
        with tempfile.TemporaryDirectory() as own.output_dir:  # the library creates it
            trainer = make_trainer(job, recipe, model, own, Inputs(inputs.tokenizer, few, None))
            if patch.calibration_file:
                _check_text(patch.calibration_file, trainer.train_dataset)
        if patch.counts_tokens:
            yield from ({"input_ids": ids} for ids in token_parts(trainer.train_dataset))
            return
        loader = trainer.get_eval_dataloader(trainer.train_dataset)
        if args.world_size > 1:  # each process reads all rows, so that all choose the same
            size = own.per_device_eval_batch_size
            loader = DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn)
        for batch in loader:
            yield {key: value.to(device) for key, value in batch.items()}

    return batches


def _supervised(recipe: Recipe, args: Any) -> tuple[Recipe, Any]:
    """The recipe with the objective `causal_lm`, and its arguments."""
    cls = arguments_class(find("causal_lm", "objective")())
    known = {field.name for field in dataclasses.fields(cls)}
    training = {key: value for key, value in recipe.training.items() if key in known}
    training["per_device_train_batch_size"] = args.per_device_train_batch_size
    recipe = dataclasses.replace(recipe, objective="causal_lm", training=training)
    return recipe, training_arguments(recipe, cls, Path(args.output_dir), args.use_cpu)


def _text(patch: Patch, recipe: Recipe, tokenizer: Any) -> Rows:
    """The rows of a patch's calibration file. BadInput for a classifier, which has no loss on text."""
    asked = f"calibration: {patch.calibration_file}"
    if recipe.load_objective().head != "causal-lm":
        have = "the recipe trains a classifier, whose loss needs labels"
        raise BadInput(asked, have, "Leave it out, and data.train is read")
    return read_rows(DataSpec(patch.calibration_file, too_long="cut"), "train", tokenizer, "causal-lm")


def _check_text(file: str, dataset: Any) -> None:
    tokens = sum(len(row["input_ids"]) for row in dataset)
    if tokens < LEAST_TEXT:
        have = f"its first {len(dataset)} rows have {tokens} tokens, which say nothing about a model"
        raise BadInput(
            f"calibration: {file}", have, f"Give {LEAST_TEXT} tokens of text or more; some thousands are usual"
        )


def largest_batch(trainer: Any) -> dict[str, Any]:
    """Size of the largest batch, found without decoding the table: `rows`, `tokens` (of the longest row, padded),
    `counted` (the most tokens of a row in the loss), `filled` (share of tokens that are not padding), `lengths` (how
    many distinct batch lengths there are)."""
    import numpy
    from pyarrow import compute

    from ..data.order import batch_lengths, filled, row_lengths

    if hasattr(trainer, "largest_batch"):
        return trainer.largest_batch()
    args, dataset, counted = trainer.args, trainer.train_dataset, None
    if "labels" in dataset.column_names and "List" in str(dataset.features["labels"]):
        for part in dataset.with_format("arrow").iter(1000):
            labels = part["labels"].combine_chunks()
            row = compute.list_parent_indices(labels).to_numpy()[labels.flatten().to_numpy() != -100]
            counted = max(counted or 0, int(numpy.bincount(row, minlength=1).max()))
    step = args.pad_to_multiple_of or 1
    rows = min(args.per_device_train_batch_size, len(dataset))
    lengths = row_lengths(dataset)
    share = 1.0 if getattr(trainer, "padding_free", False) else filled(lengths, rows, step)
    batches = args.max_steps * args.gradient_accumulation_steps
    if batches < 0:
        batches = math.ceil(args.num_train_epochs * len(dataset) / rows)
    many = batch_lengths(lengths, rows, step, batches)
    tokens = -(-int(lengths.max()) // step) * step
    return {"rows": rows, "tokens": tokens, "counted": counted, "filled": share, "lengths": many}


@dataclass(frozen=True)
class Foreseen:
    """A run's batch that needs the most memory (`largest_batch`), and the bytes that its tokenizer and rows use."""

    batch: dict[str, Any]
    nbytes: int
    recipe: Recipe  # with its patches as the tokens of data.train make them (Patch.counted)
    notes: tuple[str, ...] = ()  # on these tokens


def foresee(recipe: Recipe) -> Foreseen:
    """Reads a run's inputs and builds its trainer on a model without values.

    BadInput for what the run would refuse of its rows: columns, chat template, lengths, token ids.
    """
    from ..model.load import empty_model

    objective = recipe.load_objective()
    gc.collect()
    before = process_memory()["anon"]
    with tempfile.TemporaryDirectory() as folder:  # the library creates `output_dir`
        cpu = recipe.place.device.type == "cpu"
        args = training_arguments(recipe, arguments_class(objective), Path(folder), cpu)
        inputs = read_inputs(recipe, objective, args, say=lambda line: None)
        model, _ = empty_model(recipe.model, task=objective.head, labels=inputs.labels)
        trainer = make_trainer(Job.without_patches(recipe, model), recipe, model, args, inputs)
        gc.collect()
        nbytes = max(0, process_memory()["anon"] - before)
        setattr(model, TOKENIZER, inputs.tokenizer)
        return Foreseen(largest_batch(trainer), nbytes, *_counted(recipe, model, trainer.train_dataset))


def _counted(recipe: Recipe, model: Any, dataset: Any) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the patches of `Patch.counted`, and their notes; the recipe itself if none counts tokens."""
    patches, notes = recipe.load_patches(), []
    if not any(patch.counts_tokens for patch in patches):
        return recipe, ()
    counts = count_tokens(dataset, vocabulary(model) or 0)
    for at, patch in enumerate(patches):
        patches[at], lines = patch.counted(model, counts)
        notes += lines
    return dataclasses.replace(recipe, patches=patches), tuple(notes)


def unread(recipe: Recipe) -> str:
    """Why a plan cannot read the rows; "" if it can."""
    from ..model.load import has_tokenizer

    names = [recipe.data.train] if isinstance(recipe.data.train, str) else recipe.data.train or []
    if not names:
        return "the recipe names no data.train"
    if any(is_hub(name) for name in names):
        return "data.train is on the hub, and a plan fetches nothing"
    return "" if has_tokenizer(recipe.model) else f"{recipe.model.name} has no tokenizer here"
