"""Thin subclasses of TRL's SFTTrainer and transformers' Trainer.

They differ from the libraries' classes as follows. The loss is the objective's. A checkpoint has the patches' tensors,
not the model's, and is written atomically. Long rows are counted before anything is cut. The longest rows come first.
Packed rows stay rows. Formats, schedulers, optimizers, trackers, evaluation and distribution are the libraries'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from jinja2 import TemplateError
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..artifacts import adapter
from ..artifacts.checkpoint_files import (
    EARLIER,
    STATE,
    check_optimizer,
    check_scheduler,
    load,
    mapped_loads,
    write_sums,
)
from ..artifacts.run_folder import PARTIAL, checkpoints
from ..contracts import Stepper, penalty_of
from ..data.order import longest_first
from ..data.rows import check_lengths, tokenize_classification
from ..errors import BadInput
from ..files import discard, replace_folder, sync, sync_entry, writing
from ..foreign import admit_quantised
from ..model.limits import check_dataset, learned_positions
from ..model.reply import refused_by_template
from ..recipe import Recipe
from .divergence import mean_of
from .job import Inputs, Job
from .packed_rows import PackedRows
from .prepare import autocast_dtype
from .sharding import Sharded
from .tables import ClipsRows


class _OurTrainer(ClipsRows):
    """What the trainers of all objectives share: a mixin before the library's class."""

    arguments: ClassVar[type[TrainingArguments]]  # the dataclass of the fields of `training:`
    job: Job

    sharded: Sharded | None = None  # while the model's parameters are split over the processes
    lost = False  # whether another process has ended
    grad_norm = 0.0  # of the newest step, before clipping
    start_optimizer: Path | None = None  # optimizer.pt of an earlier run, whose state a new run takes over
    rehearsed: tuple[int, float] | None = None  # number of own rows before those of earlier stages, and their share
    last_counts: list[torch.Tensor]  # of the newest evaluation: correct, seen and summed loss of each batch

    def _take(self, job: Job, model: Any, args: Any) -> None:
        self.job, self.counted, self.step_losses = job, {}, []
        if places := learned_positions(model):  # padding may not exceed them
            args.pad_to_multiple_of = math.gcd(places, args.pad_to_multiple_of or 1)
        self.autocast_wanted, args.bf16 = bool(args.bf16), False  # see compute_loss_context_manager

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not any(parameter.is_meta for parameter in model.parameters()):  # the model of a plan has no values
            super()._move_model_to_device(model, device)  # type: ignore[misc]

    def loss_of(self, model: Any, inputs: dict[str, Any], count: Any) -> torch.Tensor:
        """The objective's loss, shape (), through the model's forward (so that DDP sees it); updates the counts."""
        value, correct, seen = model(objective_batch=inputs, objective_count=count)
        mode = "train" if self.model.training else "eval"
        self.counted.setdefault(mode, []).append(torch.stack([correct.detach(), seen, value.detach() * seen]).double())
        if mode == "train":
            self.step_losses.append(value.detach().float())
            self.step_summed = count is not None
        if count is not None and self.args.average_tokens_across_devices:
            value = value * self.accelerator.num_processes  # `count` is over all ranks; DDP averages the gradients
        if mode == "train" and (penalty := penalty_of(self.job.surgeries)) is not None:
            value = value + (penalty if count is None else penalty / self.current_gradient_accumulation_steps)
        return value

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The loss of one micro-batch, after the stepper's backward pass, or the library's if the stepper has none."""
        stepper = self.job.stepper
        if type(stepper).backward is Stepper.backward:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        model.train()
        inputs = self._prepare_inputs(inputs)

        losses, tokens = len(self.step_losses), self._total_train_tokens

        def loss() -> torch.Tensor:
            self._total_train_tokens = tokens  # a stepper may compute the loss several times
            with self.compute_loss_context_manager():
                value = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return value if num_items_in_batch is not None else value / self.current_gradient_accumulation_steps

        value = stepper.backward(loss, self.accelerator.backward)
        times = 1 if num_items_in_batch is not None else self.current_gradient_accumulation_steps
        self.step_losses[losses:] = [value.detach().float() * times]
        return value

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The stepper's optimizer, or else the one that the arguments name."""
        if self.optimizer is None:
            trained = [p for p in (model or self.model).parameters() if p.requires_grad]
            self.optimizer = self.job.stepper.optimizer(trained, self.args)
        made = super().create_optimizer(model)  # type: ignore[misc]
        if self.start_optimizer is not None:
            check_optimizer(self.start_optimizer, made)
            groups = made.state_dict()["param_groups"]  # with this run's learning rate
            made.load_state_dict({"state": load(self.start_optimizer)["state"], "param_groups": groups})
            self.start_optimizer = None
        self._hold(made)
        return made

    def _hold(self, optimizer: Any) -> None:
        """Moves the optimizer's state to the slow tier, where the surgeries have their parameters there."""
        for surgery in self.job.surgeries:
            if surgery.offloaded is not None:
                surgery.offloaded.hold(optimizer)

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager[None]:
        """Gradients of each micro-batch are reduced at once, so that no process keeps whole ones."""
        return contextlib.nullcontext()

    def step_loss(self) -> float:
        """The mean loss of the current optimizer step over all processes (each must call this)."""
        loss = mean_of(self.step_losses, self.step_summed)
        self.step_losses = []
        if self.args.world_size > 1:
            whole = self.step_summed and self.args.average_tokens_across_devices  # losses are shares of one mean
            loss = self.accelerator.reduce(loss, "sum" if whole else "mean")
        return float(loss)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm)
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        self.grad_norm = 0.0 if found is None else float(found)
        return found

    def counts(self, mode: str) -> dict[str, float]:
        """Accuracy since the last call, over all processes, and in evaluation the loss per item."""
        self.last_counts = self.counted.pop(mode, [])
        sums = sum(self.last_counts, torch.zeros(3, dtype=torch.float64, device=self.args.device))
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, "sum")
        correct, seen, loss = sums.tolist()
        if not seen:
            return {}
        # transformers averages the means of batches, which have unequal numbers of items
        return {"accuracy": correct / seen, **({"loss": loss / seen} if mode == "eval" else {})}

    @contextlib.contextmanager
    def compute_loss_context_manager(self) -> Iterator[None]:
        dtype = autocast_dtype(self.job.surgeries, self.job.dtype, self.autocast_wanted)
        with contextlib.nullcontext() if dtype is None else torch.autocast(self.args.device.type, dtype=dtype):
            yield

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self.sharded.whole() if self.sharded else contextlib.nullcontext():
            if self.args.should_save:
                folder = Path(output_dir or self.args.output_dir)
                before = next(iter(reversed(checkpoints(Path(self.args.output_dir)))), None)
                adapter.write_adapter(folder, self.job.surgeries, self.job.base, (before,))

    def _load(self, folder: str) -> None:
        with self.sharded.whole(write=True) if self.sharded else contextlib.nullcontext():
            adapter.load_into(self.job.surgeries, folder, self.job.base)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Checks the states first: a fused optimizer step with a moment of a wrong shape writes out of bounds."""
        if checkpoint and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            folder = Path(checkpoint)
            check_optimizer(folder / "optimizer.pt", self.optimizer)
            check_scheduler(folder / "scheduler.pt", self.lr_scheduler, self.state.global_step)
        with mapped_loads():
            super()._load_optimizer_and_scheduler(checkpoint)
        if self.sharded and checkpoint:
            self.sharded.split_states(getattr(self.optimizer, "optimizer", self.optimizer))
        self._hold(self.optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        with self.sharded.whole_states(inner) if self.sharded else contextlib.nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        try:
            super()._load_rng_state(checkpoint)
        except Exception as error:  # torch, zipfile and pickle each raise their own types
            raise BadInput(f"resume from {checkpoint}", "its random state cannot be read", EARLIER) from error

    def _load_best_model(self) -> None:
        self._load(str(self.state.best_model_checkpoint))

    def tokens(self) -> int:
        """Tokens trained on so far, over all processes (each must call this)."""
        count = torch.tensor(self._total_train_tokens, device=self.args.device)
        return int(self.accelerator.reduce(count, "sum")) if self.args.world_size > 1 else int(count)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return longest_first(super()._get_train_sampler(train_dataset), self)

    def _get_output_dir(self, trial: Any) -> str:
        return getattr(self, "_partial_dir", None) or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves into a hidden folder, which is renamed to `checkpoint-N` when it is complete."""
        run = Path(super()._get_output_dir(trial))
        partial, name = run / PARTIAL, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        if self.args.include_num_input_tokens_seen == "no":
            self.state.num_input_tokens_seen = self.tokens()  # a resumed run continues this count
        self.accelerator.wait_for_everyone()
        self._partial_dir = str(partial)
        do = "Free some space and continue with resume=true; earlier checkpoints are intact"
        try:
            with writing(f"write checkpoint {name} to {run}", do):
                # Trainer's method, not SFTTrainer's, which would write a model card into the run's folder first
                Trainer._save_checkpoint(self, model, trial)
                best = run / f"checkpoint-{self.state.best_global_step}"
                if best.name == name or best.is_dir():  # every process loads it at the end
                    self.state.best_model_checkpoint = str(best)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._publish(run, partial / name)
                self.accelerator.wait_for_everyone()
        finally:
            self._partial_dir = None
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)

    def save_complete(self) -> None:
        """Writes a checkpoint of the last complete step, if there is none."""
        if not (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}").is_dir():
            self._save_checkpoint(self.model, None)

    def _publish(self, run: Path, whole: Path) -> None:
        """Moves a complete checkpoint into the run's folder, and removes those beyond `save_total_limit`."""
        if self.state.best_global_step:
            self.state.save_to_json(str(whole / STATE))
        write_sums(whole)
        sync(whole)
        replace_folder(whole, run / whole.name)
        sync_entry(run)
        if limit := self.args.save_total_limit:
            for old in checkpoints(run)[:-limit]:
                if str(old) != self.state.best_model_checkpoint:
                    discard(old)


