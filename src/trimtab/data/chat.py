"""Chat templates of rows: the one in use, whether it accepts the rows, and the format of replies that rows teach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, nearest
from ..model.reply import QUESTION_END, ReplyForm, longest_answer, refused_by_template, stop_texts, through_template
from .columns import Reader
from .spec import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The template that most chat models derive from. With its {% generation %} marks all assistant turns are trained on.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LARGEST = 1_000_000  # bytes of a template


def template_of(spec: DataSpec) -> str | None:
    """The text of `data.chat_template`; None if the recipe names none."""
    name = spec.chat_template
    if name is None or name == "chatml":
        return CHATML if name else None
    path, asked = Path(name).expanduser(), f"data.chat_template: {name[:200]}"
    if not path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BadInput(asked, "it is neither chatml nor a file", nearest(path.name, ["chatml", *beside]))
    try:
        if path.stat().st_size > LARGEST:
            raise BadInput(asked, "the file is larger than 1 MB", "Name a chat template in Jinja")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(asked, f"it cannot be read ({error})", "Save the file as UTF-8") from None


def use_template(spec: DataSpec, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Replace the tokenizer's template by `data.chat_template`, if there is one."""
    if tokenizer is not None and (text := template_of(spec)) is not None:
        tokenizer.chat_template = text


def check_renders(reader: Reader, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase | None) -> None:
    """BadInput, with file and line, for a row that the chat template refuses. Renders one row per sequence of roles."""
    seen: set[tuple] = set()
    for index, row in enumerate(rows):
        messages = row.get("messages") or row.get("prompt")
        if tokenizer is None or not isinstance(messages, list):
            return
        messages = messages + row.get("completion", [])
        shape = (*((message["role"], *message) for message in messages), row.get("tools") is None)
        if shape in seen:
            continue
        seen.add(shape)
        try:
            through_template(tokenizer, messages, tools=json.loads(row.get("tools") or "null"), tokenize=False)
        except Exception as error:  # a template is a program by someone else and may raise anything
            raise refused_by_template(reader.table.where(index), error) from None


def reply_form(
    rows: Any, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, eos_token: str | None = None
) -> ReplyForm:
    """The format of replies that rows (data.rows.Rows) teach; the default for a classifier's rows. `eos_token`: that of
    `training`."""
    if rows.labels is not None or rows.regression:
        return ReplyForm()
    if rows.form == "text":
        return ReplyForm(False, eos_token=eos_token, template=template_of(spec))
    names = rows.dataset.column_names
    first = rows.dataset[0]["messages" if "messages" in names else "prompt"]
    chat = not isinstance(first, str)
    answers = [text for accepted in rows.answers for text in accepted]
    return ReplyForm(
        chat,
        QUESTION_END if not chat and rows.form in ("question + answer", "instruction + output") else "",
        longest_answer(tokenizer, rows.answers),
        stop_texts(tokenizer, answers) if chat else [],
        eos_token,
        template_of(spec),
    )
