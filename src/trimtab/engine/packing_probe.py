"""Tests whether documents in a packed row see only themselves, once, before training or evaluation with packed rows.

transformers derives the mask of a packed row from its position ids, but not in every model: some use only an attention
mask (OPT, Bloom, MPT), and recurrent layers (convolutions, Mamba) use no mask at all. So the losses of a packed row are
compared with those of its documents alone. A second test finds leaks far below rounding: a document's losses must not
change when the tokens of the one before it change. If either test fails, the rows get an explicit block mask; if that
does not help, packing is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import BadInput
from ..model.kept_rows import among_kept
from ..model.undisturbed import undisturbed
from .packed_rows import PackedRows

LENGTHS = (6, 5, 4)  # tokens of the documents in the row
WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "attention_window_size", "window_size")
# largest differences of a document's loss (nats, mean over tokens): packed and alone; when the one before it changes
APART = {torch.float32: (1e-4, 1e-6)}
APART_HALF = (0.25, 1e-2)  # bf16 rounds logits of 16 to 32 to multiples of 0.125; a leak of positions is far larger
APART_INT8 = (1.0, 0.6)  # int8 finds outlier columns over all tokens of the row at once


def pack_apart(model: PreTrainedModel, rows: PackedRows, longest: int | None, field: str = "packing") -> str:
    """Configures `rows` (the collator) so that documents do not see each other; -> a note for the user, or "".

    `longest`: tokens of the longest row, if known; `field`: the setting that an error names. BadInput if no
    configuration keeps the documents apart.
    """
    name, tried = type(model).__name__, ""
    dtype = model.dtype if model.dtype.is_floating_point else torch.float32
    for positions, block in ((True, None), (True, dtype), (False, dtype)):
        if block is not None and (window := _window(model)) is not None and not (longest and longest <= window):
            continue  # an explicit mask would replace that of the windows
        rows.positions, rows.block = positions, block
        why = leak(model, rows)
        if not why:
            return f"{name}: packed rows get an explicit mask, since {tried}" if block is not None else ""
        tried = tried or why
    raise BadInput(f"training: {field}: true on {name}", tried, f"Remove {field}")


def _window(model: PreTrainedModel) -> int | None:
    """The narrowest attention window of the model, in tokens; None if it has none."""
    config = model.config.get_text_config()
    widths = (getattr(config, name, None) for name in WINDOWS)
    return min((width for width in widths if isinstance(width, int) and width > 0), default=None)


@torch.no_grad()
def leak(model: PreTrainedModel, rows: PackedRows) -> str:
    """How the losses of documents packed by `rows` differ from those of the same documents alone; "" if they agree."""
    words = model.config.get_text_config().vocab_size
    random = torch.Generator().manual_seed(0)
    low, high = words // 4, max(words // 2, words // 4 + 1)
    sizes = (*LENGTHS, LENGTHS[0])
    *documents, other = [among_kept(model, torch.randint(low, high, (size,), generator=random)) for size in sizes]
    others = [other, *documents[1:]]
    alone_within, changed_within = APART.get(model.dtype, APART_HALF)
    if getattr(model, "is_loaded_in_8bit", False):
        alone_within, changed_within = APART_INT8
    with undisturbed(model):
        try:
            packed = _losses(model, rows, documents)
            changed = _losses(model, rows, others)
        except Exception as error:  # a mask or positions that this model does not accept
            return f"it does not accept such rows ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        alone = [_losses(model, None, [document])[0] for document in documents]
    change = max(float((a - b).abs().mean()) for a, b in zip(packed[1:], changed[1:], strict=True))
    if not change <= changed_within:
        return "a document in a packed row sees the one before it"
    gap = max(float((a - b).abs().mean()) for a, b in zip(packed, alone, strict=True))
    return "" if gap <= alone_within else f"a document's loss in a packed row differs by {gap:.2g} from its loss alone"


def packed_batch(model: PreTrainedModel, rows: PackedRows) -> dict[str, Tensor]:
    """Two rows of packed documents, collated by `rows`; the second is padded, and the first tokens have no labels."""
    words = model.config.get_text_config().vocab_size
    random, examples = torch.Generator().manual_seed(0), []
    for sizes in (LENGTHS, LENGTHS[1:]):
        ids = torch.randint(words // 4, max(words // 2, words // 4 + 1), (sum(sizes),), generator=random)
        ids = among_kept(model, ids).tolist()
        examples.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "seq_lengths": list(sizes)})
    device = model.get_input_embeddings().weight.device
    return {key: value.to(device) for key, value in rows.torch_call(examples).items()}


def _losses(model: PreTrainedModel, rows: PackedRows | None, documents: list[Tensor]) -> list[Tensor]:
    """The token losses of each document (nats), with all packed into one row; `rows`: None for a single document."""
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