class CausalTrainer(_OurTrainer, SFTTrainer):
    """SFTTrainer with a trimtab objective."""

    arguments = SFTConfig

    def _send_telemetry(self) -> None:
        """TRL's trainers report their use to the hub. Ours send nothing."""

    @classmethod
    def build(cls, job: Job, recipe: Recipe, model: Any, args: Any, inputs: Inputs) -> CausalTrainer:
        rows, test = inputs.rows, inputs.test
        args.assistant_only_loss = args.assistant_only_loss or rows.assistant_only
        return cls(
            job, model=model, args=args, processing_class=inputs.tokenizer, train_dataset=rows.dataset,
            eval_dataset=test.dataset if test else None,
        )  # fmt: skip

    def __init__(self, job: Job, **kwargs: Any):
        self._take(job, kwargs["model"], kwargs["args"])
        self.base_model = kwargs["model"]  # the library's constructor prepares the rows before it sets `self.model`
        admit_quantised(kwargs["model"])
        trained = [(p, p.data) for p in kwargs["model"].parameters() if p.requires_grad]
        try:
            super().__init__(**kwargs)
        except ValueError as error:  # the library names the arguments that it refuses
            if not any(field.name in str(error) for field in dataclasses.fields(kwargs["args"])):
                raise
            raise BadInput("training", " ".join(str(error).split()).rstrip("."), "Change these fields") from error
        for parameter, data in trained:  # on a quantised base TRL rounds them to bf16, which loses small updates
            parameter.data = data
        if self.padding_free and isinstance(self.data_collator, DataCollatorForLanguageModeling):
            self.data_collator = PackedRows(
                self.data_collator.pad_token_id, pad_to_multiple_of=kwargs["args"].pad_to_multiple_of
            )
        self.model_accepts_loss_kwargs = True

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Tokenises without cutting, counts rows longer than max_length, then packs or cuts as TRL does."""
        limit, strategy = args.max_length, args.packing_strategy
        args.max_length = None
        part = self.job.part or ("train" if dataset_name == "train" else "test")
        try:
            rows = super()._prepare_dataset(dataset, processing_class, args, False, formatting_func, dataset_name)
        except TemplateError as error:
            raise refused_by_template(f"data.{part}", error) from error
        finally:
            args.max_length = limit
        if limit is not None and not (packing and strategy != "bfd"):
            rows, found = check_lengths(rows, limit, self.job.too_long, part, args.truncation_mode)
            if found.over:
                what = f"{found.cut} cut, {found.dropped} left out"
                self.job.say(f"{found.over} {dataset_name} rows are longer than max_length {limit}: {what}")
        check_dataset(self.base_model, rows, part, limit)
        if not packing:
            return rows
        shuffle, args.shuffle_dataset = args.shuffle_dataset, False
        try:
            return super()._prepare_dataset(rows, processing_class, args, True, None, dataset_name)
        finally:
            args.shuffle_dataset = shuffle

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.training:
            mask = inputs.get("attention_mask")
            rows = mask is not None and mask.dim() == 2
            self._total_train_tokens += int(mask.sum()) if rows else inputs["input_ids"].numel()
        loss = self.loss_of(model, dict(inputs), num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        prefix, mode = ("", "train") if self.model.training else ("eval_", "eval")
        logs.update({prefix + key: value for key, value in self.counts(mode).items()})
        if mode == "train":
            logs["num_tokens"] = self.tokens()
        Trainer.log(self, logs, start_time)


class ClassifierTrainer(_OurTrainer, Trainer):
    """transformers' Trainer with a trimtab objective."""

    arguments = TrainingArguments

    @classmethod
    def build(cls, job: Job, recipe: Recipe, model: Any, args: Any, inputs: Inputs) -> ClassifierTrainer:
        length, parts = recipe.training_values()["max_length"], {}
        for name, part in (("train", inputs.rows), ("test", inputs.test)):
            if part is None:
                continue
            parts[name], found = tokenize_classification(part, inputs.tokenizer, length, recipe.data.too_long, name)
            check_dataset(model, parts[name], name)
            if found.over:
                what = f"{found.cut} cut, {found.dropped} left out"
                job.say(f"{found.over} {name} rows are longer than max_length {length}: {what}")
        return cls(
            job, model=model, args=args, processing_class=inputs.tokenizer, train_dataset=parts["train"],
            eval_dataset=parts.get("test"),
            data_collator=DataCollatorWithPadding(inputs.tokenizer, pad_to_multiple_of=args.pad_to_multiple_of),
        )  # fmt: skip

    def __init__(self, job: Job, **kwargs: Any):
        self._take(job, kwargs["model"], kwargs["args"])
        self._total_train_tokens = 0
        admit_quantised(kwargs["model"])
        super().__init__(**kwargs)
        self._set_signature_columns_if_needed()  # now, while the model's forward still names its arguments
        self.model_accepts_loss_kwargs = True  # the mean is over all rows of a step, not per micro-batch

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Rows of the whole optimizer step; the library would count labels, and treat -100.0 as no label."""
        rows = torch.tensor(sum(len(batch["labels"]) for batch in batch_samples), device=device)
        return self.accelerator.gather(rows).sum() if self.args.average_tokens_across_devices else rows

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.training:
            self._total_train_tokens += int(inputs["attention_mask"].sum())
        loss = self.loss_of(model, dict(inputs), num_items_in_batch)
        return (loss, None) if return_outputs else loss

    prediction_step = CausalTrainer.prediction_step
    log = CausalTrainer.log


def remove_printing(trainer: Trainer) -> None:
    """Removes the library's printing callbacks, which ours replace."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
