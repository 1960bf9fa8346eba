"""One training step of a recipe, on a model without values: what the planner traces.

The model is built from its config on the `meta` device and patched as the recipe says; the engine's own forms of the
blocks, the objective's loss and the optimiser that the recipe names are stepped on fake tensors (cost/trace.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, Untraceable
from ..recipe import Recipe

if TYPE_CHECKING:
    from ..cost.rates import Rates
    from ..cost.trace import StepCost

SHALLOW = 2  # the shallow model's blocks; a second, deeper by as many, gives the line on which deeper stacks lie


def step_cost(
    recipe: Recipe, args: Any, rows: int, tokens: int, counted: int | None, rates: Rates | None = None
) -> StepCost:
    """The cost of a step at the whole depth; from two shallow models where the kinds of blocks recur.

    `counted`: tokens of a row that count in the loss (None: all). Without `rates` the cost has no seconds.
    """
    from ..cost.trace import extend
    from ..model import anatomy

    whole = PlannedStep(recipe, args, None)
    depth, period = len(anatomy.blocks(whole.model)[1]), whole.period()
    low = SHALLOW if period == 1 else period + depth % period
    shallow = (low, low + SHALLOW * period)
    if depth <= shallow[1]:
        return whole.trace(rows, tokens, counted, rates)
    traces = [PlannedStep(recipe, args, n).trace(rows, tokens, counted, rates) for n in shallow]
    return whole.complete(extend(*traces, shallow, depth))


class PlannedStep:
    """One training step of a recipe on a model without values, `blocks` deep (None: as deep as it is). With `real` the
    model has its weights."""

    def __init__(self, recipe: Recipe, args: Any, blocks: int | None, real: bool = False):
        from ..engine.arguments import weighed
        from ..model.load import assembled, empty_model, left_dense, load_model

        self.recipe, self.args, self.real = recipe, args, real
        self.objective = weighed(recipe.load_objective(), args)
        self.blocks = blocks
        self.model, self.mapped = empty_model(recipe.model, task=self.objective.task, blocks=blocks)
        if real:
            self.model = load_model(recipe.model, task=self.objective.task)[0]
        self.left_dense = left_dense(self.model)
        self._as_trained()
        self.dtype = self.model.dtype
        # `.data`: the storage, which stays when a patch puts another under the same parameter
        self.base = {_key(t): t.data for t in (*self.model.parameters(), *self.model.buffers())}
        fresh = [] if self.objective.task == "causal-lm" else self._fresh()
        copies = [*fresh, *assembled(self.model, recipe.model)]
        self.in_file = {_key(p) for p in self.model.parameters()} - {_key(p) for p in copies}
        place = recipe.load_place()
        self.mapped = self.mapped and place.device.type == "cpu"  # another device gets copies
        try:
            self.surgeries = [patch.apply(self.model, place) for patch in recipe.load_patches()]
        except (RuntimeError, NotImplementedError) as error:  # a library's code may read values
            why = f"the patch cannot be put on a model without values ({' '.join(str(error).split())[:120]})"
            raise Untraceable(f"plan {', '.join(map(str, recipe.patches))}", why, "Remove budget:") from error
        if (head := self.objective.prepare(self.model)) is not None:
            self.surgeries.append(head)

    def _as_trained(self) -> None:
        """What a run does to the model before it is patched and decides how its loss is computed."""
        from ..engine.prepare import weigh_router
        from ..model.head import READ, read_head

        if self.objective.task == "causal-lm":
            weigh_router(self.model, self.args)
            setattr(self.model, READ, read_head(self.model))

    def _fresh(self) -> list[Any]:
        from ..model import anatomy

        return list(anatomy.fresh_parameters(self.model).values())

    @property
    def trained(self) -> int:
        """How many parameters are trained, those of rows in the slow tier among them."""
        from ..engine.tables import row_numbers

        return sum(p.numel() for p in self.model.parameters() if p.requires_grad) + row_numbers(self.surgeries)

    @property
    def notes(self) -> list[str]:
        """What to know of how the patches are applied."""
        from ..artifacts.run_folder import place_of
        from ..engine.tables import notes_of

        return [*self.left_dense, *notes_of(self.surgeries, str(place_of(self.recipe).folder))]

    @property
    def stores(self) -> list[Any]:
        return [store for surgery in self.surgeries for store in surgery.stores]

    def complete(self, cost: StepCost) -> StepCost:
        """`cost` with the bytes of the tables, which are there in every phase, and what is known of a whole model.

        The bytes of tables are not linear in the depth: a cache is shared out over the layers.
        """
        from ..cost.trace import ADAPTER, ROWS

        for kinds in cost.peaks.values():
            for store in self.stores:
                kinds[ADAPTER] = kinds.get(ADAPTER, 0) + store.nbytes["fast"]
                kinds[ROWS] = kinds.get(ROWS, 0) + store.nbytes["slow"]
        return dataclasses.replace(
            cost, trained=self.trained, autocast=self.autocast is not None,
            copied_ahead=max((store.carried for store in self.stores), default=0), notes=tuple(self.notes),
        )  # fmt: skip

    def period(self) -> int:
        """After how many blocks the kinds of blocks recur: 1 where all are equal, the depth where they never do."""
        from ..model import anatomy

        stack = anatomy.blocks(self.model)[1]
        depth = len(stack)
        types = getattr(self.model.config.get_text_config(), "layer_types", None) or [None] * depth
        looks = [
            (kind, *((n, t.shape, t.dtype, t.requires_grad) for n, t in block.named_parameters()))
            for kind, block in zip(types, stack, strict=True)
        ]
        every = (self.args.activation_checkpointing_kwargs or {}).get("every_n_layers", 1)
        recurs = (p for p in range(1, depth) if all(looks[i] == looks[i - p] for i in range(p, depth)))
        return math.lcm(next(recurs, depth), every if self.args.activation_checkpointing else 1)

    def trace(self, rows: int, tokens: int, counted: int | None = None, rates: Rates | None = None) -> StepCost:
        """The cost of a step; that of a stack that was made shallow is not complete."""
        import torch

        from ..cost.roofline import Clock
        from ..cost.trace import MAPPED, WEIGHTS, Step, live, trace_steps
        from ..engine.prepare import prepared

        model, recipe = self.model, self.recipe
        patched = {_key(t) for t in (*model.parameters(), *model.buffers())}
        aside = [t for key, t in self.base.items() if key not in patched]  # originals that a patch keeps to revert
        model.train()
        self._checkpointing()
        clock = None if rates is None else Clock(rates)
        if not self.real:  # real work on tables is traced
            for store in self.stores:
                store.clock = clock
        plain = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, compile=False))
        with prepared(model, self.objective, plain):
            if recipe.load_place().device.type != "cpu":  # the efficient attention is the CPU's
                model.set_attn_implementation("sdpa")
            cost = trace_steps(Step(
                model, torch.device("cpu"), functools.partial(self.batch, rows, tokens), self.loss,
                self.optimizer, self.kind_of, self._evaluation(tokens),
                micro_batches=self.args.gradient_accumulation_steps, clip=self.args.max_grad_norm or 0.0,
                counted=None if counted is None else rows * counted, clock=clock,
                full_rows=bool(getattr(self.args, "packing", False)),
            ), fake=not self.real)  # fmt: skip
        if rates is not None and not self.real:
            cost = self._with_row_updates(cost, rates)
        for kinds in cost.peaks.values():
            for tensor in aside:
                kind = MAPPED if self.mapped and _key(tensor) in self.in_file else WEIGHTS
                kinds[kind] = kinds.get(kind, 0) + tensor.untyped_storage().nbytes()
        assert all(live(kinds) >= 0 for kinds in cost.peaks.values())
        return cost if self.blocks is not None else self.complete(cost)

    def _with_row_updates(self, cost: StepCost, rates: Rates) -> StepCost:
        """Adds the seconds in which the rows of tables step, which the trace does not see; where they are not known,
        those of the whole step are not."""
        from ..cost.roofline import row_update
        from ..cost.trace import OPTIMISER
        from ..tiered.expected import expected_rows
        from ..tiered.record import VALUES

        seconds, written = dict(cost.seconds or {}), 0.0
        for store in self.stores:
            tokens, probes = store.asked
            if not tokens or not store.optimiser.plain:
                return dataclasses.replace(cost, seconds=None)
            many = expected_rows(store, tokens, probes, self.args.gradient_accumulation_steps)
            update = row_update(rates, store.parts[VALUES].nbytes, many, store.optimiser.copies)
            seconds[OPTIMISER] = seconds.get(OPTIMISER, 0.0) + update
            written += many * store.extent if store.slow == "disk" else 0.0
        return dataclasses.replace(cost, seconds=seconds, written=written)

    def kind_of(self, name: str, tensor: Any) -> str:
        from ..cost.trace import ADAPTER, MAPPED, WEIGHTS

        if _key(tensor) not in self.base:
            return ADAPTER
        if _key(tensor) not in self.in_file:
            return ADAPTER if tensor.requires_grad else WEIGHTS
        return MAPPED if self.mapped and tensor.is_floating_point() else WEIGHTS  # packed ones are made, not mapped

    def batch(self, rows: int, tokens: int) -> dict[str, Any]:
        """Ids and labels (rows, tokens) as the collators make them: padded, packed with positions, or full rows."""
        import torch

        from ..engine.prepare import BLOCK

        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        if self.real:  # where values decide which operations run, ids should differ
            ids.random_(self.model.config.get_text_config().vocab_size)
        if self.objective.task != "causal-lm":
            labels = torch.zeros(rows, dtype=torch.int64)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        made = {"input_ids": ids, "labels": torch.zeros_like(ids)}
        if self.args.padding_free or (self.args.packing and self.args.packing_strategy.startswith("bfd")):
            made["position_ids"] = torch.ones_like(ids)
            if (dtype := getattr(self.args, BLOCK, None)) is not None:
                made["attention_mask"] = torch.zeros(rows, 1, tokens, tokens, dtype=dtype)
        else:
            made["attention_mask"] = torch.ones_like(ids)
        return made

    def _evaluation(self, tokens: int) -> Any:
        """A batch of evaluation; its rows are taken to be as long as those of training."""
        if not self.recipe.data.test or self.args.eval_strategy == "no":
            return None
        return functools.partial(self.batch, self.args.per_device_eval_batch_size, tokens)

    def loss(self, batch: dict[str, Any]) -> Any:
        import torch

        dtype = self.autocast
        with contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
            return self.model(objective_batch=batch)[0]

    def optimizer(self, trained: list[Any]) -> Any:
        from transformers import Trainer

        cls, options = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
        if not cls.__module__.startswith("torch.optim"):
            raise BadInput(
                f"plan training: optim: {self.args.optim}",
                "the planner follows PyTorch's own optimisers only",
                "Remove budget:, or train with adamw_torch",
            )
        return cls(trained, **options)

    @property
    def autocast(self) -> Any:
        """The type that autocast computes the step in, or None."""
        from ..engine.prepare import autocast_dtype

        return autocast_dtype(self.surgeries, self.dtype, self.args.bf16)

    def _checkpointing(self) -> None:
        if not self.args.activation_checkpointing:
            return
        options = dict(self.args.activation_checkpointing_kwargs or {})
        every = options.pop("every_n_layers", 1)
        if options.pop("offload", False):
            raise BadInput(
                "plan activation checkpointing with offload", "the planner does not know it yet", "Remove it"
            )
        self.model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=options or None, every_n_layers=every
        )


def _key(tensor: Any) -> int:
    """Identifies a storage, also one without content."""
    return tensor.untyped_storage()._cdata
