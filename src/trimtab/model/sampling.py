"""Generation shared by `generate`, `eval` and RL: batches of prompts -> texts, by transformers' own `generate`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import BadInput, nearest

Prompt = str | list[dict[str, Any]]  # text, or the messages of a conversation


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; messages go through the chat template, ready for the assistant's turn."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def chat_prompt(tokenizer: PreTrainedTokenizerBase, text: str, system: str | None = None) -> Prompt:
    """`text` as a user's turn where the tokenizer has a chat template, else as it is."""
    if not tokenizer.chat_template:
        return text
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


def check_generation(values: dict[str, Any]) -> None:
    """Refuse unknown generation settings with the nearest known name."""
    known = set(GenerationConfig().to_dict()) | {"max_new_tokens"}
    for key in values:
        if key not in known:
            raise BadInput(f'generation: "{key}"', "transformers has no such setting", nearest(key, known))


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, mask: torch.Tensor, **settings: Any
) -> torch.Tensor:
    """transformers' `generate`: prompts' ids and mask, (rows, tokens) -> the new ids, (rows, new tokens).

    Meanwhile the head's input lies in one piece. transformers gives it a slice, each prompt's last position, of which
    torch's linear on a CPU makes a product that takes 20 (one row) to 400 times as long in bf16 (docs/LOG.md).
    """
    head = model.get_output_embeddings()
    in_one_piece = lambda module, args: tuple(hidden.contiguous() for hidden in args)  # noqa: E731
    with contextlib.nullcontext() if head is None else head.register_forward_pre_hook(in_one_piece):
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), pad_token_id=tokenizer.pad_token_id,
            **settings,
        )  # fmt: skip
    return out[:, ids.shape[1] :]


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *,
    batch_size: int = 16, **settings: Any,
) -> Iterator[str]:  # fmt: skip
    """Yield one completion per prompt, in order. Greedy unless `settings` (transformers' names) say otherwise.

    Prompts of similar length share a batch, padded on the left and masked by attention, never by token id.
    """
    settings = {"do_sample": False, "max_new_tokens": 64, **settings}
    if not settings["do_sample"]:
        settings.update({name: None for name in ("temperature", "top_p", "top_k") if name not in settings})
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    answers: dict[int, str] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(ids[i]) for i in chosen)
            batch = torch.full((len(chosen), width), tokenizer.pad_token_id)
            mask = torch.zeros_like(batch)
            for row, i in enumerate(chosen):
                batch[row, width - len(ids[i]) :] = torch.tensor(ids[i])
                mask[row, width - len(ids[i]) :] = 1
            for i, row in zip(chosen, complete(model, tokenizer, batch, mask, **settings), strict=True):
                answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    finally:
        model.train(was_training)
    for i in range(len(ids)):
        yield answers[i]
