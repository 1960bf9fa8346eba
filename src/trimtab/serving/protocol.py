"""Requests and responses of OpenAI's API: bodies are read and checked, replies and errors get their form.

A field that the server cannot honour is refused, unless its value asks for what happens anyway (`n: 1`). Fields that
name the caller (`user`) do not concern the reply and are accepted. Importing this module loads no torch.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput, DoesNotFit, Stopped, TrimtabError, nearest

LOCAL = ("127.0.0.1", "localhost", "::1")  # this machine's names for itself
MOST_BYTES = 2**20  # of a request's body
MOST_TOKENS = 1_000_000  # of a reply
MOST_STOPS = 16  # stop words of a request
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # named as in transformers
SUPPORTED = (*SAMPLING, "model", "max_tokens", "stop", "seed", "stream", "stream_options")
CALLER = ("user", "safety_identifier", "prompt_cache_key", "metadata")
NEUTRAL: dict[str, tuple] = {  # field -> the values that change nothing
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False, 0), "top_logprobs": (0,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "store": (False,), "tools": ([],),
    "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}  # fmt: skip
OF_CHAT = {"messages", "max_completion_tokens"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Refused(TrimtabError):
    """A request that is not answered, with its HTTP status. `code`: OpenAI's word for the reason, if it has one."""

    def __init__(self, status: int, asked: str, have: str, do: str, code: str | None = None):
        super().__init__(asked, have, do)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Ask:
    """A checked request. `prompts`: texts, lists of token ids, or one list of messages. `settings`: those of SAMPLING.
    `new`: the limit of each reply in tokens; None: the server's. `usage`: count tokens at the end of a stream."""

    chat: bool
    prompts: list[Any]
    settings: dict[str, Any]
    new: int | None
    stops: list[str]
    seed: int | None
    stream: bool
    usage: bool


@dataclass(frozen=True)
class Reply:
    """`text` is whole, also after a stream. `reason`: "stop", or "length" if it was cut. `tokens`: of prompt, reply."""

    text: str
    reason: str
    tokens: tuple[int, int]


# --- requests --------------------------------------------------------------------------------------------------------


def read_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request, without fields that are null."""
    do = "Send one JSON object"
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadInput("read the request's body as JSON", f"it is not valid ({why})", do) from None
    if not isinstance(found, dict):
        raise BadInput("read the request's body", f"it is a JSON {type(found).__name__}", do)
    return {key: value for key, value in found.items() if value is not None}


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def read_ask(body: dict[str, Any], name: str, chat: bool) -> Ask:
    """Checks a request to the model `name`, for a chat completion or a completion."""
    _check_fields(body, chat)
    asked = body.get("model", name)
    if asked != name:
        raise Refused(404, f"model {asked!r}", f"this server has {name!r} only", f"Send model: {name!r}",
                      "model_not_found")  # fmt: skip
    limits = {body[key] for key in ("max_tokens", "max_completion_tokens") if key in body and _whole(key, body[key])}
    if len(limits) > 1:
        have = "max_tokens and max_completion_tokens differ"
        raise BadInput("limit the reply", have, "Send one of them")
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise BadInput(f"stream_options: {options!r}", "only include_usage is supported", "Leave the rest out")
    if options.get("include_obfuscation"):
        raise BadInput("stream_options: include_obfuscation", "this server does not support it", "Leave it out")
    return Ask(
        chat=chat,
        prompts=[_messages(body.get("messages"))] if chat else _prompts(body.get("prompt")),
        settings={key: body[key] for key in SAMPLING if key in body},
        new=limits.pop() if limits else None,
        stops=_stops(body.get("stop", [])),
        seed=_seed(body.get("seed")),
        stream=_flag(body, "stream"),
        usage=_flag(options, "include_usage"),
    )


def _check_fields(body: dict[str, Any], chat: bool) -> None:
    known = {*SUPPORTED, *CALLER, *NEUTRAL, *(OF_CHAT if chat else {"prompt"})}
    for key, value in body.items():
        if key not in known:
            raise BadInput(f'request: "{key}"', "this server has no such field", nearest(key, known))
        if key in NEUTRAL and not any(value == one and type(value) is type(one) for one in _alike(NEUTRAL[key])):
            raise BadInput(f"request: {key}: {value!r}", "this server does not support it", "Leave it out")


def _alike(values: tuple) -> list[Any]:
    """`values`, whole numbers also as 1.0."""
    return [*values, *(float(value) for value in values if type(value) is int)]


def _whole(key: str, value: Any) -> bool:
    if type(value) is not int or not 1 <= value <= MOST_TOKENS:
        raise BadInput(f"request: {key}: {value!r}", f"it is not a whole number from 1 to {MOST_TOKENS:,}", "Change it")
    return True


def _flag(values: dict[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise BadInput(f"request: {key}: {value!r}", "it is neither true nor false", "Change it")
    return value


def _seed(value: Any) -> int | None:
    if value is not None and (type(value) is not int or not -(2**63) <= value < 2**63):
        raise BadInput(f"request: seed: {value!r}", "it is not a whole number of 64 bits", "Change it")
    return value


def _stops(value: Any) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > MOST_STOPS or not all(_is_text(one) and one for one in found):
        have = f"it is not a text, nor a list of at most {MOST_STOPS} texts"
        raise BadInput(f"request: stop: {value!r}", have, 'Send e.g. ["END"]')
    return found


def _is_text(value: Any) -> bool:
    """Whether `value` is a text that UTF-8 can write (JSON can hold halves of surrogate pairs, which it cannot)."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _prompts(value: Any) -> list[Any]:
    """`prompt` may be a text, a list of token ids, or a list of either."""
    ids = isinstance(value, list) and bool(value) and all(type(one) is int for one in value)
    found = [value] if isinstance(value, str) or ids else value
    if not isinstance(found, list) or not found or not all(_is_text(one) or _is_ids(one) for one in found):
        raise BadInput("request: prompt", "it is neither a text, nor token ids, nor a list of these", "Send a text")
    return found


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and 0 <= one < 2**31 for one in value)


