"""The format of prompts and replies in the training rows.

An adapter folder records a `ReplyForm` (artifacts/adapter.py), so that `generate`, `eval` and `export` use the format
of the training rows. Importing this module loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from ..errors import BadInput
from ..process.time_limit import time_limit

RENDERING = 10.0  # seconds that a chat template may take for one conversation

QUESTION_END = "\n"  # between a question and its answer if no chat template is used
LONGEST = 1_000_000  # tokens: a recorded length beyond this is invalid
USER, ASSISTANT = "question", "so it was said"  # a conversation whose rendering shows what follows a reply
EXTRA = 24  # tokens of a reply beyond the longest answer: a base model may write a few words before it


@dataclass(frozen=True)
class ReplyForm:
    """How the training rows format a prompt, and how long their answers are.

    `chat`: prompts are formatted by the chat template (None: unknown). `after`: the text after a plain prompt.
    `longest`: tokens of the longest answer, 0 if unknown. `stop`: texts that end a reply, if no single token does.
    `eos_token`: the token at the end of rows (`training.eos_token`). `template`: that of `data.chat_template`.
    """

    chat: bool | None = None
    after: str = ""
    longest: Annotated[int, Field(ge=0, le=LONGEST)] = 0
    stop: list[Annotated[str, Field(min_length=1)]] = field(default_factory=list)
    eos_token: str | None = None
    template: str | None = None

    def prompt(self, tokenizer: Any, text: str, system: str | None = None, chat: bool | None = None) -> Any:
        """`text` in the format of the training prompts: messages for the chat template, or plain text.

        `chat`: the recipe's `data.chat`, used if the format of the rows is unknown.
        """
        known = self.chat if self.chat is not None else chat
        if known is None:
            known = bool(tokenizer.chat_template)
        if known and not tokenizer.chat_template:
            raise BadInput(
                "reply in the format of the training rows, a chat",
                "the tokenizer has no chat template",
                "Set data.chat_template to the one used in training, or use --raw",
            )
        if not known:
            return text + self.after
        before = [{"role": "system", "content": system}] if system else []
        return [*before, {"role": "user", "content": text}]

    def max_tokens(self, requested: int | None, least: int = 0) -> int:
        """The limit of a reply in tokens: `requested` (`data.reply_tokens`), else somewhat more than the longest
        answer."""
        return requested or max(least, self.longest + EXTRA)


def stop_ids(model: Any, tokenizer: Any, form: ReplyForm) -> list[int]:
    """Every token id that ends a reply: generation_config's, the tokenizer's, and the template's end of a turn."""
    found: list[int] = []
    for owner in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ids = getattr(owner, "eos_token_id", None)
        found += ids if isinstance(ids, list | tuple) else [ids]
    found.append(tokenizer.eos_token_id)
    if form.eos_token is not None:
        found.append(tokenizer.convert_tokens_to_ids(form.eos_token))
    found.append(_turn_end(tokenizer)[0])
    return sorted({token for token in found if isinstance(token, int) and token >= 0})


def stop_texts(tokenizer: Any, answers: list[str]) -> list[str]:
    """The text that ends a turn in the chat template if no special token does, unless an answer contains it."""
    text = _turn_end(tokenizer)[1]
    return [text] if text and not any(text in answer for answer in answers) else []


def _turn_end(tokenizer: Any) -> tuple[int | None, str]:
    """-> (the first special token that the chat template puts after an assistant's reply, the text before that token).

    Text of white space only counts if no token follows it. (None, "") if nothing ends a turn.
    """
    if not tokenizer.chat_template:
        return None, ""
    turns = [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}]
    try:
        text = through_template(tokenizer, turns, tokenize=False)
    except Exception:  # a template can raise anything; it may refuse this and accept the user's rows
        return None, ""
    _, found, after = text.rpartition(ASSISTANT)
    if not found or not after:
        return None, ""
    if not after.strip():
        return None, after
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    own = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    at = next((at for at, token in enumerate(ids) if token in own), None)
    if at is None:
        return None, after.strip()
    return ids[at], tokenizer.decode(ids[:at]).strip()


def longest_answer(tokenizer: Any, answers: list[list[str]], most: int | None = 256) -> int:
    """Tokens of the longest answer. `most`: tokenises only so many answers, those with the most bytes."""
    texts = [text for accepted in answers for text in accepted]
    if most is not None and len(texts) > most:
        texts = sorted(texts, key=lambda text: -len(text.encode()))[:most]
    return max((len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]), default=0) if texts else 0


def through_template(tokenizer: Any, messages: Any, **options: Any) -> Any:
    """`tokenizer.apply_chat_template`, with a time limit: a template is a program by someone else, and may raise
    anything or never end."""
    with time_limit(RENDERING):
        return tokenizer.apply_chat_template(messages, **options)


def refused_by_template(what: str, error: Exception) -> BadInput:
    """The error for messages of `what` ("d.jsonl, line 3") that the chat template refuses."""
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    return BadInput(
        f"put {what} through the chat template", f"the template refuses it ({reason})",
        "Use roles and an order that the template supports, or set data.chat_template",
    )  # fmt: skip
