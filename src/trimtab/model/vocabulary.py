"""What a model's vocabulary must always have: ids that any text, template or config may use, however rare they are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

TOKENIZER = "trimtab_tokenizer"  # attribute of a model: the tokenizer that it was loaded with
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # the name of a byte in SentencePiece vocabularies
TOP = (100, 1000, 4000, 16000, 64000)  # numbers of most frequent ids for which the coverage is shown


def always_used(model: Any, size: int) -> Tensor:
    """(n,) int64, ascending: special and added tokens, single bytes, and ids that the configs name, below `size`."""
    found = {*_config_ids(model)}
    if (tokenizer := getattr(model, TOKENIZER, None)) is not None:
        bytes_of = set(ByteLevel.alphabet())
        found |= {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
        found |= {at for token, at in tokenizer.get_vocab().items() if token in bytes_of or BYTE.fullmatch(token)}
    return torch.tensor(sorted(at for at in found if 0 <= at < size), dtype=torch.int64)


def _config_ids(model: Any) -> Iterator[int]:
    configs = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    for config in configs:
        for key, value in vars(config).items() if config is not None else ():
            if key.endswith(("token_id", "token_ids", "token_index", "suppress_tokens")) and value is not None:
                values = value if isinstance(value, list | tuple) else [value]
                yield from (v for v in values if isinstance(v, int) and not isinstance(v, bool))


def unknown_id(model: Any) -> int | None:
    """The id of the unknown token; None: the vocabulary has none."""
    tokenizer = getattr(model, TOKENIZER, None)
    return getattr(tokenizer if tokenizer is not None else model.config.get_text_config(), "unk_token_id", None)


def fingerprint(model: Any) -> Tensor:
    """(16,) uint8: identifies the tokens and ids of the model's tokenizer; zeros if it is not known."""
    tokenizer = getattr(model, TOKENIZER, None)
    if tokenizer is None:
        return torch.zeros(16, dtype=torch.uint8)
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode("utf-8", "surrogatepass")).digest()
    return torch.tensor(list(digest[:16]), dtype=torch.uint8)


def count_tokens(dataset: Any, size: int) -> Tensor:
    """(size,) int64: how often each id occurs in the `input_ids` of tokenised rows of any lengths, read in parts."""
    counts = torch.zeros(size, dtype=torch.int64)
    for ids in token_parts(dataset):
        counts += torch.bincount(ids, minlength=size)
    return counts


def token_parts(dataset: Any) -> Iterator[Tensor]:
    """The `input_ids` of tokenised rows, of 1,000 rows at a time, without padding: (n,) int64."""
    for part in dataset.with_format("arrow").iter(1000):
        ids = part["input_ids"].combine_chunks().flatten().to_numpy()
        yield torch.from_numpy(ids.astype(numpy.int64))


def coverage(counts: Tensor) -> str:
    """How many tokens the most frequent ids are: "the 100 most frequent ids are 52.1 % of the tokens, 1,000 81.3 %"."""
    sorted_counts = counts[counts > 0].sort(descending=True).values
    shares = sorted_counts.cumsum(0) / sorted_counts.sum()
    shown = [at for at in TOP if at < len(shares)]
    parts = [f"{at:,} {float(shares[at - 1]):.1%}" for at in shown] + [f"all {len(shares):,} 100.0%"]
    return f"coverage, by the most frequent ids: {', '.join(parts)} of the tokens"
