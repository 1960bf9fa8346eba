"""Rehearsal: rows of earlier stages, kept within a budget of bytes and mixed into each batch of a later stage.

Rows are kept as they were trained on: token ids (2 bytes each where the vocabulary allows, else 4), one bit per token
for whether it counts in the loss, and 20 bytes for length, task and key. So a chat template or other columns of an
earlier task do not matter. With `keep: logits` a row also has, for each token of the loss, the k most probable tokens
after its own stage (2 or 4 bytes each) and their log-probabilities (1 byte each, model/top_tokens.py). These are then
the row's targets, in place of its tokens: distillation from the model as it was (Buzzega et al., 2004.07211, who keep
all logits).

    reservoir   each row of any task is kept with the same chance. A row's key is a random number; kept are the rows of
                the smallest keys that fit the budget together. This is Vitter's reservoir (1985) for a budget of bytes:
                it does not depend on the order of the rows.
    ring        an equal share of the bytes per task, with each task's newest rows (Lopez-Paz and Ranzato, 1706.08840)
    loss_diverse  an equal share of the bytes per task; of its rows, sorted by their loss after the task's own stage,
                those at 1/2, 1/4, 3/4, 1/8, ... of the order, so that easy and hard rows are both kept
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ..errors import BadInput
from ..files import writing
from ..model.loss import SOFT
from ..model.top_tokens import shares, top_tokens

COLUMN = "kept_row"  # of a data set: the number of a kept row, -1 for others
PER_ROW = 20  # bytes of a row beside its tokens: key 8, length 4, task 4, position 4


@dataclass
class Rows:
    """Rows of tokens. `ids[i]`, `counts[i]`: of row i, shape (tokens,); `tasks[i]`, `places[i]`: the stage and the
    position in its data; `keys[i]`: a random number in [0, 1), for `loss_diverse` the row's loss."""

    ids: list[numpy.ndarray] = field(default_factory=list)
    counts: list[numpy.ndarray] = field(default_factory=list)  # booleans
    tasks: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    keys: list[float] = field(default_factory=list)
    tops: list[numpy.ndarray] = field(default_factory=list)  # (tokens of the loss, k), uint32; (0, 0) without
    logs: list[numpy.ndarray] = field(default_factory=list)  # their log-probabilities, uint8

    def __len__(self) -> int:
        return len(self.ids)

    def picked(self, order: list[int]) -> Rows:
        held = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Rows(*([values[i] for i in order] if values else [] for values in held))

    def joined(self, other: Rows) -> Rows:
        return Rows(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class Rehearsal:
    """What one stage does: mixes in the rows of the file `before`, and keeps its own with them in the file `after`.

    `budget`: bytes. `mix`: the share of the rows of a step that are earlier ones. `task`: the stage's number. `top`:
    how many probabilities per token are kept; 0: text only.
    """

    budget: int
    policy: str
    mix: float
    task: int
    before: Path | None = None
    after: Path | None = None
    top: int = 0

    def mix_into(self, trainer: Any) -> int:
        """Add the kept rows behind the trainer's own, to be mixed in by its sampler; -> how many."""
        own = trainer.train_dataset
        if "labels" not in own.column_names or getattr(trainer, "padding_free", False) or trainer.args.packing:
            have = "only rows of a language model are kept, each for itself"
            raise BadInput("rehearsal", have, "Set objective: causal_lm, and remove packing")
        if trainer.args.train_sampling_strategy != "random":
            have = f"train_sampling_strategy is {trainer.args.train_sampling_strategy}"
            raise BadInput("rehearsal", have, "Leave it out: rows are mixed in a random order")
        if self.top and not hasattr(trainer.job.objective, "soft"):
            have = "only causal_lm has a loss against probabilities"
            raise BadInput("rehearsal: keep: logits", have, "Set objective: causal_lm, or keep: text")
        if self.top and (trainer.job.objective.dft or not trainer.job.objective.differentiable):
            have = "the loss of each token is weighted by its own probability, or is a metric"
            raise BadInput(
                "rehearsal: keep: logits", have, "Set loss_type: nll and objective: causal_lm, or keep: text"
            )
        sizes = self._sizes(own, wide(trainer))
        if self.before is None and min(sizes) > self.budget:
            have = f"the shortest row of stage {self.task} needs {min(sizes):,}"
            raise BadInput(f"rehearsal: budget: {self.budget:,} bytes", have, "Raise it")
        if self.before is None:
            return 0
        rows = read(self.before)
        trainer.rehearsed = (len(own), self.mix)
        trainer.train_dataset = _beside(own, rows, bool(self.top))
        if self.top:
            trainer.args.remove_unused_columns = False  # the collator reads which kept row a row is
            trainer.data_collator = WithShares(trainer.data_collator, rows.tops, rows.logs, self.top)
        return len(rows)

    def _sizes(self, own: Any, four: bool) -> list[int]:
        """The bytes that each row of the data set `own` would take."""
        if not self.top:
            return [row_bytes(len(row), four) for row in own["input_ids"]]
        counted = (sum(label != -100 for label in row[1:]) for row in own["labels"])
        return [row_bytes(len(row), four, self.top * many)
                for row, many in zip(own["input_ids"], counted, strict=True)]  # fmt: skip

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
            shape = (int(made.counts[-1][1:].sum()), self.top) if self.top else (0, 0)
            made.tops.append(numpy.zeros(shape, numpy.uint32))
            made.logs.append(numpy.zeros(shape, numpy.uint8))
        if self.policy == "loss_diverse":
            _score(trainer, made, range(count), 0)
        every = read(self.before).joined(made) if self.before else made
        kept = choose(every, self.budget, self.policy, wide(trainer))
        if self.top:
            own_ones = [i for i, task in enumerate(kept.tasks) if task == self.task]
            _score(trainer, kept, own_ones, self.top)
        write(self.after, kept, wide(trainer), count + (seen(self.before) if self.before else 0))
        return kept


def wide(trainer: Any) -> bool:
    """Whether a token id needs 4 bytes."""
    return len(trainer.processing_class) > 2**16


def row_bytes(tokens: int, four: bool, probabilities: int = 0) -> int:
    each = 4 if four else 2
    return tokens * each + -(-tokens // 8) + PER_ROW + probabilities * (each + 1)


def _sizes(rows: Rows, four: bool) -> list[int]:
    tops = rows.tops or [numpy.zeros((0, 0))] * len(rows)
    return [row_bytes(len(ids), four, top.size) for ids, top in zip(rows.ids, tops, strict=True)]


def choose(rows: Rows, budget: int, policy: str, four: bool = False) -> Rows:
    """The rows that are kept within `budget` bytes, in the order of their tasks and positions.

    A row that was left out before does not come back: for the reservoir, all keys up to that of the first row that does
    not fit are kept, and what it leaves free is not given to later ones.
    """
    sizes = _sizes(rows, four)
    chosen: list[int] = []
    tasks = sorted(set(rows.tasks))
    if policy == "reservoir":
        groups = [(budget, sorted(range(len(rows)), key=lambda i: rows.keys[i]))]
    elif policy == "loss_diverse":
        by_loss = lambda task: sorted((i for i in range(len(rows)) if rows.tasks[i] == task), key=rows.keys.__getitem__)  # noqa: E731
        groups = [(budget // max(1, len(tasks)), spread(by_loss(task))) for task in tasks]
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


def spread(order: list[int]) -> list[int]:
    """The items of `order` at 1/2, 1/4, 3/4, 1/8, 3/8, ... of its length, each once."""
    found: dict[int, None] = {}
    denominator = 2
    while len(found) < len(order):
        for numerator in range(1, denominator, 2):
            found.setdefault(len(order) * numerator // denominator)
        denominator *= 2
    return [order[at] for at in found]


def nbytes(rows: Rows, four: bool = False) -> int:
    return sum(_sizes(rows, four))


def _score(trainer: Any, rows: Rows, places: Iterable[int], top: int) -> None:
    """Set the losses of the rows at `places` as their keys, or with `top` their most probable tokens, by the trainer's
    model as it is: in batches of its training, without dropout."""
    model, whole = trainer.model, bool(getattr(trainer.job.objective, "whole", False))
    collate = getattr(trainer.data_collator, "inner", trainer.data_collator)
    size, was = trainer.args.per_device_train_batch_size, model.training
    order = sorted(places, key=lambda i: (len(rows.ids[i]), i))
    model.eval()
    with trainer.compute_loss_context_manager():
        for start in range(0, len(order), size):
            part = order[start : start + size]
            batch = collate([
                {"input_ids": rows.ids[i].tolist(),
                 "labels": numpy.where(rows.counts[i], rows.ids[i].astype(numpy.int64), -100).tolist()} for i in part
            ])  # fmt: skip
            batch = {key: value.to(model.device) for key, value in batch.items()}
            labels = batch.pop("labels")
            found = top_tokens(model, batch, labels, top, whole)
            for number, i in enumerate(part):
                of = found.rows == number
                if top:
                    rows.tops[i], rows.logs[i] = found.ids[of], found.logs[of]
                else:
                    rows.keys[i] = float(found.loss[of].mean()) if of.any() else 0.0
    model.train(was)


class WithShares:
    """`inner`'s batches, and for each token the tokens and probabilities that its loss is against (model/loss.py): of
    a rehearsed row those that were kept, else the token itself."""

    def __init__(self, inner: Any, tops: list[numpy.ndarray], logs: list[numpy.ndarray], top: int):
        self.inner, self.tops, self.logs, self.top = inner, tops, logs, top

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        kept = [example.pop(COLUMN, -1) for example in examples]
        batch = self.inner(examples)
        labels = batch["labels"]
        ids = labels.clamp(min=0)[..., None].repeat(1, 1, self.top)
        share = torch.zeros(ids.shape)
        share[..., 0] = 1.0
        for row, number in enumerate(kept):
            if number is not None and number >= 0:
                at = (labels[row, 1:] != -100).nonzero().squeeze(1) + 1
                held = self.tops[number].shape[1]  # fewer in a small vocabulary
                ids[row, at, :held] = torch.from_numpy(self.tops[number].astype(numpy.int64))
                share[row, at] = 0.0
                share[row, at, :held] = torch.from_numpy(shares(self.logs[number]))
        return {**batch, SOFT[0]: ids, SOFT[1]: share}


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
    if rows.tops and (widths := {top.shape[1] for top in rows.tops}) != {0}:
        parts["tops"] = numpy.concatenate(rows.tops).astype(ids.dtype).reshape(-1, max(widths))
        parts["logs"] = numpy.concatenate(rows.logs).reshape(-1, max(widths))
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
        tops, logs = ([numpy.zeros((0, 0), dtype)] * len(ids) for dtype in (numpy.uint32, numpy.uint8))
        if "tops" in parts:
            at = numpy.cumsum([0, *(int(row[1:].sum()) for row in counts)])
            if at[-1] != len(parts["tops"]) or at[-1] != len(parts["logs"]):
                raise ValueError("it is too short")
            tops = [parts["tops"][a:b].astype(numpy.uint32) for a, b in zip(at[:-1], at[1:], strict=True)]
            logs = [parts["logs"][a:b] for a, b in zip(at[:-1], at[1:], strict=True)]
        return Rows(ids, counts, *(parts[key].tolist() for key in ("tasks", "places", "keys")), tops, logs)
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


def _beside(own: Any, rows: Rows, numbered: bool) -> Any:
    """The data set `own` with `rows` behind it, in its columns; `numbered`: with a column of the rows' numbers."""
    from datasets import Dataset, concatenate_datasets

    if numbered:
        own = own.add_column(COLUMN, [-1] * len(own))
    columns: dict[str, list[Any]] = {name: [] for name in own.column_names}
    for number, (ids, counts) in enumerate(zip(rows.ids, rows.counts, strict=True)):
        made = {
            COLUMN: number,
            "input_ids": ids.tolist(), "labels": numpy.where(counts, ids.astype(numpy.int64), -100).tolist(),
            "attention_mask": [1] * len(ids), **dict.fromkeys(("completion_mask", "assistant_masks"), counts.tolist()),
        }  # fmt: skip
        for name, column in columns.items():
            column.append(made.get(name))
    return concatenate_datasets([own, Dataset.from_dict(columns, features=own.features)])
