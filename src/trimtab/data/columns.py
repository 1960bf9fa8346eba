"""Maps a file's columns to ours and reads single values; errors name the file and line.

A row's form is one of `messages`, `conversations`, `prompt`+`completion`, `question`+`answer`, `instruction`+`output`,
`text` (causal-lm), or `text`+`label` (classification, where the text may also be `sentence`, `sentence1`+`sentence2`
and the like).
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import BadInput, nearest
from .files import Table
from .spec import DataSpec

MESSAGE = 'Each message is {"role": ..., "content": ...}'
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"))
# For causal-lm, in order of preference. Alpaca's own rows have a text column beside instruction + output.
FORMS = (("messages",), ("conversations",), ("prompt", "completion"), ("question", "answer"),
         ("instruction", "output"), ("text",))  # fmt: skip
OPTIONAL = {"messages": ("tools", "system"), "conversations": ("tools", "system"),
            "instruction": ("input", "tools", "system", "history")}  # fmt: skip
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
         "system": "system", "tool": "tool", "observation": "tool"}  # fmt: skip


def name_columns(table: Table, spec: DataSpec, task: str) -> dict[str, str]:
    """{our column: the file's}. The first row decides; `Reader` requires the same columns of every other row."""
    there = list(table.rows[0])
    for ours, theirs in spec.columns.items():
        if theirs not in there:
            have = f"{table.where(0)} has the columns {', '.join(map(str, there)) or '(none)'}"
            raise BadInput(f'data.columns: {ours}: "{theirs}"', have, nearest(theirs, map(str, there)))
    taken = set(spec.columns.values())
    names = {name: name for name in there if name not in taken} | dict(spec.columns)
    if task == "classification":
        first = next(((a, b) for a, b in PAIRS if a in names and b in names), None)
        if "text" not in names and first:
            names["text"], names["text_pair"] = names[first[0]], names[first[1]]
        elif "text" not in names and "sentence" in names:
            names["text"] = names["sentence"]
        forms: tuple[tuple[str, ...], ...] = (("text", "label"),)
    else:
        forms = tuple(sorted(FORMS, key=lambda form: -sum(name in spec.columns for name in form)))
    form = next((form for form in forms if all(name in names for name in form)), None)
    if form is None:
        wanted = " or ".join(" + ".join(form) for form in forms)
        raise BadInput(
            f"use {table.where(0)} for {task}",
            f"its columns are {', '.join(map(str, there)) or '(none)'}, and {wanted} is needed",
            "Map the columns, as in data.columns: {" + ", ".join(f"{name}: ..." for name in forms[0]) + "}",
        )
    optional = [name for name in OPTIONAL.get(form[0], ("tools", "text_pair")) if name in names]
    return {name: names[name] for name in [*form, *optional]}


class Reader:
    """Reads checked values from a table's rows by our names for the columns."""

    def __init__(self, table: Table, names: dict[str, str]):
        self.table, self.names = table, names

    def __len__(self) -> int:
        return len(self.table.rows)

    def get(self, index: int, ours: str) -> Any:
        row, theirs = self.table.rows[index], self.names[ours]
        if theirs not in row:
            have = f"it has no column {theirs}, only {', '.join(row) or '(none)'}"
            raise BadInput(f"read {self.table.where(index)}", have, "Give every row the same columns")
        return row[theirs]

    def wrong(self, index: int, ours: str, have: str, do: str) -> BadInput:
        return BadInput(f"read {self.table.where(index)}", f"{self.names[ours]} {have}", do)

    def text(self, index: int, ours: str) -> str:
        return self.check_text(index, ours, self.get(index, ours))

    def check_text(self, index: int, ours: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.wrong(index, ours, f"is {kind(value)}, not text", 'Write it in quotes, "like this"')
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise self.wrong(index, ours, "has half a surrogate pair", "Write valid Unicode") from None
        return value

    def texts(self, index: int, ours: str) -> list[str]:
        """One text or a list of them (accepted answers), never empty; also in SQuAD's format, {"text": [...]}."""
        value = self.get(index, ours)
        if isinstance(value, dict) and isinstance(value.get("text"), list):
            value = value["text"]
        values = value if isinstance(value, list) else [value]
        if not values:
            raise self.wrong(index, ours, "is an empty list", "Give one answer or more")
        return [self.check_text(index, ours, item) for item in values]

    def optional(self, index: int, ours: str) -> Any:
        """A value of a column that is optional in each row; None if it is missing or empty."""
        return self.table.rows[index].get(self.names[ours]) or None if ours in self.names else None

    def optional_text(self, index: int, ours: str) -> str:
        value = self.optional(index, ours)
        return "" if value is None else self.check_text(index, ours, value)

    def messages(self, index: int, ours: str) -> list[dict[str, Any]]:
        """Messages with `role` and `content`, from either of the two formats."""
        value = self.get(index, ours)
        if not isinstance(value, list) or not value:
            raise self.wrong(index, ours, f"is {kind(value)}, not a list of messages", MESSAGE)
        return [self._message(index, ours, message) for message in value]

    def _message(self, index: int, ours: str, message: Any) -> dict[str, Any]:
        if isinstance(message, dict) and "role" not in message and isinstance(message.get("from"), str):
            if message["from"] not in ROLES:
                have = f'has a message from "{message["from"]}"'
                raise self.wrong(index, ours, have, nearest(message["from"], ROLES))
            rest = {key: value for key, value in message.items() if key not in ("from", "value")}
            message = {"role": ROLES[message["from"]], "content": message.get("value"), **rest}
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise self.wrong(index, ours, "has a message without a role", MESSAGE)
        content = message.get("content")
        if isinstance(content, list):
            message = {**message, "content": "".join(self._part(index, ours, part) for part in content)}
        elif content is not None or not message.get("tool_calls"):
            self.check_text(index, ours, content)
        return message

    def _part(self, index: int, ours: str, part: Any) -> str:
        """The text of one part of a message's content."""
        if not isinstance(part, dict) or part.get("type") != "text":
            named = part.get("type") if isinstance(part, dict) else None
            have = f'has a part of the type "{named}" in a message' if named else f"has {kind(part)} in a message"
            raise self.wrong(index, ours, have, 'Only text is trained on: {"type": "text", "text": ...}')
        return self.check_text(index, ours, part.get("text"))


def kind(value: Any) -> str:
    name = "null" if value is None else type(value).__name__
    article = "an" if name[0] in "aeiou" else "a"
    return name if value is None else f"{article} {name} ({json.dumps(value, default=str)[:40]})"
