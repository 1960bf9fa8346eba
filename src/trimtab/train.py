"""`trimtab train RECIPE.yaml`: read, load, patch, train, save, report.

The order is chosen so that what is cheap to refuse is refused first: the recipe, then the output folder, then the
data, then the model. Nothing is written before all of them are found good.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import methods
from .errors import BadInput, Interrupted
from .memory.meter import GIB, Meter
from .model.quiet import hushed, no_dataset_bars
from .recipe import Recipe
from .runs import begin_run, machine, now, open_run, versions, write_json


@hushed()
@no_dataset_bars()
def train(recipe: Recipe, quiet: bool = True, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run a recipe; returns what run.json holds.

    Raises BadInput for what the user must mend and Interrupted after Ctrl-C (a checkpoint is then in the folder).
    """
    began = time.monotonic()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not recipe.patches:
        raise BadInput(
            "train", "the recipe has no patch", f"Add one under patches: {', '.join(methods.names('patch'))}"
        )
    from transformers import set_seed

    from . import adapter
    from .progress import Live, MetricsFile, Steps, StopOnInterrupt, speaker

    say = say or speaker(quiet)
    output, checkpoint = open_run(recipe)
    objective, stepper, patches, place = (
        recipe.load_objective(), recipe.load_stepper(), recipe.load_patches(), recipe.load_place(),
    )  # fmt: skip
    from .engine import Job, as_it_was, prepared, quiet as hush  # noqa: I001  (imports TRL: after the cheap checks)

    args = _arguments(recipe, objective, output, place)
    tokenizer, rows, test = _data(recipe, objective)
    set_seed(args.seed)
    model = _model(recipe, objective, place, rows, say)
    base = adapter.Base(
        recipe.model.name, model.trimtab_base, objective.task, recipe.model.precision, rows.labels or []
    )
    dtype = model.dtype
    main = args.process_index == 0  # of several processes one writes and speaks
    say, quiet = (say, quiet) if main else (lambda line: None, True)
    meter, surgeries = Meter(device=place.device).start(), []
    try:
        for patch in patches:
            surgeries.append(patch.apply(model, place))
        if (head := objective.prepare(model)) is not None:
            surgeries.append(head)
        with as_it_was(model), _folder(output):
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            total = sum(t.numel() for s in surgeries for t in s.own_tensors().values())
            job = Job(objective, stepper, surgeries, base, dtype, recipe.data.too_long, say)
            trainer = _trainer(recipe, objective, job, model, tokenizer, rows, test, args)
            hush(trainer)
            predicted = _planned(recipe, trainer, meter, say)
            if main:  # nothing is written before this line
                begin_run(output, recipe, resumed=checkpoint is not None)
                meter.timeline = output / "memory.jsonl"
            say(
                f"{' + '.join(map(methods.name_of, patches))} on {recipe.model.name}: {trainable:,} numbers are trained"
            )
            steps = Steps(surgeries, meter, model)
            steps.trainer = trainer
            live = Live(steps, say, quiet)
            interrupt = StopOnInterrupt(say)
            written = [MetricsFile(output / "metrics.jsonl")] if main else []
            for callback in (*written, steps, live, interrupt):
                trainer.add_callback(callback)
            with prepared(model, objective, recipe), interrupt:
                try:
                    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                finally:
                    steps.end_live()
                    live.close()
            finished, asked_for = trainer.state.global_step, trainer.state.max_steps
            if interrupt.asked and finished < asked_for:
                raise Interrupted(
                    f"stopped after step {finished} of {asked_for}",
                    f"{output / f'checkpoint-{finished}'} holds everything", "Go on with resume=true",
                )  # fmt: skip
            meter.stop()
            trained = {
                "recipe": recipe.hash, "finished": now(), "output": str(output),
                "trainable_parameters": trainable, "adapter_numbers": total, "mean_loss": result.training_loss,
                **_record(trainer, steps, meter, began), "predicted": predicted, "processes": args.world_size,
                "machine": machine(), "versions": versions(),
            }  # fmt: skip
            if main:
                adapter.save_adapter(output / "adapter", surgeries, base)
                write_json(output / "run.json", trained)
            _tell(trained, output, say)
            return trained
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise BadInput(
            f"write into {output}", error.strerror or str(error), "Make room, or name another output"
        ) from error
    finally:
        meter.stop()
        for surgery in reversed(surgeries):
            surgery.revert()


@contextlib.contextmanager
def _folder(output: Path) -> Iterator[None]:
    """The folder, made; a run that never began leaves no empty one behind."""
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"output: {output}", error.strerror or str(error), "Name a folder that can be made"
            ) from None
        yield
    finally:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _arguments(recipe: Recipe, objective: Any, output: Path, place: Any) -> Any:
    from transformers import TrainingArguments
    from trl import SFTConfig

    from .engine import training_arguments

    cls = SFTConfig if objective.task == "causal-lm" else TrainingArguments
    args = training_arguments(recipe, cls, output, place.device.type == "cpu")
    if cls is SFTConfig and args.completion_only_loss is None and args.max_length is None and args.packing:
        raise BadInput("training: packing: true", "max_length is None", "Give max_length")
    return args


def _data(recipe: Recipe, objective: Any) -> tuple[Any, Any, Any]:
    from .data import read_rows
    from .model.load import cached_folder, load_tokenizer

    spec = recipe.model
    folder = cached_folder(spec.name, revision=spec.revision, code=spec.trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=spec.trust_remote_code)
    rows = read_rows(recipe.data, "train", tokenizer, objective.task)
    test = None
    if recipe.data.test and recipe.training.get("eval_strategy", "no") != "no":
        test = read_rows(recipe.data, "test", tokenizer, objective.task, like=rows)
    return tokenizer, rows, test


