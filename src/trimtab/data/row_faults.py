"""What can be wrong with one row of training data, found without a model: roles, answers, encoding, language, secrets.

A row is looked at as turns, (role, text): a conversation's messages, a question with its answer, or one text. The rules
prefer to miss a fault over a false alarm: real rows break every rule that is stricter.
"""

from __future__ import annotations

import bisect
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .columns import ROLES

Turn = tuple[str, str]  # role, text
KNOWN_ROLES = {*ROLES.values(), *"developer function function_call function_response tool_call tool_response".split()}

# --- roles and answers -----------------------------------------------------------------------------------------------


def role_faults(turns: list[Turn], calls: list[bool]) -> Iterator[tuple[str, str]]:
    """(kind, detail) for turns whose roles do not alternate, and for empty ones. `calls[i]`: turn i calls tools."""
    before = ""
    for index, (role, text) in enumerate(turns):
        if role not in KNOWN_ROLES:
            yield "roles", f"turn {index + 1} has the unknown role {role[:20]!r}"
        elif role == "system" and index:
            yield "roles", f"turn {index + 1} is a system message, which only the first may be"
        elif role == before and role in ("user", "assistant"):
            yield "roles", f"turns {index} and {index + 1} are both of {role}"
        elif role == "assistant" and before in ("", "system"):
            yield "roles", "the assistant speaks first"
        if not text.strip() and not calls[index]:
            yield "empty", f"turn {index + 1}, of {role[:20]}, is empty"
        before = role
    if before in ("user", "system"):
        yield "roles", "the last turn has no answer"


END_MARKS = ".!?…\"'”’»)]}*_`>。！？：|~=/%"
LINKING = "a an the and or of to with in for that which because is are was by from as"
HANGING = re.compile(rf"(?:[,;(–—\[{{]|\b(?:{LINKING.replace(' ', '|')}))$")
SUFFIXES = "s es d ed ing ly r er y n al".split()
LONG_ENOUGH = 60  # characters: shorter answers may be names or phrases


class Words:
    """How often each word occurs in all rows, and which words begin with one."""

    def __init__(self, texts: Iterable[str]):
        self.count = Counter(word for text in texts for word in words_of(text))
        self._sorted = sorted(self.count)

    def broken_off(self, word: str) -> bool:
        """Whether `word` occurs once, and is the beginning of another word that is no inflected form of it."""
        if self.count[word] != 1 or any(word + suffix in self.count for suffix in SUFFIXES):
            return False
        after = bisect.bisect_right(self._sorted, word)
        return after < len(self._sorted) and self._sorted[after].startswith(word)


def cut_answer(text: str, words: Words) -> str:
    """Why the answer seems cut off, or "".

    An answer is cut if a block of code stays open, if (with 60 characters and more) it ends in a comma or a word that
    needs another, or if it has sentences and its last word seems broken off.
    """
    if text.count("```") % 2:
        return "a block of code is not closed"
    text = text.rstrip()
    if len(text) < LONG_ENOUGH or text[-1] in END_MARKS:
        return ""
    if HANGING.search(text.lower()):
        return f"it ends in {text[-20:]!r}"
    last = re.search(r"[^\W\d_]+$", text)
    if last and len(last[0]) > 1 and last[0].islower() and re.search(r"[.!?]\s", text) and words.broken_off(last[0]):
        return f"its last word is {last[0]!r}"
    return ""


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


# --- encoding --------------------------------------------------------------------------------------------------------

# UTF-8 that was read as Windows-1252: a letter and its continuation byte
_REST = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
MOJIBAKE = re.compile(f"[ÂÃ]{_REST}|â€{_REST}|ï»¿|(?:[ÐÑ]{_REST}){{3}}|ðŸ{_REST}")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")


def encoding_fault(text: str) -> str:
    """What is wrong with the characters of a text, or ""."""
    if text.isascii() and not CONTROL.search(text):
        return ""
    if "\ufffd" in text:
        return "it has U+FFFD, which stands for bytes that could not be decoded"
    if any("\ud800" <= ch <= "\udfff" for ch in text):
        return "it has half a surrogate pair"
    if found := MOJIBAKE.search(text):
        return f"{found[0]!r} is UTF-8 that was read as another encoding"
    if found := CONTROL.search(text):
        return f"it has the control character {found[0]!r}"
    return ""


# --- languages -------------------------------------------------------------------------------------------------------

# frequent words that few other of these languages share
COMMON = {
    "en": "the and of is that you for with this are have not what your can",
    "de": "der die und das ist nicht ein eine mit auf für sie ich den wie",
    "fr": "le les et est une dans des que pour vous pas sur qui du avec",
    "es": "el los y es una por las que del para como con su está más",
    "it": "il di che è un una per non con gli sono della del nel più",
    "pt": "o os e não uma para com que do da em por mais você são",
    "nl": "de het een en van is niet dat met op voor zijn ik je ook",
}
_OF_WORD: dict[str, list[str]] = {}
for _name, _common in COMMON.items():
    for _word in _common.split():
        _OF_WORD.setdefault(_word, []).append(_name)
SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "HANGUL", "HIRAGANA", "KATAKANA", "CJK",
           "THAI", "BENGALI", "TAMIL", "ARMENIAN", "GEORGIAN")  # fmt: skip
