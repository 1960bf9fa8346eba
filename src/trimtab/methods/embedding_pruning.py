"""Vocabulary-level Memory Efficiency for Language Model Fine-tuning (Williams and Aletras, arXiv 2309.08708).

Fine-tuning data use few of a model's tokens. Only the embeddings of ids that occur are kept:

    I = {i : count_i > 0} + always        E_I = E[I]        embed(i) = E_I[row_of(i)]

    E: (V, H) the embedding     I: the kept ids, ascending     K = |I|     row_of: V -> K, the place of i in I
    always: special, added and byte tokens, and ids that the configs name

The adapter stores one bit per id. Weights, gradients and optimizer state of the embedding shrink from V to K rows.

What differs from the paper:

- Ids are mapped inside the model, so data, tokenizer and generation stay as they are. The paper rewrites the data.
- The head is cut too, and stays tied. `softmax: exact` normalises over all V ids: with h the hidden state, and with
  logits of other ids from the slow tier by blocks,

      log p(i) = h E_i - log(sum over I of exp(h E_j) + sum over the others of exp(h E_j))

  Loss and gradients equal those of the whole model; only the others' rows get no gradient. `softmax: kept` trains with
  the first sum alone, which saves the work of the second. Evaluation and generation always use all ids.
- An id without a row is fetched from the slow tier (`unseen: fetch`), read as the unknown token, or an error.
- Only data.train is counted, not the evaluation data. K is rounded up to a multiple of 64 with further ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Batch, Patch, Place, Surgery, When
from ..errors import BadInput
from ..foreign import IGNORED_BY_DDP
from ..memory.budget import gib
from ..model import vocabulary
from ..model.kept_rows import COLD, KEPT, MULTIPLE, KeptRows, add_maps
from ..model.surgery import EXCLUSIVE, Swaps, is_patch

ALL = 2**62  # rows of data.train


@dataclass(frozen=True)
class EmbeddingPruning(Patch):
    """Keeps only the embeddings, and the rows of the head, of ids that occur in data.train."""

    paper: ClassVar[str] = "2309.08708"
    when: ClassVar[When] = When.BOTH
    counts_tokens: ClassVar[bool] = True

    unseen: Literal["fetch", "unk", "error"] = "fetch"  # ids without a row: fetched, read as <unk>, or refused
    softmax: Literal["exact", "kept"] = "exact"  # what training normalises over: all ids, or those that are kept
    rows: int | None = None  # of the most frequent ids at most so many, up to a multiple of 64; null: all that occur

    @property
    def calibration_rows(self) -> int:
        return ALL

    def apply(self, model: PreTrainedModel, place: Place) -> EmbeddingPruningSurgery:
        if self.rows is not None and self.rows < 1:
            raise BadInput(f"embedding_pruning: rows: {self.rows}", "at least one row is kept", "Leave rows out")
        if getattr(model, EXCLUSIVE, "") or any(is_patch(module) for module in model.modules()):
            have = "another patch is on the model already"
            raise BadInput("embedding_pruning", have, "Name embedding_pruning before the other patch")
        if self.unseen == "unk" and vocabulary.unknown_id(model) is None:
            have = "the tokenizer has no unknown token"
            raise BadInput("embedding_pruning: unseen: unk", have, "Use unseen: fetch")
        return EmbeddingPruningSurgery(self, model, place, *_tables(model))

    def counted(self, model: Any, counts: Tensor) -> tuple[EmbeddingPruning, tuple[str, ...]]:
        """The patch for a plan, with the number of rows that are kept of a vocabulary used `counts` (V,) times."""
        ids, used = self.chosen(model, counts), int((counts > 0).sum())
        what = f"embedding_pruning: {used:,} of {len(counts):,} ids occur in {int(counts.sum()):,} tokens of data.train"
        kept = f"{what}; {len(ids):,} rows are kept, with special, added and byte tokens"
        return dataclasses.replace(self, rows=len(ids)), (kept, vocabulary.coverage(counts))

    def chosen(self, model: Any, counts: Tensor) -> Tensor:
        """(K,): the ids that are kept, ascending. BadInput if there are no tokens, or more necessary ids than rows."""
        if not counts.any():
            raise BadInput("embedding_pruning", "data.train has no tokens to count", "Name data that has text")
        order = counts.clone()
        always = vocabulary.always_used(model, len(counts))
        order[always] = order.max() + 1
        wanted = int((order > 0).sum()) if self.rows is None else min(self.rows, int((order > 0).sum()))
        if self.rows is not None and _rounded(self.rows, len(order)) < len(always):
            have = f"{len(always)} special, added and byte tokens are always kept"
            raise BadInput(f"embedding_pruning: rows: {self.rows}", have, f"Set rows to {len(always)} or more")
        first = order.sort(descending=True, stable=True).indices[: _rounded(wanted, len(order))]
        return first.sort().values


class EmbeddingPruningSurgery(Surgery):
    starts_at_zero = False

    def __init__(
        self, patch: EmbeddingPruning, model: PreTrainedModel, place: Place, path: str, table: nn.Embedding,
        head: nn.Linear | None,
    ):  # fmt: skip
        self.patch: EmbeddingPruning = patch
        self.model, self.place, self.path, self.table, self.head = model, place, path, table, head
        self.swaps, self.tables, self.size = Swaps(model), [], len(table.weight)  # type: ignore[var-annotated]
        self.in_slow_tier: list[Tensor] = []
        self.keeps_outputs = patch.unseen != "unk"
        device = table.weight.device
        bits = torch.zeros(-(-self.size // 8), dtype=torch.uint8, device=device)
        self.saved = {f"{path}.kept": bits, f"{path}.tokenizer": vocabulary.fingerprint(model).to(device)}
        if table.weight.is_meta:
            self._cut(torch.empty(_rounded(patch.rows or self.size, self.size), dtype=torch.int64, device="meta"))
        else:
            self.swaps.set_attribute(table, "forward", _never_counted)

    def calibrate(self, batches: Iterable[Batch]) -> None:
        counts = torch.zeros(self.size, dtype=torch.int64)
        for batch in batches:
            counts += torch.bincount(batch["input_ids"].flatten().cpu(), minlength=self.size)
        self._keep(self.patch.chosen(self.model, counts))

    def _keep(self, ids_K: Tensor) -> None:
        kept_V = torch.zeros(len(self.saved[f"{self.path}.kept"]) * 8, dtype=torch.uint8)
        kept_V[ids_K] = 1
        bits = (kept_V.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
        self.saved[f"{self.path}.kept"].copy_(bits)
        self.swaps.undo()
        self._cut(ids_K.to(self.table.weight.device))
        self.patch = dataclasses.replace(self.patch, rows=len(ids_K))

    def _cut(self, ids_K: Tensor) -> None:
        """Replaces the tables' weights by the rows of `ids`, and the modules' forwards."""
        table, head, swaps, every = self.table, self.head, self.swaps, self.patch.softmax == "exact"
        tied = head is not None and head.weight is table.weight
        add_maps(table, ids_K, self.size, swaps)
        first = KeptRows(table, table, self.place, swaps, every, self._unseen, head if tied else None)
        self.tables = [first] if tied or head is None else [
            first, KeptRows(head, table, self.place, swaps, every, self._unseen, head)
        ]  # fmt: skip
        self.in_slow_tier = [rows.cold for rows in self.tables if rows.moved]
        paths = {id(module): path for path, module in self.model.named_modules()}
        swaps.set_attribute(self.model, IGNORED_BY_DDP, [f"{paths[id(rows.owner)]}.{COLD}" for rows in self.tables])
        swaps.set_attribute(table, "forward", first.embed)
        if table.padding_idx is not None:
            pad = 0 if ids_K.is_meta else int(first.row_of[table.padding_idx])
            swaps.set_attribute(table, "padding_idx", pad if pad >= 0 else None)
        if head is not None:
            swaps.set_attribute(head, KEPT, self.tables[-1])
            swaps.set_attribute(head, "forward", self.tables[-1].logits)

    def _unseen(self, ids: Tensor) -> int | None:
        """The row to read for ids without one; None: their own, from the slow tier."""
        if self.patch.unseen == "error":
            asked = f"embed the token {int(ids[0])}"
            raise BadInput(asked, "it does not occur in data.train, and unseen is error", "Use unseen: fetch")
        if self.patch.unseen == "fetch":
            return None
        return int(self.tables[0].row_of[vocabulary.unknown_id(self.model)])

    def own_tensors(self) -> dict[str, Tensor]:
        if not self.tables:
            _never_counted()
        return self.saved

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Keeps the rows that the mask of `tensors` names."""
        mask, of = f"{self.path}.kept", f"{self.path}.tokenizer"
        asked, do = f"load {len(tensors)} tensors into EmbeddingPruning", "Use the adapter with its own base model"
        if tensors.keys() != self.saved.keys() or any(tensors[key].shape != t.shape for key, t in self.saved.items()):
            have = f"a mask of {self.size:,} ids is expected ({mask}), with its tokenizer's mark"
            raise BadInput(asked, have, do)
        made, here = tensors[of].to("cpu", torch.uint8), self.saved[of].cpu()
        if made.any() and here.any() and not torch.equal(made, here):
            raise BadInput(asked, "its mask was made for another tokenizer", "Use the tokenizer that it was made with")
        bits = tensors[mask].cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)
        ids_K = (bits & 1).flatten()[: self.size].nonzero().squeeze(1)
        if not len(ids_K):
            raise BadInput(asked, "its ids were never counted", "Train the adapter again")
        if self.tables and torch.equal(ids_K, self.tables[0].ids.cpu()):
            return
        if any(t.altered for t in self.tables):
            have = "it keeps other ids than this run counted, and another patch trains the rows already"
            raise BadInput(asked, have, "Use the data that the run began with")
        self._keep(ids_K)

    def revert(self) -> None:
        self.swaps.undo()
        self.tables = []

    def merge(self) -> None:
        """Leaves the whole vocabulary: kept rows as they are now, all others as they were loaded."""
        whole = [(rows, rows.whole()) for rows in self.tables]
        self.swaps.undo()
        for rows, table in whole:
            if table is not rows._cold:
                rows.owner.weight.data = table  # type: ignore[union-attr, operator]

    # --- what it saves -----------------------------------------------------------------------------------------------

    def saves(self) -> dict[str, int]:
        """Bytes of the fast tier that the patch saves, by component; a copy of mapped rows costs some. Adam's moments
        are counted for trained rows."""
        found: dict[str, int] = {}
        for rows, name in zip(self.tables, ("embedding", "head"), strict=False):
            weight, cold = rows.owner.weight, rows._cold
            name += " and tied head" if rows.owner is self.table and rows.head is not None else ""
            dropped, width = self.size - weight.shape[0], cold.shape[1]  # type: ignore[union-attr, operator, index]
            before = 0 if rows.mapped else self.size if rows.moved else 0
            found[name] = (before - (self.size - dropped)) * width * cold.element_size()
            if weight.requires_grad:  # type: ignore[union-attr]
                size = dropped * width * weight.element_size()  # type: ignore[union-attr, operator]
                found |= {f"trained {name}": size, f"gradients of the {name}": size, f"moments of the {name}": 2 * size}
        return found

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        if not self.tables:
            return ()
        parts = [f"{name} {'-' if size < 0 else ''}{gib(abs(size))}" for name, size in self.saves().items()]
        what = "embedding_pruning saves fast memory: " + ", ".join(parts)
        mapped = any(rows.mapped for rows in self.tables)
        return (what + (" (rows that are mapped from the file use none)" if mapped else ""),)


