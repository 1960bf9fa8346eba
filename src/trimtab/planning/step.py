"""Traces one training step of a recipe on a model without values.

The trace runs the patched model with the engine's fused operations, the objective's loss and the recipe's optimizer on
fake tensors (cost/trace.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, Untraceable
from ..recipe import Recipe
from .planned_model import PlannedModel, at_whole_depth

if TYPE_CHECKING:
    from ..cost.rates import Rates
    from ..cost.trace import StepCost


def step_cost(
    recipe: Recipe, args: Any, rows: int, tokens: int, counted: int | None, rates: Rates | None = None
) -> StepCost:
    """The cost of a step. `counted`: tokens of a row in the loss (None: all). Without `rates` the cost has no
    seconds."""
    return at_whole_depth(
        lambda blocks: PlannedStep(recipe, args, blocks), lambda step: step.trace(rows, tokens, counted, rates)
    )


class PlannedStep(PlannedModel):
    """One training step of a recipe under the training arguments `args`."""

    def __init__(self, recipe: Recipe, args: Any, blocks: int | None, real: bool = False):
        from ..contracts import When
        from ..engine.anchor import anchored
        from ..engine.arguments import weighed
        from ..engine.patching import without_stand_ins
        from ..engine.prepare import weigh_router
        from ..model.head import READ, read_head

        self.args, self.stepper = args, recipe.load_stepper()
        self.objective = weighed(recipe.load_objective(), args)
        super().__init__(recipe, blocks, real, self.objective.head)
        if self.head == "causal-lm":
            weigh_router(self.model, args)
            setattr(self.model, READ, read_head(self.model))
        self.patch(recipe.load_patches(), When.LOAD)
        without_stand_ins(self.surgeries)
        self.patch(recipe.load_patches(), When.TRAIN, self.stepper, self.objective)
        self.surgeries += anchored(self.model, recipe.anchor, (self.stepper, self.surgeries))

    @property
    def trained(self) -> int:
        """The number of trained parameters, including rows in the slow tier."""
        from ..engine.tables import row_parameters

        return sum(p.numel() for p in self.model.parameters() if p.requires_grad) + row_parameters(self.surgeries)

    def complete(self, cost: StepCost) -> StepCost:
        """`cost` with the bytes of the tables, and figures of the whole model."""
        self.with_tables(cost.peaks)
        return dataclasses.replace(
            cost, trained=self.trained, autocast=self.autocast is not None,
            copied_ahead=max((store.carried for store in self.stores), default=0), notes=tuple(self.notes),
            take=self.take,
        )  # fmt: skip

    def period(self) -> int:
        every = (self.args.activation_checkpointing_kwargs or {}).get("every_n_layers", 1)
        return math.lcm(super().period(), every if self.args.activation_checkpointing else 1)

    def trace(self, rows: int, tokens: int, counted: int | None = None, rates: Rates | None = None) -> StepCost:
        """The cost of a step, before `complete`."""
        import torch

        from ..cost.roofline import Clock
        from ..cost.trace import Step, trace_steps
        from ..engine.prepare import training_forward

        model, recipe = self.model, self.recipe
        kept = self.kept()
        model.train()
        self._checkpointing()
        clock = None if rates is None else Clock(rates)
        if not self.real:  # a real step's work on tables is traced
            for store in self.stores:
                store.clock = clock
            for surgery in self.surgeries:
                if surgery.tiers is not None:
                    surgery.tiers.clock = clock
        plain = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, compile=False))
        with training_forward(model, self.objective, plain):
            if recipe.place.device.type != "cpu":  # fused attention is for CPUs only
                model.set_attn_implementation("sdpa")
            cost = trace_steps(Step(
                model, torch.device("cpu"), functools.partial(self.batch, rows, tokens), self.loss,
                self.stepper.backward, self.optimizer, self.kind_of, self._evaluation(tokens),
                micro_batches=self.args.gradient_accumulation_steps, clip=self.args.max_grad_norm or 0.0,
                counted=None if counted is None else rows * counted, clock=clock,
                full_rows=bool(getattr(self.args, "packing", False)), offload=self._offloads,
            ), fake=not self.real)  # fmt: skip
        if rates is not None and not self.real:
            cost = self._with_row_updates(cost, rates)
        self.with_kept(cost.peaks, kept)
        return cost

    def _with_row_updates(self, cost: StepCost, rates: Rates) -> StepCost:
        """Adds the seconds of the rows' optimizer step, which the trace does not see. If they are unknown, the result
        has no seconds."""
        from ..cost.roofline import row_update
        from ..cost.trace import OPTIMIZER
        from ..tiered.planned import expected_rows
        from ..tiered.record import VALUES

        seconds, written = dict(cost.seconds or {}), 0.0
        for store in self.stores:
            tokens, probes = store.used
            if not tokens or not store.optimizer.plain:
                return dataclasses.replace(cost, seconds=None)
            many = expected_rows(store, tokens, probes, self.args.gradient_accumulation_steps)
            update = row_update(rates, store.parts[VALUES].nbytes, many, store.optimizer.copies)
            seconds[OPTIMIZER] = seconds.get(OPTIMIZER, 0.0) + update
            written += many * store.record_bytes if store.slow == "disk" else 0.0
        return dataclasses.replace(cost, seconds=seconds, written=written)

    def batch(self, rows: int, tokens: int) -> dict[str, Any]:
        made = self.objective.example_batch(rows, tokens, self.args)
        if self.real:  # values may decide which operations run, so ids should differ
            made["input_ids"].random_(self.model.config.get_text_config().vocab_size)
            if "attention_mask" in made and not getattr(self.args, "packing", False):
                made["attention_mask"][0, -1] = 0  # a row that is padded needs a mask in each layer
        return made

    def _evaluation(self, tokens: int) -> Any:
        """A function that returns an evaluation batch, with rows as long as in training; None: no evaluation."""
        if not self.recipe.data.test or self.args.eval_strategy == "no":
            return None
        return functools.partial(self.batch, self.args.per_device_eval_batch_size, tokens)

    def loss(self, batch: dict[str, Any]) -> Any:
        import torch

        from ..contracts import penalty_of

        dtype = self.autocast
        with contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
            value = self.model(objective_batch=batch)[0]
        penalty = penalty_of(self.surgeries)
        return value if penalty is None else value + penalty

    def optimizer(self, trained: list[Any]) -> Any:
        from transformers import Trainer

        from ..engine.optimizers import make_optimizer, name_of

        if (made := self.stepper.optimizer(trained, self.args)) is not None:
            return made
        name = name_of(self.args)
        cls, options = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
        if cls.__module__.startswith("torch.optim"):
            made = cls(trained, **options)
        elif "lomo" in name or "layerwise" in name:
            have = "it steps during the backward pass, which the planner does not do"
            raise BadInput(
                f"plan training: optim: {name}", have, "Remove budget:; run.json will show what the run used"
            )
        elif not self.real:
            raise Untraceable(f"plan training: optim: {name}", f"{name} needs values", "Remove budget:")
        else:
            made = make_optimizer(self.model, self.args)
        for surgery in self.surgeries:
            if surgery.offloaded:
                surgery.offloaded.hold(made)
        return made

    @property
    def autocast(self) -> Any:
        """The dtype of autocast, or None."""
        from ..engine.prepare import autocast_dtype

        return autocast_dtype(self.surgeries, self.dtype, self.args.bf16)

    @property
    def _offloads(self) -> bool:
        options = self.args.activation_checkpointing_kwargs or {}
        return self.args.activation_checkpointing and bool(options.get("offload"))

    def _checkpointing(self) -> None:
        if not self.args.activation_checkpointing:
            return
        options = dict(self.args.activation_checkpointing_kwargs or {})
        every = options.pop("every_n_layers", 1)
        options.pop("offload", False)  # traced by cost/trace.py
        self.model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=options or None, every_n_layers=every
        )
