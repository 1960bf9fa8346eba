"""Rehearsal: rows of earlier stages, kept within a budget of bytes and mixed into each batch of a later stage.

Rows are kept as they were trained on: token ids (2 bytes each where the vocabulary allows, else 4), one bit per token
for whether it counts in the loss, and 20 bytes for length, task and key. So a chat template or other columns of an
earlier task do not matter.

    reservoir   each row of any task is kept with the same chance. A row's key is a random number; kept are the rows of
                the smallest keys that fit the budget together. This is Vitter's reservoir (1985) for a budget of bytes:
                it does not depend on the order of the rows.
    ring        an equal share of the bytes per task, with each task's newest rows (Lopez-Paz and Ranzato, 1706.08840)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ..errors import BadInput
from ..files import writing

PER_ROW = 20  # bytes of a row beside its tokens: key 8, length 4, task 4, position 4


@dataclass
class Rows:
    """Rows of tokens. `ids[i]`, `counts[i]`: of row i, shape (tokens,); `tasks[i]`, `places[i]`: the stage and the
    position in its data; `keys[i]`: a random number in [0, 1)."""

    ids: list[numpy.ndarray] = field(default_factory=list)
    counts: list[numpy.ndarray] = field(default_factory=list)  # booleans
    tasks: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    keys: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def picked(self, order: list[int]) -> Rows:
        return Rows(*([getattr(self, f.name)[i] for i in order] for f in dataclasses.fields(self)))

    def joined(self, other: Rows) -> Rows:
        return Rows(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class Rehearsal:
    """What one stage does: mixes in the rows of the file `before`, and keeps its own with them in the file `after`.

    `budget`: bytes. `mix`: the share of the rows of a step that are earlier ones. `task`: the stage's number.
    """

    budget: int
    policy: str
    mix: float
    task: int
    before: Path | None = None
    after: Path | None = None

    def mix_into(self, trainer: Any) -> int:
        """Add the kept rows behind the trainer's own, to be mixed in by its sampler; -> how many."""
        own = trainer.train_dataset
        if "labels" not in own.column_names or getattr(trainer, "padding_free", False) or trainer.args.packing:
            have = "only rows of a language model are kept, each for itself"
            raise BadInput("rehearsal", have, "Set objective: causal_lm, and remove packing")
        if trainer.args.train_sampling_strategy != "random":
            have = f"train_sampling_strategy is {trainer.args.train_sampling_strategy}"
            raise BadInput("rehearsal", have, "Leave it out: rows are mixed in a random order")
        sizes = [row_bytes(len(row), wide(trainer)) for row in own["input_ids"]]
        if self.before is None and min(sizes) > self.budget:
            have = f"the shortest row of stage {self.task} needs {min(sizes):,}"
            raise BadInput(f"rehearsal: budget: {self.budget:,} bytes", have, "Raise it")
        if self.before is None:
            return 0
        rows = read(self.before)
        trainer.rehearsed = (len(own), self.mix)
        trainer.train_dataset = _beside(own, rows)
        return len(rows)

    def keep(self, trainer: Any) -> Rows:
        """Write the rows that later stages rehearse: those kept so far and this stage's own, within the budget."""
        assert self.after is not None, "a stage that keeps rows says where"
        own, count = trainer.train_dataset, (trainer.rehearsed or (len(trainer.train_dataset), 0))[0]
        seed = trainer.args.seed
        made = Rows()
        keys = numpy.random.default_rng((seed, self.task)).random(count)
        for place in range(count):
            row = own[place]
            made.ids.append(numpy.asarray(row["input_ids"], dtype=numpy.uint32))
            made.counts.append(numpy.asarray(row["labels"]) != -100)
            made.tasks.append(self.task)
            made.places.append(place)
            made.keys.append(float(keys[place]))
        every = read(self.before).joined(made) if self.before else made
        kept = choose(every, self.budget, self.policy, wide(trainer))
        write(self.after, kept, wide(trainer), count + (seen(self.before) if self.before else 0))
        return kept


def wide(trainer: Any) -> bool:
    """Whether a token id needs 4 bytes."""
    return len(trainer.processing_class) > 2**16


