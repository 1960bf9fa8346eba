"""Patches that move the experts of a mixture into a store of two tiers, and choose which have slots of the fast one."""

from __future__ import annotations

import contextlib
import functools
import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Batch, Patch, Place, Surgery, When
from ..cost.experts import Trace, flops_of, makespan, measure
from ..cost.trace import EXPERT_ROWS, EXPERTS
from ..errors import BadInput, nearest
from ..memory.budget import gib
from ..memory.meter import file_ranges, is_mapped
from ..model import experts as interface
from ..model.expert_files import FILES
from ..model.load import base_hash
from ..model.packed_experts import Nf4
from ..model.surgery import Swaps
from ..tiered.expert_layer import ExpertLayer
from ..tiered.experts import ExpertStore, slots_in
from ..tiered.mapped_file import slow_kind
from ..tiered.prefetch import Reader
from ..tiered.residency import Residency, Use
from ..tiered.stand_ins import StandIns


@dataclass(frozen=True)
class ExpertsPatch(Patch):
    """Its outputs are the model's own. `new_residency` chooses the working set."""

    when: ClassVar[When] = When.LOAD
    reads_experts: ClassVar[bool] = True
    exclusive_reason: ClassVar[str] = "one store has the experts"
    shrinkable: ClassVar[tuple[str, ...]] = ("cache",)

    cache: float | None = None  # GiB of fast memory for slots; None: what budget.fast leaves, and 0 without a budget
    prefetch: bool = True  # read the experts that the next layer's router would choose now, while files are read
    precision: str = "auto"  # of the experts: the model's; "nf4" stores 4 bits a weight, which changes the outputs
    stand_in: str = "none"  # "nf4": experts without a slot are replaced by copies in 4 bits, which changes the outputs
    store: str = ""  # a folder that keeps the experts' file for later runs; "": the file ends with the run

    @abstractmethod
    def new_residency(self) -> Residency: ...


