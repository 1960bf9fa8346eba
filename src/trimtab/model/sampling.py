"""Batched generation with transformers' `generate`, shared by `generate`, `eval` and RL."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..errors import BadInput, nearest
from .kv_cache import attending, chunk_of
from .limits import check_ids, learned_positions
from .reply import ReplyForm, refused_by_template, stop_ids, through_template

Prompt = str | list[dict[str, Any]]  # text, or the messages of a conversation
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
MORE_THAN_TEXT = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
                  "output_hidden_states")  # fmt: skip
ELSEWHERE = ("num_beam_groups", "constraints", "force_words_ids", "penalty_alpha", "dola_layers")
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Token ids of a prompt. Messages (and `tools`) are formatted by the chat template, with a generation prompt.

    Special tokens that the tokenizer adds after a text (such as eos) are left out.
    """
    if isinstance(prompt, str):
        whole = tokenizer(prompt)["input_ids"]
        plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), None)
        ids = list(whole if start is None else whole[: start + len(plain)])
    else:
        try:
            encoded = through_template(
                tokenizer, prompt, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # a template can raise anything
            raise refused_by_template("a prompt", error) from None
        ids = list(encoded["input_ids"])
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise BadInput(f"reply to {prompt!r}", "it has no tokens, and the tokenizer no bos token", "Give a longer one")
    return ids


def check_generation(values: dict[str, Any]) -> dict[str, Any]:
    """-> consistent generation settings. BadInput for unknown or impossible ones.

    A temperature of 0 means greedy search. Each prompt gets one reply, as text.
    """
    known = set(GenerationConfig().to_dict()) | {"max_new_tokens"}
    settings = {key: value for key, value in values.items() if value is not None}
    for key in settings:
        if key not in known:
            raise BadInput(f'generation: "{key}"', "transformers has no such setting", nearest(key, known))
    for key in ("max_new_tokens", "max_length", "num_beams"):
        if key in settings and (type(settings[key]) is not int or settings[key] < 1):
            raise BadInput(f"generation: {key}: {settings[key]!r}", "it is below 1 or not whole", "Give 1 or more")
    if settings.pop("num_return_sequences", 1) != 1:
        raise BadInput(
            "generation: num_return_sequences", "each prompt gets one reply", "Give the prompt several times"
        )
    for key in MORE_THAN_TEXT:
        if settings.pop(key, False):
            raise BadInput(f"generation: {key}", "only the texts of replies are returned", "Remove it")
    if elsewhere := [key for key in ELSEWHERE if key in settings]:
        have = "transformers runs code from the hub for this kind of search"
        raise BadInput(f"generation: {elsewhere[0]}", have, "Remove it; num_beams and sampling are available")
    if "stop_strings" in settings:
        texts = settings["stop_strings"]
        settings["stop_strings"] = texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise BadInput(f"generation: stop_strings: {texts!r}", "it is not a list of texts", 'Give e.g. ["END"]')
    share = settings.get("top_p")
    if share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
        raise BadInput(f"generation: top_p: {share!r}", "it must be above 0 and at most 1", "Give e.g. 0.9")
    if "temperature" in settings:
        value = settings["temperature"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise BadInput(f"generation: temperature: {value!r}", "it must be 0 or more", "Give e.g. 0.7")
        if value == 0:
            settings = {key: v for key, v in settings.items() if key not in SAMPLED}
            settings["do_sample"] = False
    if any(key in settings for key in SAMPLED):
        settings.setdefault("do_sample", True)
    try:
        GenerationConfig(**settings).validate()
    except (ValueError, TypeError) as error:
        raise _refused(settings, error) from None
    return settings


def _refused(settings: dict[str, Any], error: Exception) -> BadInput:
    have = " ".join(str(error).split())[:200].rstrip(".")
    return BadInput(f"generate with {settings}", f"transformers refuses it ({have})", "Change these settings")


def configured(model: PreTrainedModel, settings: dict[str, Any]) -> GenerationConfig:
    """The complete generation config: `settings`, over the model's own generation_config if it samples.

    Greedy search takes only the special tokens from that file: a repetition penalty, forbidden n-grams, beams or forced
    tokens in it would change the reply.
    """
    own = model.generation_config.to_dict()
    if not settings.get("do_sample"):
        own = {key: own.get(key) for key in TOKENS}
    own = {key: value for key, value in own.items() if value is not None and key != "transformers_version"}
    if "max_new_tokens" in settings:
        own.pop("max_length", None)
    return GenerationConfig(**{**own, **settings})


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, mask: torch.Tensor,
    streamer: Any = None, cache: Cache | None = None, on_token: Callable[[int], None] | None = None,
    config: GenerationConfig | None = None, **settings: Any,
) -> torch.Tensor:  # fmt: skip
    """transformers' `generate`: prompts' ids and mask, (rows, tokens) -> the new ids, (rows, new tokens).

    `cache`: a KV cache (None: the library's). `config`: complete settings, instead of `configured`.
    `on_token` is called with `rows` after each new token.

    A hook makes the head's input contiguous. transformers passes a slice (each prompt's last position), with which
    torch's bf16 linear on a CPU takes 20 (one row) to 400 times as long (docs/LOG.md).
    """
    head, own = model.get_output_embeddings(), model.generation_config
    config = config or configured(model, {"pad_token_id": tokenizer.pad_token_id, **settings})
    contiguous = lambda module, args: tuple(hidden.contiguous() for hidden in args)  # noqa: E731
    model.generation_config = GenerationConfig()  # transformers fills fields that `config` leaves open from here
    try:
        hook = contextlib.nullcontext() if head is None else head.register_forward_pre_hook(contiguous)
        more = {} if cache is None else {"past_key_values": cache}
        if on_token is not None:
            more["stopping_criteria"] = StoppingCriteriaList([_Callback(on_token)])
        if (chunk := chunk_of(cache, ids.shape[1])) < ids.shape[1]:
            config.prefill_chunk_size = chunk
        with hook, attending(model, cache, mask, config.max_new_tokens or 0):
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config,
                tokenizer=tokenizer if config.stop_strings else None, streamer=streamer, **more,
            )  # fmt: skip
    except (ValueError, TypeError, NotImplementedError) as error:
        raise _refused(settings, error) from error
    finally:
        model.generation_config = own
    return out[:, ids.shape[1] :]


