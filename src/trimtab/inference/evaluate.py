"""`trimtab eval RECIPE.yaml`: evaluates the run's model, or its base, on the test data.

Causal models: loss and perplexity on the completions, and, if rows have answers, the means of `data.metrics`
(data/metrics.py) over greedy replies. Classifiers: accuracy and Matthews correlation, or Pearson and Spearman
correlation for numbers. `tasks`: benchmarks of lm-eval, if installed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.metrics import METRICS
from ..errors import BadInput
from ..model.reply import longest_answer
from ..quiet import no_dataset_bars, silence_libraries
from ..recipe import Recipe

if TYPE_CHECKING:
    from .session import Inference

Say = Callable[[str], None]
BATCH = 32  # texts in a batch of a classifier


@silence_libraries()
@no_dataset_bars()
def evaluate(
    recipe: Recipe, adapter: str | Path | None = None, base_only: bool = False, tasks: Sequence[str] = (),
    limit: int | None = None, say: Say = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates on `data.test` (or on lm-eval's `tasks`); -> {"rows", "metrics", "samples"}, and "reads" for an adapter
    with tables in the slow tier.

    The result is saved in the run's folder as `eval.json`, or `eval_base.json` for the base; not for another `adapter`.
    """
    from ..engine.objectives import evaluator
    from ..files import write_record
    from .session import Inference

    if not recipe.data.test and not tasks:
        raise BadInput("eval", "the recipe names no data.test", "Add data: {test: FILE}, or name --tasks of lm-eval")
    made = Inference(recipe, adapter, base_only, say)
    result: dict[str, Any] = {
        "model": recipe.model.name,
        "adapter": made.run.folder and str(adapter or recipe.output),
    }
    if not tasks and made.base.task != recipe.load_objective().head:
        have = f"the adapter was trained for {made.base.task}"
        raise BadInput(f"eval with objective: {recipe.objective}", have, "Use the recipe of its run")
    with made:
        if tasks:
            result["metrics"] = harness(made.model, made.tokenizer, tasks, limit)
        else:
            result |= evaluator(recipe.load_objective())(made, limit)
        result |= made.record()
    folder = Path(recipe.output)
    if adapter is None and folder.is_dir():
        tests = recipe.data.test if isinstance(recipe.data.test, list) else [recipe.data.test or ""]
        source = {"tasks": list(tasks)} if tasks else {"test": [Path(name).name for name in tests]}
        write_record(folder / ("eval_base.json" if base_only else "eval.json"), {**source, **result}, say)
    return result