LEAST_HITS = 5  # frequent words of a language, before a text counts as written in it


def language(text: str) -> str:
    """The language of a text ("en", ...), or its script ("cyrillic", ...); "" if it is too short to tell."""
    letters = [ch for ch in text[:2000] if ch.isalpha()]
    if len(letters) < 20:
        return ""
    scripts: Counter[str] = Counter()
    for ch in letters:
        name = unicodedata.name(ch, "").split(" ")[0]
        scripts[name if name in SCRIPTS else "other"] += 1
    script, many = scripts.most_common(1)[0]
    if script in ("HIRAGANA", "KATAKANA") or script == "CJK" and scripts["HIRAGANA"] * 8 > many:
        return "japanese"
    if script != "LATIN":
        return script.lower() if 2 * many > len(letters) else ""
    hits: Counter[str] = Counter(name for word in words_of(text) for name in _OF_WORD.get(word, ()))
    (first, most), *others = [*hits.most_common(2), ("", 0)]
    return first if most >= LEAST_HITS and most > 2 * others[0][1] else ""


# --- secrets ---------------------------------------------------------------------------------------------------------

SECRETS = {
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "an API key": re.compile(r"\bsk-(?:[a-z]+-)?[A-Za-z0-9_-]{24,}"),
    "a Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}"),
    "a Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a signed token": re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    "a password": re.compile(
        r"(?i)\b(?:password|passwd|secret|api[_-]?key|access[_-]?token)\s*[:=]\s*['\"]?"
        r"(?=[^\s'\"]*\d)(?=[^\s'\"]*[a-z])([^\s'\"<>{}()$]{8,})"
    ),
    "credentials in an address": re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s/:@]+:[^\s/@]{4,}@[\w.-]+"),
}


def secret(text: str) -> str:
    """What a text has that looks like a secret, or "". The secret itself is not repeated."""
    return next((name for name, pattern in SECRETS.items() if pattern.search(text)), "")


# --- a row as turns --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row as turns. `calls[i]`: turn i calls tools. `label`: of a classification row. `plain`: prompt + completion,
    which are not put into a chat template unless `data.chat` says so."""

    turns: list[Turn]
    calls: list[bool]
    label: str = ""
    plain: bool = False

    def chat(self, wanted: bool | None) -> bool:
        """Whether training renders the row by the chat template. `wanted`: data.chat."""
        return self.turns[0][0] != "text" and (not self.plain if wanted is None else wanted)

    @property
    def text(self) -> str:
        return "\n".join(text for _, text in self.turns) + ("\n" + self.label if self.label else "")

    @property
    def prompt(self) -> str:
        """All but the answer; "" for a plain text, which has none."""
        if self.label:
            return self.turns[0][1]
        last = max((i for i, (role, _) in enumerate(self.turns) if role == "assistant"), default=0)
        return "\n".join(text for _, text in self.turns[:last])

    @property
    def answer(self) -> str:
        return self.turns[-1][1] if self.turns and self.turns[-1][0] == "assistant" else ""


def row_of(row: dict[str, Any], names: dict[str, str]) -> Row | str:
    """The row as turns, by our names of its columns; or what is wrong with its columns."""
    for ours in ("messages", "conversations"):
        if ours in names:
            value = row.get(names[ours])
            if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
                return f"{names[ours]} is no list of messages"
            turns = [_turn(message) for message in value]
            return Row(turns, [bool(message.get("tool_calls")) for message in value])
    pair = next((p for p in (("question", "answer"), ("instruction", "output"), ("prompt", "completion"))
                 if p[0] in names), None)  # fmt: skip
    if pair is None:
        texts = [row.get(names[ours]) for ours in ("text", "text_pair") if ours in names]
        if not all(isinstance(text, str) for text in texts):
            return "its text is missing"
        joined = "\n".join(str(text) for text in texts)
        return Row([("text", joined)], [False], str(row.get(names["label"])) if "label" in names else "")
    asked, given = (row.get(names[ours]) for ours in pair)
    if isinstance(asked, list) and asked and all(isinstance(turn, dict) for turn in asked):
        before = [_turn(turn) for turn in asked]
    elif isinstance(asked, str):
        more = row.get(names["input"]) if "input" in names else None
        before = [("user", f"{asked}\n\n{more}" if isinstance(more, str) and more else asked)]
    else:
        return f"{names[pair[0]]} is missing"
    if isinstance(given, dict):  # SQuAD's format
        given = given.get("text")
    first = given[0] if isinstance(given, list) and given else given
    if isinstance(first, dict):
        turns = [*before, *(_turn(turn) for turn in given if isinstance(turn, dict))]
        return Row(turns, [False] * len(turns))
    if not isinstance(first, str):
        return f"{names[pair[1]]} is missing"
    plain = pair[0] == "prompt" and isinstance(asked, str)
    return Row([*before, ("assistant", first)], [False] * (len(before) + 1), plain=plain)


def _turn(message: dict[str, Any]) -> Turn:
    role = message.get("role")
    role = ROLES.get(str(message.get("from")), str(message.get("from"))) if role is None else role
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(role), content if isinstance(content, str) else ""
