"""Whether documents in a packed row see only themselves: asked once, before training or evaluation with packed rows.

transformers makes the mask of a packed row from its position ids, but not in every model: some make theirs from an
attention mask alone (OPT, Bloom, MPT), and a state that runs on (convolutions, Mamba) knows no mask at all. So a packed
row's losses are compared with those of its documents alone; and, which shows a leak far below rounding, a document's
losses must not move when the tokens of the one before it change. Where they differ, the rows get an explicit mask of
blocks; where that does not help either, packing is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import BadInput
from ..model.undisturbed import undisturbed
from .packed_rows import PackedRows

LENGTHS = (6, 5, 4)  # tokens of the documents in the row
WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "attention_window_size", "window_size")
# in nats, the mean over tokens: between a packed document and the same alone; when the document before it changes
APART = {torch.float32: (1e-4, 1e-6)}
APART_HALF = (0.25, 1e-2)  # logits of 16 to 32 are 0.125 apart in bf16; positions that run on cost far more
APART_INT8 = (1.0, 0.6)  # its outlier columns are found over all tokens at once, whatever document they are of


def pack_apart(model: PreTrainedModel, rows: PackedRows, longest: int | None, field: str = "packing") -> str:
    """Sets `rows` (the collator) so that it keeps documents apart in `model`; -> a note for the user, or "".

    `longest`: tokens of the longest row, if known; `field`: the setting that a refusal names. BadInput where nothing
    keeps the documents apart.
    """
    name, tried = type(model).__name__, ""
    dtype = model.dtype if model.dtype.is_floating_point else torch.float32
    for positions, block in ((True, None), (True, dtype), (False, dtype)):
        if block is not None and (window := _window(model)) is not None and not (longest and longest <= window):
            continue  # an explicit mask would take the place of the windows' own
        rows.positions, rows.block = positions, block
        why = leak(model, rows)
        if not why:
            return f"{name}: packed rows get an explicit mask, since {tried}" if block is not None else ""
        tried = tried or why
    raise BadInput(f"training: {field}: true on {name}", tried, f"Take {field} out")


def _window(model: PreTrainedModel) -> int | None:
    """How many tokens the narrowest attention of the model sees; None where all see all."""
    config = model.config.get_text_config()
    widths = (getattr(config, name, None) for name in WINDOWS)
    return min((width for width in widths if isinstance(width, int) and width > 0), default=None)


@torch.no_grad()
def leak(model: PreTrainedModel, rows: PackedRows) -> str:
    """How documents that `rows` packs differ in `model` from the same documents alone; "" where they do not."""
    words = model.config.get_text_config().vocab_size
    random = torch.Generator().manual_seed(0)
    low, high = words // 4, max(words // 2, words // 4 + 1)
    documents = [torch.randint(low, high, (size,), generator=random) for size in LENGTHS]
    others = [torch.randint(low, high, (LENGTHS[0],), generator=random), *documents[1:]]
    alone_within, moved_within = APART.get(model.dtype, APART_HALF)
    if getattr(model, "is_loaded_in_8bit", False):
        alone_within, moved_within = APART_INT8
    with undisturbed(model):
        try:
            packed = _losses(model, rows, documents)
            changed = _losses(model, rows, others)
        except Exception as error:  # a mask or positions that this model does not take
            return f"it takes no such rows ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        alone = [_losses(model, None, [document])[0] for document in documents]
    moved = max(float((a - b).abs().mean()) for a, b in zip(packed[1:], changed[1:], strict=True))
    if not moved <= moved_within:
        return "a document in a packed row sees the one before it"
    far = max(float((a - b).abs().mean()) for a, b in zip(packed, alone, strict=True))
    return "" if far <= alone_within else f"a document's loss in a packed row is {far:.2g} off its loss alone"


def packed_batch(model: PreTrainedModel, rows: PackedRows) -> dict[str, Tensor]:
    """Two rows of packed documents as `rows` makes them, the second with padding; where a prompt would be, no label."""
    words = model.config.get_text_config().vocab_size
    random, examples = torch.Generator().manual_seed(0), []
    for sizes in (LENGTHS, LENGTHS[1:]):
        ids = torch.randint(words // 4, max(words // 2, words // 4 + 1), (sum(sizes),), generator=random).tolist()
        examples.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "seq_lengths": list(sizes)})
    device = model.get_input_embeddings().weight.device
    return {key: value.to(device) for key, value in rows.torch_call(examples).items()}


def _losses(model: PreTrainedModel, rows: PackedRows | None, documents: list[Tensor]) -> list[Tensor]:
    """Each document's losses, token by token; packed into one row, or (`rows`: None) as a row of its own."""
    ids = torch.cat(documents)
    if rows is None:
        batch: dict[str, Any] = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
    else:
        sizes = [len(document) for document in documents]
        example = {"input_ids": ids.tolist(), "labels": ids.tolist(), "seq_lengths": sizes}
        batch = rows.torch_call([example])
        batch.pop("labels")
    device = model.get_input_embeddings().weight.device
    batch = {key: value.to(device) for key, value in batch.items()}
    logits = model.forward(**batch, use_cache=False).logits[0].float().cpu()
    found, start = [], 0
    for document in documents:
        end = start + len(document)
        found.append(F.cross_entropy(logits[start : end - 1], document[1:], reduction="none"))
        start = end
    return found