def _rounded(rows: int, size: int) -> int:
    return min(-(-rows // MULTIPLE) * MULTIPLE, size)


def _tables(model: PreTrainedModel) -> tuple[str, nn.Embedding, nn.Linear | None]:
    """The path of the embedding, the embedding, and the head if its rows can be cut. BadInput if it is not a plain
    table, or shares its weight with more than the head."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    have, do = f"the input layer of {type(model).__name__} is not a plain table of embeddings", "Leave the patch out"
    if not isinstance(table, nn.Embedding) or table.max_norm is not None:
        raise BadInput("embedding_pruning", have, do)
    plain = type(head) is nn.Linear and head.weight.shape[0] == table.weight.shape[0]
    users = [module for module in model.modules() if any(p is table.weight for p in module.parameters(recurse=False))]
    if any(module is not table and not (plain and module is head) for module in users):
        have = f"the embedding of {type(model).__name__} shares its weight with a layer that is not a plain head"
        raise BadInput("embedding_pruning", have, do)
    path = next(name for name, module in model.named_modules() if module is table)
    return path, table, head if plain else None  # type: ignore[return-value]


def _never_counted(*_: Any) -> NoReturn:
    have = "the ids of its data were never counted"
    raise BadInput("use embedding_pruning", have, "Call calibrate with the training batches, or load an adapter")