class _Callback(StoppingCriteria):
    """Calls a function after each new token, and never stops generation."""

    def __init__(self, on_token: Callable[[int], None]):
        self.on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.on_token(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *,
    batch_size: int = 16, form: ReplyForm | None = None, tools: Sequence[list[dict[str, Any]] | None] | None = None,
    cut: set[int] | None = None, cache: Callable[[], Cache | None] = lambda: None,
    on_token: Callable[[int], None] | None = None, **settings: Any,
) -> Iterator[str]:  # fmt: skip
    """Yields one completion per prompt, in order. Greedy unless `settings` (transformers' names) state otherwise.

    Prompts of similar length share a batch, padded on the left, with an attention mask. A reply ends before the first
    end token or text of `form` or of the model's files. `tools`: those of each prompt. `cut` receives the indices of
    the prompts whose replies reached the limit of tokens. `cache` creates a KV cache for each batch.
    """
    form = form or ReplyForm()
    settings = settings_of(model, tokenizer, form, settings)
    ids = [prompt_ids(tokenizer, prompt, tools[i] if tools else None) for i, prompt in enumerate(prompts)]
    for i, row in enumerate(ids):
        check_ids(model, row, f"reply to prompt {i + 1}")
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    answers: dict[int, str] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch, mask = left_padded([ids[i] for i in chosen], tokenizer.pad_token_id)
            limited = within_positions(model, batch.shape[1], settings)
            for i, row in zip(
                chosen,
                complete(model, tokenizer, batch, mask, cache=cache(), on_token=on_token, **limited),
                strict=True,
            ):
                answers[i], ended = reply_text(tokenizer, row.tolist(), settings)
                if not ended and cut is not None:
                    cut.add(i)
    finally:
        model.train(was_training)
    for i in range(len(ids)):
        yield answers[i]


def left_padded(rows: Sequence[Sequence[int]], pad: int, width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ids and mask, int64 (rows, width): the prompts with padding on their left; 0: as wide as the longest."""
    width = width or max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, width - len(row) :] = torch.tensor(list(row))
        mask[at, width - len(row) :] = 1
    return ids, mask


def last_logits(model: PreTrainedModel) -> dict[str, int]:
    """The arguments of a forward pass that computes the logits of the last position only, where the model can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def settings_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: ReplyForm, requested: dict[str, Any]
) -> dict[str, Any]:
    """`requested`, with the ends of a reply; by default greedy search and up to 64 tokens."""
    settings = {"do_sample": False, **check_generation(requested)}
    if "max_length" not in settings:
        settings.setdefault("max_new_tokens", 64)
    settings.setdefault("eos_token_id", stop_ids(model, tokenizer, form))
    if stop := [*settings.get("stop_strings", []), *form.stop]:
        settings["stop_strings"] = stop
    return settings


def within_positions(model: PreTrainedModel, width: int, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` with the number of new tokens limited by the model's learned positions, if it has any."""
    places = learned_positions(model)
    if places is None:
        return settings
    if width >= places:
        raise BadInput(
            f"reply to a prompt of {width} tokens", f"the model has learned {places} positions", "Give a shorter prompt"
        )
    return {**settings, "max_new_tokens": min(settings.get("max_new_tokens", places), places - width)}


def reply_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], settings: dict[str, Any]) -> tuple[str, bool]:
    """-> (the text of the reply, whether it ended before the limit of tokens)."""
    stops = settings["eos_token_id"]
    stops = stops if isinstance(stops, list | tuple) else [stops]
    end = next((at for at, token in enumerate(ids) if token in stops), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    found = [at for stop in settings.get("stop_strings", []) if (at := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))].strip(), end is not None or bool(found)
