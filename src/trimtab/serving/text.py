"""The text of a reply while it grows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

UNFINISHED = "\ufffd"  # decoded from the first bytes of a letter


class Growing:
    """Decodes the tokens of one reply, up to an end token (`ends`) or a stop word, as `model/sampling.reply_text` does.

    `add` returns the text that no later token can change: not what may be the beginning of a stop word, nor the first
    bytes of a letter, nor (with `strip`) white space at the end.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], stops: Sequence[str], strip: bool, streamed: bool):
        self.tokenizer, self.ends, self.stops, self.strip = tokenizer, ends, stops, strip
        self.streamed = streamed
        self.ids: list[int] = []
        self.count = 0  # of tokens, the end token included
        self.ended = False
        self._sent = 0  # characters

    def add(self, token: int) -> str:
        self.count += 1
        if token in self.ends:
            self.ended = True
        else:
            self.ids.append(token)
        if self.ended or not (self.streamed or self.stops):
            return ""
        text = self._decoded()
        self.ended = self._cut(text) < len(text)
        return self._new(self._stable(text)) if self.streamed and not self.ended else ""

    def whole(self) -> str:
        text = self._decoded()
        text = text[: self._cut(text)]
        return text.strip() if self.strip else text

    def rest(self) -> str:
        """What `add` has not returned."""
        return self._new(self.whole())

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def _cut(self, text: str) -> int:
        return min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=len(text))

    def _stable(self, text: str) -> str:
        text = text.rstrip(UNFINISHED)
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        text = text[: len(text) - held]
        return text.strip() if self.strip else text

    def _new(self, text: str) -> str:
        new, self._sent = text[self._sent :], max(self._sent, len(text))
        return new


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
