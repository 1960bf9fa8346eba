"""Fiddler: CPU-GPU Orchestration for Fast Inference of Mixture-of-Experts Models (Kamahori et al., ICLR 2025,
arXiv 2402.07033).

The experts of a mixture are most of its weights, and a token uses few of them. So attention, router, norms, embeddings
and head stay in fast memory, and the experts in slow memory. A working set of them has slots in fast memory. Outputs
are the model's own, whatever is where.

    s_j = number of tokens of a pass whose router chose expert j; those with s_j = 0 are not touched, and of the others
    (a) j has a slot                               it is used there
    (b) j has none, but the working set wants it   it is read into a slot, whose expert leaves
    (c) j has none                                 it is used from slow memory, and nothing leaves
        beside a GPU, the k of these with the most tokens move to it and the host computes the others; of all k, the one
        with the least max(GPU, link, host) of their seconds (cost/experts.py)

Which experts have slots (the paper's is the first):

    popular   those with the most hits in calibration text, over all layers; they never change
    lru       in each layer, those used last (Eliseev and Mazur 2023)
    dynamic   over all layers, those with the highest decayed count
              c_j <- d^N c_j + s_j / N * (1 - d^N) / (1 - d)   after N tokens: what N tokens in turn, each with the
              share s_j / N, would add. j takes the slot of i if c_j > (1 + h) c_i

    d: decay, from `halflife`   h: `hysteresis`

What differs from the paper, and why:
- The slow tier here is a file below RAM, or RAM below a GPU. A disk cannot compute, so the paper's choice to run an
  expert on the CPU beside the weights does not exist below RAM. There a CPU uses an expert without a slot where its
  file is mapped: the kernel reads the pages that are missing, and no memory of the process is used.
- The paper adds the costs of a layer's experts, with a CPU's in proportion to tokens. Here GPU, link and host work at
  the same time, and each cost is a roofline, measured when the patch is applied. Not yet measured on a GPU.
- The file has one record for each expert, made from the checkpoint one expert at a time: the library's loader stacks
  them, which takes twice the memory.
- Popularity is nearly flat in Mixtral (the authors' counts: 25 % of hits where 22 % are expected from chance), and
  successors gain more from a working set that follows the text. So `dynamic` is the default.
- The authors' beam search continues each beam greedily; here beams, padding and batches are transformers' own.
- While files are read, the next layer's router is applied to this layer's input, and the experts that it would choose
  are read ahead (Eliseev and Mazur); the backward pass reads those that the layer below has used.
- It also serves training of what is not in the experts (LoRA, PaCA): they are frozen, the backward pass uses them
  again, layer by layer, and between the passes only the layers' inputs are stored.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel

from ..bases.experts import ExpertsPatch, ExpertsSurgery
from ..contracts import Batch, Place
from ..errors import BadInput, nearest
from ..tiered.residency import FREE, Residency


@dataclass(frozen=True)
class Fiddler(ExpertsPatch):
    """Keep the experts of a mixture in slow memory, and a working set of them in fast memory."""

    paper: ClassVar[str] = "2402.07033"

    residency: str = "dynamic"  # which experts have slots: "dynamic", "popular" (the paper) or "lru"
    halflife: int = 32  # dynamic: tokens after which a hit counts half
    hysteresis: float = 0.2  # dynamic: by what share a count must exceed that of the expert whose slot it takes
    rows: int = 64  # rows of text for popular, whose routing is counted, and for stand_in, whose effect is measured
    calibration: str = ""  # the file of these rows, as data.train; "": data.train itself

    @property
    def calibration_rows(self) -> int:
        return self.rows if self.residency == "popular" or self.stand_in != "none" else 0

    @property
    def calibration_file(self) -> str:
        return self.calibration

    def apply(self, model: PreTrainedModel, place: Place) -> FiddlerSurgery:
        self._check()
        return FiddlerSurgery(self, model, place)

    def new_residency(self) -> Residency:
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


class FiddlerSurgery(ExpertsSurgery):
    patch: Fiddler

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Counts which experts the rows use, and how much stand-ins change the outputs."""
        batches = list(batches)
        if isinstance(self.residency, Popular):
            self.residency.counting = True
            for batch in batches:
                inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
                self.model(**inputs, use_cache=False)
            self.residency.counting = False
            self.tiers.resize(self.tiers.slots)
        if self.tiers.stand_ins is not None:
            found = self.divergence(batches)
            self.notes = (*self.notes, f"fiddler: stand-ins: KL {found:.2g} nats a token, of {self.patch.rows} rows")