@silence_libraries()
@no_dataset_bars()
def scores(
    recipe: Recipe, tests: Sequence[Recipe], adapter: str | Path | None = None, base_only: bool = False,
    say: Say = lambda line: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Evaluates one model on the `data.test` of several recipes, row by row.

    -> for each {"rows", "metrics", "each": {metric: a value per row}, "samples"}. A row's loss is the mean over its
    tokens.
    """
    from ..engine.objectives import evaluator
    from .session import Inference

    found = []
    with Inference(recipe, adapter, base_only, say) as made:
        for test in tests:
            made.recipe, made.each = test, {}
            found.append({**evaluator(test.load_objective())(made, None), "each": made.each})
    return found


# --- causal language models ------------------------------------------------------------------------------------------


def answer(made: Inference, limit: int | None = None) -> dict[str, Any]:
    """Loss over the test rows and, if they have answers, the metrics of greedy replies."""
    from ..data.chat import reply_form
    from ..data.rows import eval_pairs, read_rows, row_tools
    from ..model.sampling import prompt_ids, sample

    recipe, model, tokenizer, form = made.recipe, made.model, made.tokenizer, made.base.reply
    # the tokenizer already has the chat template
    rows = read_rows(dataclasses.replace(recipe.data, chat_template=None), "test", tokenizer, "causal-lm")
    metrics: dict[str, float] = {}
    samples: list[dict[str, Any]] = []
    size = min(len(rows.dataset), limit or len(rows.dataset))
    metrics.update(losses(made, rows, size))
    if rows.answers and recipe.data.metrics:
        pairs = eval_pairs(rows)[:size]
        if form.chat is None:  # not from a run
            form = reply_form(rows, recipe.data, tokenizer, recipe.training.get("eos_token"))
        longest = max(form.longest, longest_answer(tokenizer, [accepted for _, accepted in pairs], most=None))
        most = dataclasses.replace(form, longest=longest).max_tokens(recipe.data.reply_tokens)
        scores, cut = dict.fromkeys(recipe.data.metrics, 0.0), set[int]()
        prompts, tools = [prompt for prompt, _ in pairs], row_tools(rows)[:size]
        lengths = [len(prompt_ids(tokenizer, *pair)) for pair in zip(prompts, tools or [None] * size, strict=True)]
        replies = sample(
            model, tokenizer, prompts, batch_size=made.replies(lengths, most), form=form, tools=tools,
            cut=cut, cache=made.cache, on_token=made.on_token, max_new_tokens=most,
        )  # fmt: skip
        for (prompt, accepted), reply in zip(pairs, replies, strict=True):
            for name in scores:
                scores[name] += (one := METRICS[name](reply, accepted))
                made.keep(name, one)
            samples.append({"prompt": _shown(prompt), "reply": reply, "answers": accepted})
        metrics |= {name: score / size for name, score in scores.items()}
        if cut:
            made.say(
                f"{len(cut)} of {size} replies were cut at {most} tokens; data.reply_tokens sets how long they may be"
            )
        return {"rows": size, "metrics": metrics, "samples": samples[:20], "cut_replies": len(cut)}
    return {"rows": size, "metrics": metrics, "samples": samples[:20]}


def losses(made: Inference, rows: Any, size: int) -> dict[str, float]:
    """Mean next-token loss (nats) over the tokens that count, its perplexity, and the token accuracy."""
    import tempfile

    from transformers import IntervalStrategy

    from ..engine.arguments import training_arguments
    from ..engine.inputs import Inputs, largest_batch, make_trainer
    from ..engine.objectives import arguments_class
    from ..engine.prepare import autocast_dtype, restore_model, training_forward
    from ..engine.start import checked
    from ..engine.trainers import Job, remove_printing
    from .session import Guarded

    recipe, model, tokenizer = made.recipe, made.model, made.tokenizer
    with tempfile.TemporaryDirectory() as folder, restore_model(model):
        cpu = recipe.place.device.type == "cpu"
        args = training_arguments(recipe, arguments_class(recipe.load_objective()), Path(folder), cpu)
        args.dataloader_drop_last, args.eval_strategy = False, IntervalStrategy.NO
        args.max_steps, args.num_train_epochs = -1, 1
        args.per_device_eval_batch_size = args.per_device_train_batch_size = (
            args.per_device_train_batch_size if made.each is None else 1
        )
        dataset = rows.dataset.select(range(size))
        inputs = Inputs(tokenizer, dataclasses.replace(rows, dataset=dataset), None)
        trainer = make_trainer(Job.without_patches(recipe, model, part="test"), recipe, model, args, inputs)
        trainer.eval_dataset = trainer.train_dataset
        remove_printing(trainer)
        half = autocast_dtype([], model.dtype, trainer.autocast_wanted)
        recipe = checked(trainer, recipe, made.say, gradients=False, autocast=half)
        with training_forward(model, recipe.load_objective().cross_entropy(), recipe):
            batch = largest_batch(trainer)
            made.evaluation(batch["rows"], batch["tokens"], batch["lengths"])
            trainer.add_callback(Guarded(made))
            found = trainer.evaluate()
    for _, seen, value in (part.tolist() for part in trainer.last_counts if made.each is not None):
        made.keep("loss", value / max(seen, 1))
    loss = found["eval_loss"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "token_accuracy": found["eval_accuracy"]}


def _shown(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


# --- classifiers -----------------------------------------------------------------------------------------------------


def classify(made: Inference, limit: int | None = None) -> dict[str, Any]:
    """Accuracy and Matthews correlation, or Pearson and Spearman correlation if labels are numbers."""
    import torch
    from transformers import DataCollatorWithPadding

    from ..data.order import row_lengths
    from ..data.rows import Rows, read_rows, tokenize_classification
    from ..model.limits import check_dataset

    recipe, model, tokenizer, labels = made.recipe, made.model, made.tokenizer, made.base.labels
    like = Rows(None, "", labels=labels) if labels else None  # type: ignore[arg-type]
    rows = read_rows(recipe.data, "test", tokenizer, "classification", like=like)
    dataset, _ = tokenize_classification(
        rows, tokenizer, recipe.training_values()["max_length"], recipe.data.too_long, "test"
    )
    check_dataset(model, dataset, "test")
    size = min(len(dataset), limit or len(dataset))
    collate = DataCollatorWithPadding(tokenizer)
    scores, truth, lengths = [], [], row_lengths(dataset)[:size]
    step = min(BATCH, size)
    widths = [int(lengths[start : start + step].max()) for start in range(0, size, step)]
    made.evaluation(step, max(widths), len(set(widths)))
    with torch.no_grad():
        for start in range(0, size, step):
            made.check()
            batch = collate([dataset[i] for i in range(start, min(start + step, size))])
            truth.append(batch.pop("labels"))
            scores.append(model(**{k: v.to(model.device) for k, v in batch.items()}).logits.float().cpu())
    wanted, got = torch.cat(truth), torch.cat(scores)
    if rows.regression:
        got = got.squeeze(-1)
        metrics = {"pearson": _correlation(got, wanted), "spearman": _correlation(_ranks(got), _ranks(wanted))}
    else:
        chosen = got.argmax(-1)
        metrics = {"accuracy": float((chosen == wanted).float().mean())}
        for right in (chosen == wanted).tolist():
            made.keep("accuracy", float(right))
        if got.shape[1] == 2:
            metrics["matthews"] = _correlation(chosen, wanted)  # equal to Pearson's for two binary variables
    return {"rows": size, "metrics": metrics, "samples": []}


def _correlation(a: Any, b: Any) -> float:
    import torch

    value = torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1]
    return 0.0 if value.isnan() else float(value)


def _ranks(values: Any) -> Any:
    """Ranks; ties get their mean rank."""
    import torch

    _, inverse, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return ((ends - counts + 1 + ends) / 2)[inverse] if len(values) else torch.empty(0)


# --- lm-eval ---------------------------------------------------------------------------------------------------------


def harness(model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None) -> dict[str, float]:
    """Runs benchmarks of EleutherAI's lm-eval on the model (extra: `pip install trimtab[eval]`)."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise BadInput(
            f"tasks {', '.join(tasks)}", "lm-eval is not installed", 'Run: pip install "trimtab[eval]"'
        ) from None
    found = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks), limit=limit)
    return {
        f"{task}/{name.split(',')[0]}": value
        for task, row in found["results"].items()
        for name, value in row.items()
        if isinstance(value, float)
    }
