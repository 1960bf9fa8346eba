"""Fiddler: CPU-GPU Orchestration for Fast Inference of Mixture-of-Experts Models (Kamahori et al., ICLR 2025,
arXiv 2402.07033).

The experts of a mixture are most of its weights, and a token uses few of them. So attention, router, norms, embeddings
and head stay in fast memory, and the experts in slow memory. A working set of them has slots in fast memory. Outputs
are the model's own, whatever is where.

    s_j = number of tokens whose router chose expert j        (section 3.2)
    experts with s_j = 0 are not touched; of the others:
    j has a slot                  -> it is used there
    j has none, and the working set wants it   -> it is read into a slot, whose expert leaves
    j has none                    -> it is used from slow memory, and nothing leaves

Which experts have slots (section 3.4 has the first):

    popular   those with the most hits in calibration text, over all layers; they never change
    lru       in each layer, those used last (Eliseev and Mazur 2023)
    dynamic   over all layers, those with the highest decayed count
              c_j <- d^N c_j + s_j / N * (1 - d^N) / (1 - d)   after N tokens: what N tokens in turn, each with the
              share s_j / N, would add. j takes the slot of i if c_j > (1 + h) c_i

    d: decay, from `halflife`   h: `hysteresis`

What differs from the paper, and why:
- The slow tier here is a file below RAM, or RAM below a GPU. A disk cannot compute, so the paper's choice (c), to run
  an expert on the CPU beside the weights, does not exist below RAM. There a CPU uses an expert without a slot where its
  file is mapped: the kernel reads the pages that are missing, and no memory of the process is used.
- The file has one record for each expert, made from the checkpoint one expert at a time: the library's loader stacks
  them, which takes twice the memory.
- Popularity is nearly flat in Mixtral (the authors' counts: 25 % of hits where 22 % are expected from chance), and
  successors gain more from a working set that follows the text. So `dynamic` is the default.
- The authors' beam search continues each beam greedily; here beams, padding and batches are transformers' own.
- It also serves training of what is not in the experts (LoRA, PaCA): they are frozen, the backward pass uses them
  again, layer by layer, and between the passes only the layers' inputs are stored.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Batch, Patch, Place, Surgery, When
from ..cost.trace import EXPERT_ROWS, EXPERTS
from ..errors import BadInput, nearest
from ..memory.budget import gib
from ..memory.meter import file_ranges, is_mapped
from ..model import experts as interface
from ..model.expert_files import FILES
from ..model.load import base_hash
from ..model.surgery import Swaps
from ..tiered.experts import FREE, ExpertLayer, ExpertStore, Residency, slots_in
from ..tiered.mapped_file import slow_kind


@dataclass(frozen=True)
class Fiddler(Patch):
    """Keep the experts of a mixture in slow memory, and a working set of them in fast memory (section 3)."""

    paper: ClassVar[str] = "2402.07033"
    when: ClassVar[When] = When.LOAD
    reads_experts: ClassVar[bool] = True
    exclusive_reason: ClassVar[str] = "one store has the experts"

    residency: str = "dynamic"  # which experts have slots: "dynamic", "popular" (the paper) or "lru"
    cache: float | None = None  # GiB of fast memory for slots; None: what budget.fast leaves, and 0 without a budget
    store: str = ""  # a folder that keeps the experts' file for later runs; "": the file ends with the run
    halflife: int = 64  # dynamic: tokens after which a hit counts half
    hysteresis: float = 0.2  # dynamic: by what share a count must exceed that of the expert whose slot it takes
    rows: int = 64  # popular: rows of text whose routing is counted
    calibration: str = ""  # popular: the file of these rows, as data.train; "": data.train itself

    @property
    def calibration_rows(self) -> int:
        return self.rows if self.residency == "popular" else 0

    @property
    def calibration_file(self) -> str:
        return self.calibration

    def apply(self, model: PreTrainedModel, place: Place) -> FiddlerSurgery:
        self._check()
        found = interface.require_mixtures(model, "fiddler")
        for path, module in found.items():
            if interface.TIERS in vars(module):
                raise BadInput("fiddler", f"{path} is in slow memory already", "Apply it once")
            for name, parameter in interface.leaves(module).items():
                if not parameter.is_floating_point():
                    have = f"{path}.{name} is stored as {str(parameter.dtype).removeprefix('torch.')}"
                    raise BadInput("fiddler on packed experts", have, "Load the model in bf16")
        surgery = FiddlerSurgery(self, model, found, place)
        try:
            surgery.put()
        except BaseException:
            surgery.revert()
            raise
        return surgery

    def make_residency(self) -> Residency:
        if self.residency == "dynamic":
            return Dynamic(0.5 ** (1 / self.halflife), self.hysteresis)
        return Popular() if self.residency == "popular" else LeastRecentlyUsed()

    def _check(self) -> None:
        if self.residency not in (known := ("dynamic", "popular", "lru")):
            asked = f'fiddler: residency: "{self.residency}"'
            raise BadInput(asked, "there is no such choice", nearest(self.residency, known))
        for name, least in (("halflife", 1), ("hysteresis", 0), ("rows", 1), ("cache", 0)):
            if (value := getattr(self, name)) is not None and not least <= value < float("inf"):
                do = f"Set {name}: {getattr(Fiddler, name)}" if name != "cache" else "Leave it out"
                raise BadInput(f"fiddler: {name}: {value}", f"it must be {least} or more", do)


# --- residency --------------------------------------------------------------------------------------------------------


class Popular(Residency):
    """Slots go to the rows with the most hits in calibration text."""

    def __init__(self) -> None:
        self.hits: np.ndarray | None = None
        self.counting = False
        self.chosen: set[int] = set()

    def begin(self, layers: Sequence[range], slots: int) -> None:
        super().begin(layers, slots)
        if self.hits is None:
            self.hits = np.zeros(layers[-1].stop)
        self.chosen = set(np.argsort(-self.hits, kind="stable")[:slots].tolist())

    def seen(self, layer: int, counts: Mapping[int, int], tokens: int) -> None:
        if self.counting and self.hits is not None:
            for row, count in counts.items():
                self.hits[row] += count

    def place(self, row: int, resident: Mapping[int, int], pinned: set[int]) -> int | None:
        return FREE if row in self.chosen else None


class LeastRecentlyUsed(Residency):
    """Each layer has its share of the slots. A stack visits its layers in turn, so slots for all layers together would
    lose every expert before its next use."""

    def begin(self, layers: Sequence[range], slots: int) -> None:
        super().begin(layers, slots)
        self.of_row = [number for number, rows in enumerate(layers) for _ in rows]
        share, more = divmod(slots, len(layers))
        self.most = [share + (number < more) for number in range(len(layers))]
        self.held: list[OrderedDict[int, None]] = [OrderedDict() for _ in layers]  # least recently used first

    def used(self, row: int) -> None:
        self.held[self.of_row[row]].move_to_end(row)

    def place(self, row: int, resident: Mapping[int, int], pinned: set[int]) -> int | None:
        held = self.held[number := self.of_row[row]]
        evicted: int | None = FREE
        if len(held) >= self.most[number]:
            evicted = next((other for other in held if other not in pinned), None)
            if evicted is None:
                return None
            del held[evicted]
        held[row] = None
        return evicted


class Dynamic(Residency):
    """Slots go to the rows with the highest decayed count."""

    def __init__(self, decay: float, hysteresis: float):
        self.decay, self.hysteresis = decay, hysteresis
        self.counts: np.ndarray | None = None

    def begin(self, layers: Sequence[range], slots: int) -> None:
        super().begin(layers, slots)
        if self.counts is None:
            self.counts = np.zeros(layers[-1].stop)
        self.held = np.zeros(layers[-1].stop, dtype=bool)

    def seen(self, layer: int, counts: Mapping[int, int], tokens: int) -> None:
        assert self.counts is not None
        rows = self.layers[layer]
        kept = self.decay**tokens
        self.counts[rows.start : rows.stop] *= kept
        for row, count in counts.items():
            self.counts[row] += count / tokens * (1 - kept) / (1 - self.decay)

    def place(self, row: int, resident: Mapping[int, int], pinned: set[int]) -> int | None:
        assert self.counts is not None
        evicted = FREE
        if len(resident) >= self.slots:
            there = np.where(self.held, self.counts, np.inf)
            there[list(pinned)] = np.inf
            evicted = int(there.argmin())
            if not self.counts[row] > (1 + self.hysteresis) * there[evicted]:
                return None
            self.held[evicted] = False
        self.held[row] = True
        return evicted


# --- the surgery ------------------------------------------------------------------------------------------------------


class FiddlerSurgery(Surgery):
    keeps_outputs = True
    patch: Fiddler

    def __init__(self, patch: Fiddler, model: PreTrainedModel, found: dict[str, nn.Module], place: Place):
        self.patch, self.model, self.found = patch, model, found
        self.files: Any = getattr(model, FILES, None)
        self.stacked = {path: interface.leaves(module) for path, module in found.items()}
        parameters = [p for leaves in self.stacked.values() for p in leaves.values()]
        self.in_slow_tier = [parameter.data for parameter in parameters]
        self.planned = parameters[0].is_meta and self.files is None
        device = place.device if parameters[0].is_meta else parameters[0].device
        self.residency, self.swaps = patch.make_residency(), Swaps(model)
        self.released: list[tuple[str, str, nn.Parameter, torch.Size]] = []
        shapes = [(len(next(iter(leaves.values()))), {n: (tuple(p.shape[1:]), p.dtype) for n, p in leaves.items()})
                  for leaves in self.stacked.values()]  # fmt: skip
        self.hash = "" if self.planned else base_hash(model)
        identity = self.files.fingerprint() if self.files is not None and patch.store else self.hash
        self.tiers = ExpertStore(
            shapes, self.residency, device=device, slow=slow_kind(place.slow, device), folder=place.folder,
            keep=patch.store, identity=identity, planned=self.planned,
        )  # fmt: skip
        self.notes = tuple(self._notes())

    def _notes(self) -> Iterable[str]:
        store, layers = self.tiers, len(self.found)
        yield (f"fiddler: {store.rows} experts of {layers} layers are in the slow tier: {gib(store.table_bytes)}, "
               f"{gib(store.slot_bytes)} each")  # fmt: skip
        if not store.in_place:
            yield "fiddler: not yet measured on a GPU"

    def put(self) -> None:
        """Move the experts to the store, and have the library compute them from there."""
        store, names = self.tiers, list(self.found)
        mapped = [] if self.planned else file_ranges()

        def tensors(layer: int, expert: int) -> dict[str, Tensor]:
            path = names[layer]
            if self.files is not None:
                return {name: self.files.expert(f"{path}.{name}", expert) for name in self.stacked[path]}
            return {name: parameter[expert] for name, parameter in self.stacked[path].items()}

        def written(layer: int) -> None:
            for name, parameter in self.stacked[names[layer]].items():
                if not parameter.is_meta and not is_mapped(parameter, mapped):
                    self.released.append((names[layer], name, parameter, parameter.shape))
                    parameter.data = parameter.data.new_empty(0)

        self.in_slow_tier = self.in_slow_tier if self.planned else []
        store.fill(tensors, written)
        if self.files is not None:
            self.files.close()
        for number, module in enumerate(self.found.values()):
            self.swaps.on_undo(interface.take_out(module))
            self.swaps.set_attribute(module, interface.TIERS, ExpertLayer(store, number))
        if not self.planned:
            if not getattr(self.model, "trimtab_base", None):
                self.swaps.set_attribute(self.model, "trimtab_base", self.hash)
            first = next(iter(self.found.values()))
            width, dtype = self.model.config.get_text_config().hidden_size, self.model.dtype
            interface.require_same(first, width, dtype, list(self.stacked[names[0]]), "fiddler")
            store.traffic.clear()
        had = self.model.config._experts_implementation
        self.model.set_experts_implementation(interface.EXPERTS)
        self.swaps.on_undo(lambda: self.model.set_experts_implementation(had))
        if self.patch.cache is not None:
            size = int(self.patch.cache * 2**30)
            if 0 < size < store.slot_bytes:
                asked, have = f"fiddler: cache: {self.patch.cache}", f"one expert needs {gib(store.slot_bytes)}"
                raise BadInput(asked, have, "Set cache: 0, which keeps none in fast memory, or allow more")
            store.resize(slots_in(store, size))

    def take(self, spare: int) -> int:
        if self.patch.cache is None:
            self.tiers.resize(slots_in(self.tiers, spare))
        return 0 if self.patch.cache is not None else self.tiers.slots * self.tiers.slot_bytes

    def outside(self) -> dict[str, list[Tensor]]:
        return {EXPERTS: self.tiers.fast, EXPERT_ROWS: self.tiers.below}

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Counts which experts the rows use."""
        assert isinstance(self.residency, Popular)
        self.residency.counting = True
        for batch in batches:
            self.model(**{key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}, use_cache=False)
        self.residency.counting = False
        self.tiers.resize(self.tiers.slots)

    def own_tensors(self) -> dict[str, Tensor]:
        return {}

    def merge(self) -> None:
        raise BadInput("merge Fiddler", "it changes no weight", "Load the model without it")

    def revert(self) -> None:
        """Undo it; experts that were in memory before are read into memory again."""
        store, names = self.tiers, list(self.found)
        for path, name, parameter, shape in self.released:
            layer = store.layers[names.index(path)]
            whole = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
            for expert, row in enumerate(layer.rows):
                whole[expert] = store.original(row)[name]
            parameter.data = whole
        self.released.clear()
        self.swaps.undo()
        store.drop()
