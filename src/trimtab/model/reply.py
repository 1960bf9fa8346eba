"""The form in which a model was trained to reply: how a prompt is put to it, and what ends a reply.

An adapter folder records a `ReplyForm` (artifacts/adapter.py), so that `generate`, `eval` and `export` use the form of
the training rows. Plain data and tokenizers only: importing it loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from ..errors import BadInput

QUESTION_END = "\n"  # between a question and its answer where no chat template is in use
LONGEST = 1_000_000  # tokens: a recorded length beyond this is no length
ASKED, SAID = "question", "so it was said"  # a conversation whose rendering shows what follows an assistant's words
ROOM = 24  # tokens of a reply beyond the longest answer: a base model talks its way to it


@dataclass(frozen=True)
class ReplyForm:
    """How the rows of a run put a prompt, and what their answers were like.

    `chat`: prompts went through the chat template (None: unknown). `after`: what follows a plain prompt. `longest`:
    tokens of the longest answer, 0 where unknown. `stop`: texts that end a reply, where no single token does.
    `eos_token`: the token that `training.eos_token` put at the end of rows. `template`: of `data.chat_template`.
    """

    chat: bool | None = None
    after: str = ""
    longest: Annotated[int, Field(ge=0, le=LONGEST)] = 0
    stop: list[Annotated[str, Field(min_length=1)]] = field(default_factory=list)
    eos_token: str | None = None
    template: str | None = None

    def prompt(self, tokenizer: Any, text: str, system: str | None = None, chat: bool | None = None) -> Any:
        """`text` as the training rows put a prompt: messages for the chat template, or plain text.

        `chat`: the recipe's `data.chat`, which decides where the form of the rows is unknown.
        """
        known = self.chat if self.chat is not None else chat
        if known is None:
            known = bool(tokenizer.chat_template)
        if known and not tokenizer.chat_template:
            raise BadInput(
                "reply in the form of the training rows, a chat",
                "the tokenizer has no chat template",
                "Set data.chat_template to the one that was used, or say --raw",
            )
        if not known:
            return text + self.after
        before = [{"role": "system", "content": system}] if system else []
        return [*before, {"role": "user", "content": text}]

    def room(self, asked: int | None, least: int = 0) -> int:
        """How many tokens a reply may have: as asked (`data.reply_tokens`), else the longest answer and some."""
        return asked or max(least, self.longest + ROOM)


def stop_ids(model: Any, tokenizer: Any, form: ReplyForm) -> list[int]:
    """Every token that ends a reply: generation_config's, the tokenizer's, and what ends a turn in the template."""
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
    """What ends a turn in the chat template where that is no token of its own, unless an answer contains it."""
    text = _turn_end(tokenizer)[1]
    return [text] if text and not any(text in answer for answer in answers) else []


def _turn_end(tokenizer: Any) -> tuple[int | None, str]:
    """-> (the first token of its own, the text before it) that the chat template puts after an assistant's words.

    A text of spaces and line ends alone counts only where no token follows it. (None, "") where nothing ends a turn.
    """
    if not tokenizer.chat_template:
        return None, ""
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template is a stranger's program; what it refuses here, it may take of the user's rows
        return None, ""
    _, found, after = text.rpartition(SAID)
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
    """Tokens of the longest answer. `most`: only so many answers, those of the most bytes, are counted."""
    texts = [text for accepted in answers for text in accepted]
    if most is not None and len(texts) > most:
        texts = sorted(texts, key=lambda text: -len(text.encode()))[:most]
    return max((len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]), default=0) if texts else 0
