"""What the tests of embedding pruning share: ids that occur, batches of them, and a patch that has counted them."""

from __future__ import annotations

import torch
from torch import nn

from trimtab.contracts import Place
from trimtab.methods.embedding_pruning import EmbeddingPruning
from trimtab.model.kept_rows import IDS
from world import PLACE

V = 128
SOME = torch.arange(20, 60)  # ids that the data have


def batch_of(seed: int = 1, rows: int = 3, tokens: int = 12) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = SOME[torch.randint(0, len(SOME), (rows, tokens), generator=random)]
    mask = torch.ones_like(ids)
    mask[-1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def put(model: nn.Module, place: Place = PLACE, **fields):
    surgery = EmbeddingPruning(**fields).apply(model, place)
    surgery.calibrate([{"input_ids": SOME[None]}])
    return surgery


def kept(model: nn.Module) -> torch.Tensor:
    return getattr(model.get_input_embeddings(), IDS)