def _messages(value: Any) -> list[dict[str, str]]:
    """Messages with a role and a text each, for a chat template."""
    if not isinstance(value, list) or not value:
        raise BadInput("request: messages", "it is not a list of messages", 'Send [{"role": "user", "content": "..."}]')
    return [_message(one, f"messages, number {at}") for at, one in enumerate(value, 1)]


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise BadInput(f"request: {where}", "it is not an object", 'Send {"role": "user", "content": "..."}')
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise BadInput(f"request: {where}: role: {role!r}", "this server does not know it", nearest(str(role), ROLES))
    if more := [key for key, held in value.items() if key not in ("role", "content") and held]:
        raise BadInput(f"request: {where}: {more[0]}", "this server does not support it", "Leave it out")
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise BadInput(f"request: {where}: content", "it is neither a text nor a list of parts", "Send a text")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    if not all(map(_is_text, texts)):
        raise BadInput(f"request: {where}: content", "a part of it is not text", "Send texts only")
    return {"role": ROLES[role], "content": "".join(texts)}


# --- responses -------------------------------------------------------------------------------------------------------


class Form:
    """The responses to one request for the model `name`: whole, or as the chunks of a stream."""

    def __init__(self, ask: Ask, name: str):
        self.ask = ask
        self.head = {"id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
                     "model": name}  # fmt: skip
        self.kind = "chat.completion" if ask.chat else "text_completion"

    def whole(self, replies: list[Reply]) -> dict[str, Any]:
        choices = []
        for index, reply in enumerate(replies):
            said = {"message": {"role": "assistant", "content": reply.text, "refusal": None}} if self.ask.chat else {
                "text": reply.text}  # fmt: skip
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reply.reason})
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage(replies)}

    def begin(self) -> list[dict[str, Any]]:
        """The chunks before any text."""
        return [self._chunk(0, {"role": "assistant", "content": ""}, None)] if self.ask.chat else []

    def piece(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"content": text} if self.ask.chat else text, None)

    def end(self, index: int, reply: Reply) -> dict[str, Any]:
        return self._chunk(index, {} if self.ask.chat else "", reply.reason)

    def last(self, replies: list[Reply]) -> list[dict[str, Any]]:
        """The chunks after the ends of all replies."""
        return [{**self._head(), "choices": [], "usage": usage(replies)}] if self.ask.usage else []

    def _head(self) -> dict[str, Any]:
        return {**self.head, "object": self.kind + (".chunk" if self.ask.chat else "")}

    def _chunk(self, index: int, said: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta" if self.ask.chat else "text": said, "logprobs": None, "finish_reason": reason}
        return {**self._head(), "choices": [choice], **({"usage": None} if self.ask.usage else {})}


def usage(replies: list[Reply]) -> dict[str, int]:
    prompt, new = (sum(reply.tokens[at] for reply in replies) for at in (0, 1))
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def status_of(error: Exception) -> int:
    """The HTTP status of a request that ended with `error`."""
    if isinstance(error, Refused):
        return error.status
    return {BadInput: 400, DoesNotFit: 413, Stopped: 413}.get(type(error), 400 if isinstance(error, BadInput) else 500)


def error_body(error: Exception) -> dict[str, Any]:
    """`error` as OpenAI's API reports one. What is in a bug's message stays in the server's log."""
    status = status_of(error)
    known = isinstance(error, TrimtabError)
    message = str(error) if known else "reply to the request: a bug in trimtab. The server's log has the traceback."
    code = error.code if isinstance(error, Refused) else "does_not_fit" if status == 413 else None
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    message = message.encode(errors="replace").decode()  # it may quote half of a surrogate pair
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