def _model(recipe: Recipe, objective: Any, place: Any, rows: Any, say: Callable[[str], None]) -> Any:
    from .model.load import load_model

    labels = 1 if rows.regression else len(rows.labels) if rows.labels else None
    model, _ = load_model(recipe.model, task=objective.task, labels=labels, device=place.device, say=say)
    if rows.labels:
        model.config.id2label = dict(enumerate(rows.labels))
        model.config.label2id = {label: index for index, label in enumerate(rows.labels)}
    return model


def _trainer(recipe, objective, job, model, tokenizer, rows, test, args) -> Any:
    from .engine import CausalTrainer, ClassifierTrainer

    common = {"model": model, "args": args, "processing_class": tokenizer}
    if objective.task == "causal-lm":
        args.assistant_only_loss = args.assistant_only_loss or rows.assistant_only
        return CausalTrainer(job, train_dataset=rows.dataset, eval_dataset=test.dataset if test else None, **common)
    from transformers import DataCollatorWithPadding

    from .data import tokenize_classification

    length = recipe.training_values()["max_length"]
    parts = {}
    for name, part in (("train", rows), ("test", test)):
        parts[name], found = (
            tokenize_classification(part, tokenizer, length, recipe.data.too_long, name) if part else (None, None)
        )
        if found and found.over:
            job.say(
                f"{found.over} {name} rows are longer than max_length {length}: "
                f"{found.cut} cut, {found.dropped} left out"
            )
    return ClassifierTrainer(
        job,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        **common,
    )


def _planned(recipe: Recipe, trainer: Any, meter: Meter, say: Callable[[str], None]) -> dict[str, Any]:
    """-> what the plan predicts for the longest rows. A run over its `budget:` is refused here.

    Without a budget, a run that the planner does not cover goes on without a prediction.
    """
    from .plan import plan
    from .plan_search import require_fit

    if trainer.args.world_size > 1:
        if recipe.budget:
            raise BadInput("budget: with several processes", "the planner knows runs of one process", "Take it out")
        return {}
    try:
        made = plan(recipe, args=trainer.args, **_largest_batch(trainer))
    except BadInput:
        if recipe.budget:
            raise
        return {}
    made = dataclasses.replace(made, process=max(0, meter.baseline["anon"] - made.kinds.get("weights", 0)))
    if recipe.budget:
        require_fit(made, recipe)
        say(f"planned: {made.fast_peak_bytes / GIB:.2f} GiB of the fast tier at the peak")
    return made.predicted()


def _largest_batch(trainer: Any) -> dict[str, Any]:
    """Rows, tokens of the longest one, and the most tokens of a row that count; read without decoding the table."""
    import numpy
    from pyarrow import compute

    longest, counted = 1, None
    for part in trainer.train_dataset.with_format("arrow").iter(1000):
        longest = max(longest, compute.max(compute.list_value_length(part["input_ids"])).as_py())
        if "labels" in part.column_names and "List" in str(trainer.train_dataset.features["labels"]):
            labels = part["labels"].combine_chunks()
            row = compute.list_parent_indices(labels).to_numpy()[labels.flatten().to_numpy() != -100]
            counted = max(counted or 0, int(numpy.bincount(row, minlength=1).max()))
    step = getattr(trainer.args, "pad_to_multiple_of", None) or 1
    rows = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    return {"rows": rows, "tokens": -(-longest // step) * step, "counted": counted}


def _record(trainer: Any, steps: Any, meter: Meter, began: float) -> dict[str, Any]:
    """What the run did and held: the measured part of run.json."""
    tokens = trainer.tokens()
    share = trainer._total_train_tokens / max(tokens, 1)  # what this process saw of them
    return {
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "final_loss": _final_loss(trainer),
        "evaluation": _evaluation(trainer),
        "measured": {
            **meter.result(),
            "live_peak_bytes": steps.live_peak,
            "mapped_weight_bytes": steps.live_mapped,
            "tokens_per_second": round(steps.tokens_per_second / (share or 1.0), 2),
            "seconds_to_first_step": round((steps.first_step_at or time.monotonic()) - began, 2),
            "seconds": round(time.monotonic() - began, 2),
        },
    }


def _evaluation(trainer: Any) -> dict[str, float]:
    """The newest `eval_*` figures, where the recipe asked for evaluation on the way."""
    newest = next((row for row in reversed(trainer.state.log_history) if "eval_loss" in row), {})
    return {key: value for key, value in newest.items() if key.startswith("eval_")}


def _final_loss(trainer: Any) -> float | None:
    return next((float(row["loss"]) for row in reversed(trainer.state.log_history) if "loss" in row), None)


def _tell(run: dict[str, Any], output: Path, say: Callable[[str], None]) -> None:
    measured = run["measured"]
    loss = "" if run["final_loss"] is None else f", loss {run['final_loss']:.3f}"
    say(f"{run['steps']} steps, {run['tokens']:,} tokens{loss}, {measured['tokens_per_second']:,.0f} tokens/s")
    growth = measured["fast_growth_bytes"] / GIB
    say(f"fast tier: {measured['fast_peak_bytes'] / GIB:.2f} GiB at the peak, {growth:.2f} GiB of it for this run")
    say(f"{output / 'adapter'}: the adapter    {output / 'run.json'}: all figures")