def row_bytes(tokens: int, four: bool) -> int:
    return tokens * (4 if four else 2) + -(-tokens // 8) + PER_ROW


def choose(rows: Rows, budget: int, policy: str, four: bool = False) -> Rows:
    """The rows that are kept within `budget` bytes, in the order of their tasks and positions.

    A row that was left out before does not come back: for the reservoir, all keys up to that of the first row that does
    not fit are kept, and what it leaves free is not given to later ones.
    """
    sizes = [row_bytes(len(ids), four) for ids in rows.ids]
    chosen: list[int] = []
    tasks = sorted(set(rows.tasks))
    if policy == "reservoir":
        groups = [(budget, sorted(range(len(rows)), key=lambda i: rows.keys[i]))]
    else:
        newest = lambda task: [i for i in reversed(range(len(rows))) if rows.tasks[i] == task]  # noqa: E731
        groups = [(budget // max(1, len(tasks)), newest(task)) for task in tasks]
    for room, order in groups:
        for i in order:
            room -= sizes[i]
            if room < 0:
                break
            chosen.append(i)
    return rows.picked(sorted(chosen, key=lambda i: (rows.tasks[i], rows.places[i])))


def nbytes(rows: Rows, four: bool = False) -> int:
    return sum(row_bytes(len(ids), four) for ids in rows.ids)


# --- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, rows: Rows, four: bool, seen: int = 0) -> None:
    """Write the rows; the file has the bytes that they count, and a header. `seen`: of how many they were chosen."""
    bits = numpy.concatenate([numpy.packbits(row) for row in rows.counts] or [numpy.zeros(0, numpy.uint8)])
    ids = numpy.concatenate(rows.ids or [numpy.zeros(0)]).astype(numpy.uint32 if four else numpy.uint16)
    parts = {
        "ids": ids, "counts": bits, "lengths": numpy.array([len(row) for row in rows.ids], dtype=numpy.int32),
        "tasks": numpy.array(rows.tasks, dtype=numpy.int32), "places": numpy.array(rows.places, dtype=numpy.int32),
        "keys": numpy.array(rows.keys, dtype=numpy.float64),
    }  # fmt: skip
    partial = path.with_name(f".{path.name}.partial")
    with writing(f"write {path}", "Free some space and resume"):
        save_file(parts, partial, {"seen": str(seen)})
        partial.replace(path)


def read(path: Path) -> Rows:
    """The rows of a file. BadInput for one that is damaged."""
    try:
        parts = load_file(path)
        lengths = parts["lengths"].tolist()
        ends = numpy.cumsum([0, *lengths])
        bits = numpy.cumsum([0, *(-(-size // 8) for size in lengths)])
        ids = [parts["ids"][a:b].astype(numpy.uint32) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        counts = [
            numpy.unpackbits(parts["counts"][a:b], count=size).astype(bool)
            for a, b, size in zip(bits[:-1], bits[1:], lengths, strict=True)
        ]
        if [len(row) for row in ids] != lengths or [len(row) for row in counts] != lengths:
            raise ValueError("it is too short")
        return Rows(ids, counts, parts["tasks"].tolist(), parts["places"].tolist(), parts["keys"].tolist())
    except Exception as error:  # numpy and safetensors raise their own types
        raise BadInput(f"rehearse {path}", f"it cannot be read ({error})", "Start again with overwrite=true") from None


def seen(path: Path) -> int:
    """Of how many rows those of a file were chosen."""
    with safe_open(path, framework="numpy") as opened:
        return int(opened.metadata()["seen"])


def summary(path: Path) -> dict[str, int]:
    """How many rows a file has, of how many, and their bytes."""
    rows = read(path)
    with safe_open(path, framework="numpy") as opened:
        four = opened.get_slice("ids").get_dtype() == "U32"
    return {"rows": len(rows), "seen": seen(path), "bytes": nbytes(rows, four)}


def _beside(own: Any, rows: Rows) -> Any:
    """The data set `own` with `rows` behind it, in its columns."""
    from datasets import Dataset, concatenate_datasets

    columns: dict[str, list[Any]] = {name: [] for name in own.column_names}
    for ids, counts in zip(rows.ids, rows.counts, strict=True):
        made = {
            "input_ids": ids.tolist(), "labels": numpy.where(counts, ids.astype(numpy.int64), -100).tolist(),
            "attention_mask": [1] * len(ids), **dict.fromkeys(("completion_mask", "assistant_masks"), counts.tolist()),
        }  # fmt: skip
        for name, column in columns.items():
            column.append(made.get(name))
    return concatenate_datasets([own, Dataset.from_dict(columns, features=own.features)])
