"""Samples several completions of each prompt with transformers' `generate`.

A prompt's keys and values are the same for all its completions, so it is read once, and the cache is then copied for
the group. A policy (model/kv_cache.py) judges a prompt by its last tokens, which are not read with the rest here: with
one, each completion reads its prompt.

P prompts, G completions of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from .sampling import complete, last_logits, left_padded


def sample_with_replays(
    sample: Callable[[list[list[int]], int, int], list[list[int]]], prompts: Sequence[list[int]], generations: int,
    replays: int, longest: int,
) -> list[list[int]]:  # fmt: skip
    """`generations` completions of each prompt. The last `replays` of them begin as another one does, up to a random
    token, and show what else can follow. `sample`: (prompts, completions of each, most tokens) -> completions."""
    first = generations - replays
    found, starts = sample(list(prompts), first, longest), list[list[int]]()
    for at in range(len(prompts)):
        for _ in range(replays):
            row = found[at * first + int(torch.randint(first, ()))]
            starts.append(row[: int(torch.randint(1, len(row), ()))] if len(row) > 1 else [])
    before = [prompt for prompt in prompts for _ in range(replays)]
    most = longest - min(map(len, starts), default=0)
    more = sample([prompt + start for prompt, start in zip(before, starts, strict=True)], 1, most)
    whole = [(start + rest)[:longest] for start, rest in zip(starts, more, strict=True)]
    return [
        row for at in range(len(prompts))
        for row in (*found[at * first : (at + 1) * first], *whole[at * replays : (at + 1) * replays])
    ]  # fmt: skip


@torch.no_grad()
def sample_groups(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Sequence[int]], generations: int,
    settings: dict[str, Any], cache: Callable[[], Any] = lambda: None,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:  # fmt: skip
    """-> the new ids of `generations` completions of each prompt, those of a prompt together; each ends with its first
    end token. `settings`: transformers' names, complete; `cache`: makes an empty cache (None: the library's)."""
    ids_PW, mask_PW = (x.to(model.device) for x in left_padded(prompts, tokenizer.pad_token_id))
    training = model.training
    model.eval()
    try:
        made = cache()
        if made is None:
            made = _prompts_read(model, ids_PW, mask_PW, generations)
        ids_BW, mask_BW = (x.repeat_interleave(generations, 0) for x in (ids_PW, mask_PW))
        new_BT = complete(
            model, tokenizer, ids_BW, mask_BW, cache=made, on_token=on_token, config=GenerationConfig(**settings)
        )
    finally:
        model.train(training)
    ends = torch.tensor(settings["eos_token_id"], device=new_BT.device)
    rows = []
    for row_T in new_BT:
        found = torch.isin(row_T, ends).nonzero()
        rows.append(row_T[: int(found[0]) + 1 if len(found) else len(row_T)].tolist())
    return rows


def _prompts_read(model: PreTrainedModel, ids_PW: Tensor, mask_PW: Tensor, generations: int) -> Any:
    """A cache with all but the last token of each prompt, copied for each of its completions. None if the model's
    caches cannot be copied, or prompts have one token."""
    if ids_PW.shape[1] < 2 or generations < 2 or not hasattr(DynamicCache, "batch_repeat_interleave"):
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    places_PW = (mask_PW.cumsum(1) - 1).clamp(min=0)
    part = slice(0, -1)
    model.forward(
        input_ids=ids_PW[:, part], attention_mask=mask_PW[:, part], position_ids=places_PW[:, part],
        past_key_values=cache, use_cache=True, **last_logits(model),
    )  # fmt: skip
    cache.batch_repeat_interleave(generations)
    return cache
