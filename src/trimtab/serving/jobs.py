"""From a checked request to jobs: one reply each, with its prompt as token ids and its settings complete."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import BadInput
from ..inference.generate import TALK, form_of
from ..inference.session import Inference
from ..model.limits import check_ids, learned_positions
from ..model.sampling import check_generation, prompt_ids, settings_of
from .protocol import Ask, Refused, Reply
from .text import Growing

REFUSED = {
    "num_beams": "replies are streamed token by token",
    "max_length": "the limit is that of new tokens",
    "min_length": "it counts the prompt too",
    "use_cache": "every reply has its KV cache",
}


@dataclass(eq=False)
class Job:
    """One reply. `send` gets "" when it begins, then each new piece of text if it is streamed; at last a Reply, or the
    error that ended it. `new`: most tokens."""

    ids: list[int]
    new: int
    settings: dict[str, Any]
    seed: int | None
    text: Growing
    send: Callable[[str | Reply | Exception], None]
    gone: bool = False  # the client is
    done: bool = field(default=False, init=False)

    def add(self, token: int) -> None:
        piece = self.text.add(token)
        if piece:
            self.send(piece)
        if self.text.ended or self.text.count >= self.new:
            self.finish()

    def finish(self) -> None:
        """Ends the reply as it is now."""
        if self.text.streamed and (piece := self.text.rest()):
            self.send(piece)
        reason = "stop" if self.text.ended else "length"
        self.end(Reply(self.text.whole(), reason, (len(self.ids), self.text.count)))

    def end(self, last: Reply | Exception) -> None:
        if not self.done:
            self.done = True
            self.send(last)

    @property
    def idle(self) -> bool:
        """Whether no more tokens are wanted."""
        return self.done or self.gone


class Reader:
    """Makes the jobs of requests to one run. `defaults`: generation settings where a request names none.

    A chat is formatted as the run's training rows are (model/reply.py), like a prompt of `trimtab generate`.
    """

    def __init__(self, made: Inference, defaults: dict[str, Any]):
        self.model, self.tokenizer, self.data = made.model, made.tokenizer, made.recipe.data
        self.form = form_of(made.recipe, made.base.reply, self.tokenizer)
        self.places = learned_positions(self.model)
        for key, why in REFUSED.items():
            if key in defaults:
                raise BadInput(f"serve with {key}", why, "Remove it; max_new_tokens sets the limit of a reply")
        self.defaults = dict(defaults)
        whole = settings_of(self.model, self.tokenizer, self.form, self.defaults)
        self.ends, self.stops = whole["eos_token_id"], whole.get("stop_strings", [])
        self.ends = self.ends if isinstance(self.ends, list) else [self.ends]
        for key in ("eos_token_id", "stop_strings"):
            self.defaults.pop(key, None)
        longest = self.form.max_tokens(self.data.reply_tokens, TALK)
        self.new: int = self.defaults.pop("max_new_tokens", longest)

    def jobs(self, ask: Ask, send: Callable[[int, str | Reply | Exception], None]) -> list[Job]:
        """One job per prompt; `send` gets the prompt's number first. BadInput for what the model cannot read."""
        settings = {"do_sample": False, **check_generation({**self.defaults, **ask.settings})}
        settings["eos_token_id"] = self.ends
        jobs = []
        for at, prompt in enumerate(ask.prompts):
            ids = self._ids(prompt, f"reply to prompt {at + 1}")
            text = Growing(self.tokenizer, self.ends, [*ask.stops, *self.stops], ask.chat, ask.stream)
            seed = None if ask.seed is None else ask.seed + at
            jobs.append(Job(ids, self._limit(ask.new or self.new, len(ids)), settings, seed, text, _to(send, at)))
        return jobs

    def _ids(self, prompt: Any, asked: str) -> list[int]:
        if isinstance(prompt, list) and isinstance(prompt[0], dict):
            prompt = self._conversation(prompt)
        given = isinstance(prompt, list) and isinstance(prompt[0], int)
        ids = prompt if given else prompt_ids(self.tokenizer, prompt)
        check_ids(self.model, ids, asked)
        return ids

    def _conversation(self, messages: list[dict[str, str]]) -> Any:
        """The messages, with the recipe's system message if they have none; a text if the run knows no chats."""
        last = messages[-1]
        made = self.form.prompt(self.tokenizer, last["content"], self.data.system, self.data.chat)
        if isinstance(made, str):
            if len(messages) > 1 or last["role"] != "user":
                raise BadInput(
                    f"reply to a conversation of {len(messages)} messages",
                    "the run was trained on plain prompts, not on conversations", "Send one message, of the user",
                )  # fmt: skip
            return made
        own = any(message["role"] == "system" for message in messages)
        return messages if own else [*made[:-1], *messages]

    def _limit(self, new: int, width: int) -> int:
        """The limit of a reply to `width` tokens, within the positions that the model has learned."""
        if self.places is None:
            return new
        if width >= self.places:
            have = f"the model has learned {self.places} positions"
            raise Refused(413, f"reply to a prompt of {width} tokens", have, "Send a shorter prompt",
                          "context_length_exceeded")  # fmt: skip
        return min(new, self.places - width)


def _to(send: Callable[[int, Any], None], at: int) -> Callable[[Any], None]:
    def one(event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            send(at, event)

    return one
