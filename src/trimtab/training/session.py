"""A training session: the loaded model, its patches and its trainer.

`Session` loads what a recipe names (cheap checks first), applies the patches on entry, trains in `fit`, and restores
the model on exit. train.py adds limits and the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState, set_seed

from ..artifacts import adapter
from ..artifacts.checkpoint_files import STATE, read_state
from ..artifacts.run_folder import nothing_left, place_of
from ..contracts import When
from ..engine.anchor import Anchor, anchored
from ..engine.arguments import check_optimizer, time_limit, training_arguments, weighed
from ..engine.divergence import Diverged, StopIfDiverged, chance_of
from ..engine.inputs import calibration_batches, largest_batch, make_trainer, read_inputs
from ..engine.objectives import arguments_class
from ..engine.patching import apply_patches, prepare, revert, without_stand_ins
from ..engine.prepare import autocast_dtype, restore_model, training_forward
from ..engine.rehearsal import Rehearsal
from ..engine.sharding import require_shardable, sharded
from ..engine.start import LossCompared, checked
from ..engine.tables import notes_of
from ..engine.trainers import Job, remove_printing
from ..errors import BadInput, Stopped
from ..memory.guard import Guard, hard_limit, ran_out
from ..memory.meter import Meter
from ..model.reply import ReplyForm
from ..recipe import Recipe
from .progress import Live, MetricsFile, SamplesFile, SaveLast, Steps, StopAtLimit, StopOnInterrupt
from .time_limit import StopAtTime

Say = Callable[[str], None]
LOST = (  # in errors of gloo and NCCL
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket Timeout",
    "remote process exited", "NCCL communicator was aborted",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How training ended: after step `step` of `wanted`."""

    step: int
    wanted: int
    # "" (done), "interrupt", "time", "budget", "machine", "diverged", "lost" (another process), "refused" (allocation)
    why: str = ""
    mean_loss: float = 0.0
    diverged: Diverged | None = None
    failed: Stopped | None = None  # of what the user provides, a reward function say


@dataclass(frozen=True)
class Start:
    """How a run starts that follows another, as one stage of several does.

    `adapter`: the folder (an adapter's or a checkpoint's) whose tensors it starts from. `optimizer`: the optimizer.pt
    whose state it takes over. `save_last`: a checkpoint is written after the last step, for a run that follows.
    `rehearsal`: rows of earlier stages to mix in, and where to keep this one's. `anchor`: the file that the trained
    weights are anchored by, and the one to write for the next stage.
    `timed_from`: when `max_minutes` began, on the clock of time.monotonic (None: when this run began).
    """

    adapter: Path | None = None
    optimizer: Path | None = None
    save_last: bool = False
    rehearsal: Rehearsal | None = None
    anchor: tuple[Path | None, Path | None] = (None, None)
    timed_from: float | None = None


