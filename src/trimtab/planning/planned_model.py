"""The patched model that the planner traces, built from its config on the `meta` device without reading weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..errors import Untraceable
from ..recipe import Recipe

if TYPE_CHECKING:
    from ..contracts import Patch, Surgery, When
    from ..cost.trace import Peaks, StepCost

SHALLOW = 2  # blocks of the shallow model; a second has twice as many, and deeper ones are extrapolated from the two


class PlannedModel:
    """`blocks`: its depth (None: that of its config). `real`: with its weights. `head`: the transformers head, with
    `labels` outputs."""

    def __init__(
        self, recipe: Recipe, blocks: int | None, real: bool = False, head: str = "causal-lm",
        labels: int | None = None,
    ):  # fmt: skip
        from ..model import anatomy
        from ..model.kept_rows import IN_FILE
        from ..model.load import assembled, empty_model, left_dense, load_model

        self.recipe, self.blocks, self.real, self.head = recipe, blocks, real, head
        self.model, self.mapped = empty_model(recipe.model, task=head, blocks=blocks, labels=labels)
        if real:
            self.model = load_model(recipe.model, task=head, labels=labels, experts=recipe.with_experts)[0]
        self.left_dense = left_dense(self.model)
        self.dtype = self.model.dtype
        # `.data` keeps the storage alive when a patch replaces it in the parameter
        self.base = {_key(t): t.data for t in (*self.model.parameters(), *self.model.buffers())}
        fresh = [] if head == "causal-lm" else anatomy.fresh_parameters(self.model).values()
        copies = [*fresh, *assembled(self.model, recipe.model)]
        self.in_file = {_key(p) for p in self.model.parameters()} - {_key(p) for p in copies}
        self.mapped = self.mapped and recipe.place.device.type == "cpu"  # another device gets copies
        for parameter in self.model.parameters():
            mapped = self.mapped and _key(parameter) in self.in_file and parameter.is_floating_point()
            setattr(parameter, IN_FILE, mapped)
        self.surgeries: list[Surgery] = []
        self.between: dict[int, Any] = {}  # weak references to storages that slimming patches put into the model

    def patch(self, patches: Iterable[Patch], phase: When, *parts: Any) -> None:
        """Applies the patches that act in `phase`, and the surgeries of `parts` (stepper, objective)."""
        from ..engine.patching import apply_patches, prepare

        try:
            self.surgeries += apply_patches(self.model, patches, self.recipe.place, phase, applied=self._applied)
            self.surgeries += prepare(self.model, *parts)
        except (RuntimeError, NotImplementedError) as error:  # a library's code may read values
            why = f"the patch cannot be applied to a model without values ({' '.join(str(error).split())[:120]})"
            raise Untraceable(f"plan {', '.join(map(str, self.recipe.patches))}", why, "Remove budget:") from error

    def _applied(self, surgery: Surgery) -> None:
        import torch

        from ..contracts import When

        if self.real and surgery.patch.counts_tokens:  # the number of rows is known, and their ids do not matter
            surgery.calibrate([{"input_ids": torch.arange(self.model.config.get_text_config().vocab_size)}])
        if surgery.patch.when is When.LOAD:  # these count as its own
            for tensor in surgery.in_slow_tier:
                self.base.pop(_key(tensor), None)
        if surgery.patch.when is When.BOTH:
            self.between |= {_key(p): weakref.ref(p.untyped_storage()) for p in self.model.parameters()}

    @property
    def notes(self) -> list[str]:
        """Notes for the user on how the patches are applied."""
        from ..artifacts.run_folder import place_of
        from ..engine.tables import notes_of

        return [*self.left_dense, *notes_of(self.surgeries, str(place_of(self.recipe).folder))]

    @property
    def stores(self) -> list[Any]:
        return [store for surgery in self.surgeries for store in surgery.stores]

    def kept(self) -> list[tuple[str, int]]:
        """(kind, bytes) of each tensor that a patch keeps outside the model: base tensors that it replaced, for
        reverting, and its own tensors that are not parameters. Call it before the trace."""
        from ..contracts import When
        from ..cost.trace import ADAPTER, MAPPED, WEIGHTS

        inside = {_key(t) for t in (*self.model.parameters(), *self.model.buffers())}
        slimming = (surgery for surgery in self.surgeries if surgery.patch.when is When.BOTH)
        own = [tensor for surgery in slimming for tensor in surgery.own_tensors().values()]
        found = {_key(t): (ADAPTER, t.untyped_storage()) for t in own}
        kinds = {key: MAPPED if key in self._moved() else WEIGHTS for key in self.between}
        found |= {key: (kinds[key], s) for key, ref in self.between.items() if (s := ref()) is not None}
        for key, tensor in self.base.items():
            slow = (self.mapped and key in self.in_file) or key in self._moved()
            found[key] = (MAPPED if slow else WEIGHTS, tensor.untyped_storage())
        return [(kind, storage.nbytes()) for key, (kind, storage) in found.items() if key not in inside]

    def _moved(self) -> set[int]:
        """Storages of the base that patches have moved to the slow tier."""
        return {_key(tensor) for surgery in self.surgeries for tensor in surgery.in_slow_tier}

    def with_kept(self, peaks: Peaks, kept: list[tuple[str, int]]) -> None:
        """Adds the result of `kept` to each phase."""
        from ..cost.trace import live

        for kinds in peaks.values():
            for kind, size in kept:
                kinds[kind] = kinds.get(kind, 0) + size
        assert all(live(kinds) >= 0 for kinds in peaks.values())

    def with_tables(self, peaks: Peaks) -> None:
        """Adds the bytes of the tables to each phase. They are not linear in the depth: the layers share a cache."""
        from ..cost.trace import ADAPTER, ROWS

        for kinds in peaks.values():
            for store in self.stores:
                kinds[ADAPTER] = kinds.get(ADAPTER, 0) + store.nbytes["fast"]
                kinds[ROWS] = kinds.get(ROWS, 0) + store.nbytes["slow"]
            for kind, tensors in ((kind, ts) for surgery in self.surgeries for kind, ts in surgery.outside().items()):
                kinds[kind] = kinds.get(kind, 0) + sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def take(self, spare: int) -> int:
        """How many of `spare` bytes of the fast tier the patches would use."""
        return taken(self.surgeries, spare)

    def period(self) -> int:
        """The number of blocks after which their kinds repeat: 1 if all are equal, the depth if they never repeat."""
        from ..model import anatomy

        stack = anatomy.blocks(self.model)[1]
        depth = len(stack)
        types = getattr(self.model.config.get_text_config(), "layer_types", None) or [None] * depth
        looks = [
            (kind, *((n, t.shape, t.dtype, t.requires_grad) for n, t in block.named_parameters()))
            for kind, block in zip(types, stack, strict=True)
        ]
        recurs = (p for p in range(1, depth) if all(looks[i] == looks[i - p] for i in range(p, depth)))
        return next(recurs, depth)

    def kind_of(self, name: str, tensor: Any) -> str:
        from ..cost.trace import ADAPTER, MAPPED, OFFLOADED, WEIGHTS

        if _key(tensor) in self._moved():
            return MAPPED
        if any(name in surgery.offloaded.parameters for surgery in self.surgeries if surgery.offloaded):
            return OFFLOADED
        if _key(tensor) not in self.base:
            return ADAPTER
        if _key(tensor) not in self.in_file:
            return ADAPTER if tensor.requires_grad else WEIGHTS
        return MAPPED if self.mapped and tensor.is_floating_point() else WEIGHTS  # packed weights are copies


def taken(surgeries: Iterable[Surgery], spare: int) -> int:
    """The bytes that the surgeries use of `spare` bytes of the fast tier."""
    used = 0
    for surgery in surgeries:
        used += surgery.take(spare - used)
    return used


def at_whole_depth(make: Callable[[int | None], Any], trace: Callable[[Any], StepCost]) -> StepCost:
    """The cost that `trace` finds for `make(None)`, the model at its full depth; extrapolated from two shallow models
    if the kinds of blocks repeat. `make`: blocks -> a PlannedModel."""
    from ..cost.trace import extend
    from ..model import anatomy

    whole = make(None)
    depth, period = len(anatomy.blocks(whole.model)[1]), whole.period()
    low = SHALLOW if period == 1 else period + depth % period
    shallow = (low, low + SHALLOW * period)
    if depth <= shallow[1]:
        return whole.complete(trace(whole))
    return whole.complete(extend(*(trace(make(n)) for n in shallow), shallow, depth))


def _key(tensor: Any) -> int:
    """Identifies a storage, also one on `meta`."""
    return tensor.untyped_storage()._cdata