class ExpertsSurgery(Surgery):
    """The experts are in `tiers`. Those that were in memory are read into memory again when it is undone."""

    keeps_outputs = True
    patch: ExpertsPatch

    def __init__(self, patch: ExpertsPatch, model: PreTrainedModel, place: Place):
        self.patch, self.model, self.swaps = patch, model, Swaps(model)
        self.name = type(patch).__name__.lower()
        self.found = interface.require_mixtures(model, self.name)
        self.stacked = {path: interface.leaves(module) for path, module in self.found.items()}
        self._check()
        packed = patch.precision == "nf4"
        if packed or patch.stand_in != "none":
            self.starts_at_zero = self.keeps_outputs = False
        self.form = Nf4() if packed else None
        self.files: Any = getattr(model, FILES, None)
        parameters = [parameter for leaves in self.stacked.values() for parameter in leaves.values()]
        self.planned = parameters[0].is_meta and self.files is None
        self.in_slow_tier = [parameter.data for parameter in parameters] if self.planned else []
        self.residency = patch.new_residency()
        self.released: list[tuple[str, str, nn.Parameter, torch.Size]] = []
        self.hash = "" if self.planned else base_hash(model)
        self.tiers = self._new_store(place, place.device if parameters[0].is_meta else parameters[0].device)
        try:
            self._move()
            if patch.stand_in != "none":
                self.tiers.stand_ins = StandIns(self.tiers, Nf4())
            self._take_over()
            self._set_slots()
            self._measure()
        except BaseException:
            self.revert()
            raise
        self.notes = tuple(self._notes())

    def _check(self) -> None:
        for field, known in (("precision", ("auto", "nf4")), ("stand_in", ("none", "nf4"))):
            if (value := getattr(self.patch, field)) not in known:
                raise BadInput(f'{self.name}: {field}: "{value}"', "there is no such choice", nearest(value, known))
        if self.patch.precision == self.patch.stand_in:
            asked = f"{self.name}: stand_in: nf4 with precision: nf4"
            raise BadInput(asked, "all experts are in 4 bits then", "Leave one of them out")
        for path, leaves in self.stacked.items():
            if interface.TIERS in vars(self.found[path]):
                raise BadInput(self.name, f"{path} is in slow memory already", "Apply it once")
            for name, parameter in leaves.items():
                if not parameter.is_floating_point():
                    have = f"{path}.{name} is stored as {str(parameter.dtype).removeprefix('torch.')}"
                    raise BadInput(f"{self.name} on packed experts", have, "Load the model in bf16")

    def _new_store(self, place: Place, device: torch.device) -> ExpertStore:
        shapes = [(len(next(iter(leaves.values()))), {n: (tuple(p.shape[1:]), p.dtype) for n, p in leaves.items()})
                  for leaves in self.stacked.values()]  # fmt: skip
        identity = self.files.fingerprint() if self.files is not None and self.patch.store else self.hash
        return ExpertStore(
            shapes, self.residency, device=device, slow=slow_kind(place.slow, device), folder=place.folder,
            keep=self.patch.store, identity=identity, planned=self.planned,
            reader=Reader() if self.patch.prefetch and not self.planned else None, form=self.form,
        )  # fmt: skip

    def _move(self) -> None:
        """Write the experts to the store, one at a time, and release those that are in memory, a layer at a time."""
        names, mapped = list(self.found), [] if self.planned else file_ranges()

        def tensors(layer: int, expert: int) -> dict[str, Tensor]:
            leaves = self.stacked[path := names[layer]]
            if self.files is not None:
                return {name: self.files.expert(f"{path}.{name}", expert) for name in leaves}
            return {name: parameter[expert] for name, parameter in leaves.items()}

        def written(layer: int) -> None:
            for name, parameter in self.stacked[names[layer]].items():
                kept = self.form is not None  # only the originals have all their bits
                if not kept and not parameter.is_meta and not is_mapped(parameter, mapped):
                    for row in self.tiers.layers[layer].rows:
                        self.tiers.check(row)
                    self.released.append((names[layer], name, parameter, parameter.shape))
                    parameter.data = parameter.data.new_empty(0)

        self.tiers.fill(tensors, written)
        if self.files is not None:
            self.files.close()

    def _take_over(self) -> None:
        """Have the library compute the experts from the store."""
        layers = [ExpertLayer(self.tiers, number) for number in range(len(self.found))]
        for layer, (path, module) in zip(layers, self.found.items(), strict=True):
            self.swaps.on_undo(interface.take_out(module))
            self.swaps.set_attribute(module, interface.TIERS, layer)
            if (router := interface.router_of(self.model, path, layer.experts)) is not None:
                layer.guess = functools.partial(interface.routed, self.model, router)
        for layer, above in itertools.pairwise(layers):
            layer.above, above.below = above, layer
        if not self.planned:
            if not getattr(self.model, "trimtab_base", None):  # its hash covers the experts
                self.swaps.set_attribute(self.model, "trimtab_base", self.hash)
            (path, first), *_ = self.found.items()
            width, dtype = self.model.config.get_text_config().hidden_size, self.model.dtype
            interface.require_same(first, width, dtype, list(self.stacked[path]), self.name)
        self.swaps.set_attribute(self.model, "save_pretrained", self._refuse_to_save)
        had = self.model.config._experts_implementation
        self.model.set_experts_implementation(interface.EXPERTS)
        self.swaps.on_undo(lambda: self.model.set_experts_implementation(had))

    def _refuse_to_save(self, *args: Any, **kwargs: Any) -> None:
        have = "its experts are in slow memory, so the folder would lack them"
        raise BadInput(
            f"save {type(self.model).__name__}", have, f"Revert {self.name} first, or save the adapter alone"
        )

    def _set_slots(self) -> None:
        if self.patch.cache is None:
            return
        size, one = int(self.patch.cache * 2**30), self.tiers.slot_bytes
        if 0 < size < one:
            asked, have = f"{self.name}: cache: {self.patch.cache}", f"one expert needs {gib(one)}"
            raise BadInput(asked, have, "Set cache: 0, which keeps none in fast memory, or allow more")
        self.tiers.resize(slots_in(self.tiers, size))

    def _measure(self) -> None:
        """Beside a GPU: have the costs, measured now, decide for each expert without a slot whether its weights move
        to the GPU or its tokens to the host. Not yet measured on a GPU."""
        store, module = self.tiers, next(iter(self.found.values()))
        if self.planned or store.in_place or module.has_post_expert_norm:
            return
        machine = measure(module, store)

        def choose(needed: Mapping[int, int], done: Use) -> list[int]:
            kept = [row for row, _ in done.moved]
            return makespan(
                machine, store.slot_bytes, flops_of(store), needed, done.hits, kept, done.streamed
            ).rows  # fmt: skip

        store.choose = choose

    def _notes(self) -> Iterator[str]:
        store, layers = self.tiers, len(self.found)
        where = f"{store.rows} experts of {layers} layers are in the slow tier"
        yield f"{self.name}: {where}: {gib(store.table_bytes)}, {gib(store.slot_bytes)} each"
        if self.form is not None:
            yield f"{self.name}: the experts are stored in {self.form.name}, so outputs differ from the model's"
        if store.stand_ins is not None:
            size = gib(store.stand_ins.table.nbytes)
            yield f"{self.name}: experts without a slot are replaced by copies in 4 bits ({size}), so outputs differ"
        if not store.in_place:
            yield f"{self.name}: not yet measured on a GPU"

    def take(self, spare: int) -> int:
        if self.patch.cache is not None:
            return 0
        slots, had = slots_in(self.tiers, spare), self.tiers.slots
        if not had <= slots <= 1.25 * had:  # what is in slots stays there, if their number hardly changes
            self.tiers.resize(slots)
        return self.tiers.slots * self.tiers.slot_bytes

    def outside(self) -> dict[str, list[Tensor]]:
        return {EXPERTS: self.tiers.fast, EXPERT_ROWS: self.tiers.below}

    @torch.no_grad()
    def divergence(self, batches: Iterable[Batch]) -> float:
        """The mean divergence KL(exact || with stand-ins) of the next token's distribution, in nats, over the tokens
        that count."""
        total = count = 0.0
        for batch in batches:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
            ours, had = self.model(**inputs, use_cache=False).logits.float().log_softmax(-1), self.tiers.stand_ins
            try:
                self.tiers.stand_ins = None
                own = self.model(**inputs, use_cache=False).logits.float().log_softmax(-1)
            finally:
                self.tiers.stand_ins = had
            counted = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            total += float(((own.exp() * (own - ours)).sum(-1) * counted).sum())
            count += float(counted.sum())
        return total / max(1.0, count)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[Trace]:
        """Within it, which experts each pass uses is recorded in the trace that it yields (cost/experts.py)."""
        store = self.tiers
        trace = Trace([layer.rows for layer in store.layers], store.slot_bytes, flops_of(store))
        store.trace = trace.steps
        try:
            yield trace
        finally:
            store.trace = None

    def own_tensors(self) -> dict[str, Tensor]:
        return {}

    def merge(self) -> None:
        raise BadInput(f"merge {self.name}", "it changes no weight", "Load the model without it")

    def revert(self) -> None:
        store, names = self.tiers, list(self.found)
        for path, name, parameter, shape in self.released:
            whole = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
            for expert, row in enumerate(store.layers[names.index(path)].rows):
                whole[expert] = store.original(row)[name]
            parameter.data = whole
        self.released.clear()
        self.swaps.undo()
        if store.reader is not None:
            store.reader.close()
        store.drop()