class Session:
    """A recipe's model, data and training arguments. Within `with`, the model is patched and has a trainer."""

    def __init__(
        self, recipe: Recipe, output: Path, say: Say, quiet: bool, resumed: bool = False,
        start: Start = Start(),
    ):  # fmt: skip
        self.start = start
        self.recipe, self.output, self.say, self.quiet, self.resumed = recipe, output, say, quiet, resumed
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.objective, self.stepper = recipe.load_objective(), recipe.load_stepper()
        if getattr(self.objective, "soft", 0) and not (start.rehearsal and start.rehearsal.top):
            have = "rows have no probabilities: stages that rehearse with keep: logits set it"
            raise BadInput(f"objective: causal_lm: soft: {self.objective.soft}", have, "Remove soft")
        self.patches, self.place = recipe.load_patches(), place_of(recipe)
        self.args = self._arguments()
        self.inputs = read_inputs(recipe, self.objective, self.args, say)
        self.tokenizer, self.rows = self.inputs.tokenizer, self.inputs.rows
        set_seed(self.args.seed)
        self.objective = weighed(self.objective, self.args)
        if self.rows.regression and getattr(self.objective, "smoothing", 0.0):
            raise BadInput("label smoothing", "the labels of data.train are numbers, not classes", "Remove it")
        self.model = self._model()
        self.main = self.args.process_index == 0  # only this process writes and prints
        if not self.main:
            self.say, self.quiet = (lambda line: None), True
        head, spec = self.objective.head, recipe.model
        self.base = adapter.Base(
            spec.name, self.model.trimtab_base, head, spec.precision, self.rows.labels or [], self._reply_form()
        )
        self.surgeries: list[Any] = []
        self.anchor: list[Anchor] = []
        self.meter = Meter(device=self.place.device)
        self.meter.workers = self.args.dataloader_num_workers > 0
        self.guard = Guard()

    def __enter__(self) -> Session:
        dtype = self.model.dtype
        with contextlib.ExitStack() as undo:
            undo.callback(self._revert)
            self.meter.start()
            undo.callback(self.meter.stop)
            batches = calibration_batches(self.recipe, self.inputs, self.args, self.place.device)
            self.surgeries += apply_patches(self.model, self.patches, self.place, When.LOAD, batches)
            without_stand_ins(self.surgeries)
            tensors = (*self.model.parameters(), *self.model.buffers())
            self.as_loaded = [weakref.ref(t.untyped_storage()) for t in tensors]  # patches may keep some to revert
            compared = undo.enter_context(LossCompared(self.model, self.objective))

            def applied(surgery: Any) -> None:
                if surgery.patch.when is When.BOTH:
                    self.as_loaded += [weakref.ref(p.untyped_storage()) for p in self.model.parameters()]
                compared.applied(surgery)

            self.surgeries += apply_patches(
                self.model, self.patches, self.place, When.TRAIN, batches, applied,
                self.resumed or self.start.adapter is not None,
            )  # fmt: skip
            half = autocast_dtype(self.surgeries, dtype, bool(self.args.bf16))
            compared.require_unchanged(self.surgeries, half)
            if any(surgery.stores for surgery in self.surgeries) and (sharder := sharded_by(self.args)):
                raise BadInput(
                    f"train {', '.join(map(str, self.recipe.patches))} with {sharder}",
                    "it shards the parameters beside a table in the slow tier, whose rows cannot be stepped then",
                    "Use plain data parallelism, with torchrun",
                )
            if self.args.world_size > 1 and any(surgery.offloaded for surgery in self.surgeries):
                have = "each process would keep a copy of all weights, gradients and moments in a file"
                raise BadInput(f"offload: slow in {self.args.world_size} processes", have, "Use one process")
            self.surgeries += prepare(self.model, self.stepper, self.objective)
            if self.start.adapter and not self.resumed:
                adapter.load_into(self.surgeries, self.start.adapter, self.base, "start from")
            trainable = (self.stepper, self.surgeries)
            self.anchor = anchored(self.model, self.recipe.anchor, trainable, self.args.world_size)
            self.surgeries += self.anchor
            if self.anchor and self.start.anchor[0]:
                self.anchor[0].read(self.start.anchor[0])
            for note in notes_of(self.surgeries, str(self.place.folder)):
                self.say(note)
            undo.enter_context(restore_model(self.model))
            undo.enter_context(_folder(self.output))
            job = Job(
                self.objective, self.stepper, self.surgeries, self.base, dtype, self.recipe.data.too_long, self.say
            )
            self.trainer = make_trainer(job, self.recipe, self.model, self.args, self.inputs)
            remove_printing(self.trainer)
            if self.start.rehearsal and (many := self.start.rehearsal.mix_into(self.trainer)):
                self.say(f"rehearsing {many:,} rows of earlier stages")
            self.trainer.start_optimizer = None if self.resumed else self.start.optimizer
            self.recipe = checked(
                self.trainer, self.recipe, self.say, gradients=self.stepper.uses_gradients, autocast=half
            )
            self.objective = job.objective = weighed(self.recipe.load_objective(), self.args)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._undo.__exit__(*error)

    def _revert(self) -> None:
        revert(self.surgeries)
        self.surgeries.clear()

    # --- loading -------------------------------------------------------------------------------------------------

    def _arguments(self) -> Any:
        cls = arguments_class(self.objective)
        args = training_arguments(self.recipe, cls, self.output, self.place.device.type == "cpu")
        if self.recipe.place.shard:
            require_shardable(self.recipe, args)
        check_optimizer(self.recipe, args)
        return args

    def _reply_form(self) -> ReplyForm:
        """The format of replies in the training rows, which is stored in the adapter folder."""
        from ..data.chat import reply_form

        return reply_form(self.rows, self.recipe.data, self.tokenizer, getattr(self.args, "eos_token", None))

    def _model(self) -> Any:
        from ..model.load import load_model

        return load_model(
            self.recipe.model, task=self.objective.head, labels=self.inputs.labels, names=self.rows.labels or (),
            device=self.place.device, say=self.say, experts=self.recipe.with_experts,
        )[0]  # fmt: skip

    @property
    def applied(self) -> Recipe:
        """The recipe with its patches as they were applied: some depend on what calibration found."""
        made = iter([surgery for surgery in self.surgeries if surgery.patch.when is not When.LOAD])
        as_given = (When.INFER, When.LOAD)
        patches = [patch if patch.when in as_given else next(made).patch for patch in self.patches]
        return dataclasses.replace(self.recipe, patches=patches)

    def keep(self) -> None:
        """Writes what later stages need of this one: its rows, and its weights with their Fisher information."""
        own = (self.trainer.rehearsed or (len(self.trainer.train_dataset), 0))[0]
        if self.start.rehearsal and self.start.rehearsal.after:
            self.start.rehearsal.keep(self.trainer)
        if self.anchor and self.start.anchor[1]:
            rows = self.recipe.anchor.ewc.rows if self.recipe.anchor.ewc else 0
            self.anchor[0].write(self.start.anchor[1], self.trainer, own, rows)

    # --- training ------------------------------------------------------------------------------------------------

    def largest_batch(self) -> dict[str, Any]:
        """The size of the largest training batch (engine/inputs.py)."""
        return largest_batch(self.trainer)

    def fit(self, checkpoint: Path | None, limit: int | None, hard: bool = False, began: float = 0.0) -> Ended:
        """Trains, from `checkpoint` on if one is given, within `limit` bytes of the fast tier. `began`: when the run
        began, from which max_minutes counts."""
        trainer, meter = self.trainer, self.meter
        self.guard = Guard.of(limit, self.place.device)
        self.steps = Steps(self.surgeries, meter, self.model, self.as_loaded)
        self.steps.trainer = trainer
        live, interrupt = Live(self.steps, self.say, self.quiet, limit), StopOnInterrupt(self.say)
        self.interrupt = interrupt
        if self.main:
            meter.timeline = self.output / "memory.jsonl"
            trainer.add_callback(MetricsFile(self.output / "metrics.jsonl"))
            if hasattr(trainer, "samples"):
                trainer.add_callback(SamplesFile(self.output / "completions.jsonl", trainer))
        self.timer = StopAtTime(time_limit(self.recipe), self.start.timed_from or began)
        last = [SaveLast()] if self.start.save_last else []
        for callback in (self.steps, live, interrupt, StopAtLimit(self.guard, meter), self.timer, *last):
            trainer.add_callback(callback)
        if checkpoint and nothing_left(read_state(checkpoint), self.args.max_steps, self.args.num_train_epochs):
            return self._reached(checkpoint)
        meter.watchers.append(self.guard.see)
        if self.recipe.engine.stop_if_diverged:
            trainer.add_callback(StopIfDiverged(trainer, chance_of(self.model, self.rows.labels, self.rows.regression)))
        why, loss, diverged, failed = "", 0.0, None, None
        split = sharded(trainer, self.model, self.recipe, self.place.device, self.main)
        with split, training_forward(self.model, self.objective, self.recipe), interrupt:
            try:
                with hard_limit(limit, self.place.device, meter) if hard and limit else contextlib.nullcontext():
                    loss = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).training_loss
            except Diverged as error:
                why, diverged = "diverged", error
            except Stopped as error:  # before the step has changed any weight
                why, failed = "failed", error
                if trainer.state.global_step > self.steps.first:
                    trainer.save_complete()
            except Exception as error:
                if ran_out(error, hard):
                    why = "refused"
                elif self.args.world_size > 1 and any(text in str(error) for text in LOST):
                    why, trainer.lost = "lost", True
                else:
                    raise
            finally:
                self.steps.end_live()
                live.close()
                meter.stop_watching(self.guard.see)
        done, wanted = trainer.state.global_step, trainer.state.max_steps
        if not why and done < wanted:
            why = "interrupt" if interrupt.requested else self.guard.why or "time" * self.timer.reached
        return Ended(done, wanted, why, loss, diverged, failed)

    def _reached(self, checkpoint: Path) -> Ended:
        """Loads `checkpoint`, after which no step is left: the run was killed before it saved the adapter."""
        trainer = self.trainer
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
        if self.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
        self.steps.first = trainer.state.global_step
        trainer._total_train_tokens = trainer.state.num_input_tokens_seen if self.main else 0
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return Ended(self.steps.first, self.steps.first, mean_loss=sum(losses) / max(1, len(losses)))


def sharded_by(args: Any) -> str:
    """ "FSDP" or "DeepSpeed" if the arguments or the launcher request it, else ""."""
    for name, requested in (("FSDP", args.fsdp), ("DeepSpeed", args.deepspeed)):
        if requested or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("1", "true", "yes"):
            return name
    return ""


@contextlib.contextmanager
def _folder(output: Path) -> Any:
    """Creates the folder; on exit, removes it if it is empty and did not exist before."""
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"output: {output}", error.strerror or str(error), "Name a folder that can be created"
            ) from None
        yield
    finally:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
