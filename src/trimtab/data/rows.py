"""Common column layouts -> a data set that TRL's SFTTrainer understands, or a classification data set.

A row's *form* follows from its columns (data/columns.py). If there is a prompt, the loss is on the completion only; TRL
masks, renders chat templates and packs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, nearest
from ..model.reply import QUESTION_END
from .chat import check_renders, use_template
from .columns import Reader, kind, name_columns
from .files import read_table
from .spec import DataSpec

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
PADDED = re.compile(r"[+-]?0\d")  # "007" is a name, not the number 7


@dataclass
class Rows:
    """Rows ready to train on.

    `dataset`: only the columns that training needs. `form`: the form of the rows in the file. `assistant_only`: the
    caller must set TRL's `assistant_only_loss`. `labels`: the classes' names, None for regression and for causal-lm.
    `answers`: all accepted answers of each row, for evaluation. `regression`: `label` has floats.
    """

    dataset: Dataset
    form: str
    assistant_only: bool = False
    labels: list[str] | None = None
    regression: bool = False
    answers: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Lengths:
    """Rows over `max_length` tokens: their number, the longest row, and how many were cut or dropped."""

    over: int
    longest: int
    cut: int = 0
    dropped: int = 0


def read_rows(
    spec: DataSpec,
    part: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    task: str = "causal-lm",
    like: Rows | None = None,
) -> Rows:
    """-> the "train" or "test" rows of a spec. `like`: the training rows, whose classes the test rows must share."""
    use_template(spec, tokenizer)
    source = spec.train if part == "train" else spec.test
    if not source:
        raise BadInput(f"read data.{part}", "the recipe does not name it", f"Add data.{part}: a file or a hub id")
    table = read_table([source] if isinstance(source, str) else list(source), spec.limit, part)
    renamed = name_columns(table, spec, task)
    if task == "classification":
        for name in ("system", "chat_template", "chat"):
            if getattr(spec, name):
                raise BadInput(f"data.{name}", "the rows of a classifier are plain text, not a chat", "Remove the key")
        return _classification(Reader(table, renamed), like)
    return _causal(Reader(table, renamed), spec, tokenizer)


def eval_pairs(rows: Rows) -> list[tuple[Any, list[str]]]:
    """-> (prompt, accepted answers) of each row. A prompt is text, or messages if the row is a conversation.

    `row_tools` returns the tools to pass to the template.
    """
    if not rows.answers:
        raise BadInput(
            f"ask the questions of {rows.form} rows", "they have no answers", "Use question and answer columns"
        )
    if rows.assistant_only:
        prompts = [messages[: _last_assistant(messages)] for messages in rows.dataset["messages"]]
    else:
        prompts = list(rows.dataset["prompt"])
    return list(zip(prompts, rows.answers, strict=True))


def row_tools(rows: Rows) -> list[Any]:
    """The tools of each row, as the chat template takes them; None for a row without tools."""
    if "tools" not in rows.dataset.column_names:
        return [None] * len(rows.dataset)
    return [json.loads(tools) if isinstance(tools, str) else tools for tools in rows.dataset["tools"]]


def tokenize_classification(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    too_long: str = "error",
    where: str = "train",
) -> tuple[Dataset, Lengths]:
    """-> (input_ids, attention_mask, ..., labels) of each row, unpadded, and what `too_long` did."""
    from datasets import Dataset

    pair = list(rows.dataset["text_pair"]) if "text_pair" in rows.dataset.column_names else None
    text = list(rows.dataset["text"])
    encoded = dict(tokenizer(text, pair, verbose=False))
    full = Dataset.from_dict({**encoded, "labels": list(rows.dataset["label"])})
    if max_length is None or too_long != "cut":
        return check_lengths(full, max_length, too_long, where)
    sizes = [len(ids) for ids in encoded["input_ids"]]
    over = sum(size > max_length for size in sizes)
    if over:  # the tokenizer keeps its special tokens when it cuts
        encoded = dict(tokenizer(text, pair, truncation=True, max_length=max_length))
        full = Dataset.from_dict({**encoded, "labels": list(rows.dataset["label"])})
    return full, Lengths(over, max(sizes), cut=over)


def check_lengths(
    dataset: Dataset, max_length: int | None, too_long: str = "error", where: str = "train",
    truncation_mode: str = "keep_start",
) -> tuple[Dataset, Lengths]:  # fmt: skip
    """Refuse ("error"), cut ("cut") or drop ("drop") rows of `input_ids` longer than `max_length` tokens.
    `truncation_mode`: which part of a cut row is kept, "keep_start" or "keep_end".

    A row whose trained tokens are all cut away is dropped too.
    """
    sizes = [len(ids) for ids in dataset["input_ids"]]
    longest = max(sizes, default=0)
    over = [index for index, size in enumerate(sizes) if max_length is not None and size > max_length]
    if not over:
        return dataset, Lengths(0, longest)
    if too_long == "error":
        raise BadInput(
            f"train on data.{where} with max_length {max_length}" if where == "train" else f"use data.{where}",
            f"{len(over)} of {len(sizes)} rows have more than {max_length} tokens, the longest {longest}",
            f"Set training.max_length to {longest}, or use data.too_long=cut or data.too_long=drop",
        )
    gone, kept_part = set(over), slice(-max_length, None) if truncation_mode == "keep_end" else slice(max_length)
    if too_long == "cut":
        mask = next(
            (name for name in ("completion_mask", "assistant_masks", "labels") if name in dataset.column_names), None
        )
        off = -100 if mask == "labels" else 0
        trained = dataset[mask] if mask else None
        gone = {i for i in over if trained is not None and all(value == off for value in trained[i][kept_part])}
    if len(gone) == len(sizes):
        raise BadInput(
            f"use data.{where}",
            f"no row is left within {max_length} tokens",
            f"Raise training.max_length, up to {longest}",
        )
    kept = dataset.select([index for index in range(len(sizes)) if index not in gone]) if gone else dataset
    if too_long == "cut":
        kept = _cut(kept, kept_part)
    return kept, Lengths(len(over), longest, cut=len(over) - len(gone), dropped=len(gone))


def _cut(dataset: Dataset, kept_part: slice) -> Dataset:
    from datasets import Dataset

    columns = {name: list(dataset[name]) for name in dataset.column_names}
    sizes = [len(ids) for ids in columns["input_ids"]]
    for name, values in columns.items():
        if all(isinstance(v, list) and len(v) == n for v, n in zip(values, sizes, strict=True)):
            columns[name] = [value[kept_part] for value in values]
    return Dataset.from_dict(columns, features=dataset.features)


# Causal language modelling


def _causal(reader: Reader, spec: DataSpec, tokenizer: PreTrainedTokenizerBase | None) -> Rows:
    template = getattr(tokenizer, "chat_template", None)
    if spec.chat and not template:
        raise BadInput(
            "data.chat: true", "the tokenizer has no chat template", "Use a chat model, or set data.chat to false"
        )
    rows: list[dict[str, Any]] = []
    answers: list[list[str]] = []
    assistant_only = False
    talk = next((name for name in ("messages", "conversations") if name in reader.names), None)
    if talk:
        form, assistant_only = talk, bool(template) and marks_answers(template)
        if spec.chat is False or not template:
            raise BadInput(
                f"train on {talk}",
                "no chat template is in use",
                "Use a chat model, or set data.chat_template: chatml, and leave data.chat out",
            )
        for index in range(len(reader)):
            system = reader.optional_text(index, "system") or spec.system
            messages = _with_system(reader.messages(index, talk), system)
            last = _last_assistant(messages)
            if last < 1:
                raise reader.wrong(index, talk, "has no assistant turn after a prompt", "Each row needs an answer")
            rows.append({"messages": messages} if assistant_only
                        else {"prompt": messages[:last], "completion": [messages[last]]})  # fmt: skip
            answers.append([messages[last].get("content") or ""])
    elif "text" in reader.names:
        form = "text"
        rows = [{"text": reader.text(index, "text")} for index in range(len(reader))]
        if (empty := next((index for index, row in enumerate(rows) if not row["text"]), None)) is not None:
            raise reader.wrong(empty, "text", "is empty", "Remove the row")
    else:
        form = next(" + ".join(pair) for pair in (("question", "answer"), ("instruction", "output"),
                                                  ("prompt", "completion")) if pair[0] in reader.names)  # fmt: skip
        ask, reply = form.split(" + ")
        chat = bool(template) if spec.chat is None and ask != "prompt" else bool(spec.chat)
        for index in range(len(reader)):
            row, accepted = _pair(reader, index, ask, reply, chat, spec.system)
            rows.append(row)
            answers.append(accepted)
    for name in ("system", "chat_template"):
        if getattr(spec, name) and not isinstance(rows[0].get("prompt", rows[0].get("messages")), list):
            have = f"the {form} rows are plain text, not a chat"
            raise BadInput(f"data.{name}", have, f"Set data.chat to true, or remove data.{name}")
    if "tools" in reader.names:
        for index, row in enumerate(rows):
            tools = reader.get(index, "tools")
            row["tools"] = tools if isinstance(tools, str) or tools is None else json.dumps(tools)
            _check_tools(reader, index, row["tools"])
    check_renders(reader, rows, tokenizer)
    return Rows(_dataset(rows, reader), form, assistant_only, answers=answers)


def _check_tools(reader: Reader, index: int, tools: str | None) -> None:
    try:
        read = json.loads(tools or "null")
    except (ValueError, RecursionError):
        read = tools
    if read is not None and not isinstance(read, list):
        raise reader.wrong(index, "tools", f"is {kind(read)}, not a list of schemas", "Give a list, or a list as JSON")


def _pair(
    reader: Reader, index: int, ask: str, reply: str, chat: bool, system: str | None
) -> tuple[dict[str, Any], list[str]]:
    """One prompt/completion row, as text or as messages, and the accepted answers."""
    if isinstance(reader.get(index, ask), list):  # the prompt is a conversation already
        messages = _with_system(reader.messages(index, ask), system)
        given = reader.get(index, reply)
        if isinstance(given, list) and given and isinstance(given[0], dict):
            completion = reader.messages(index, reply)
            return {"prompt": messages, "completion": completion}, [completion[-1].get("content") or ""]
        accepted = reader.texts(index, reply)
        return {"prompt": messages, "completion": [_turn("assistant", accepted[0])]}, accepted
    question, accepted = reader.text(index, ask), reader.texts(index, reply)
    before: list[dict[str, str]] = []
    if ask == "instruction":
        more = reader.optional_text(index, "input")
        question = f"{question}\n\n{more}" if more else question
        before, own = _history(reader, index), reader.optional_text(index, "system")
        if (before or own) and not chat:
            name = "system" if own else "history"
            raise reader.wrong(index, name, "is given, and no chat template is in use", "Set data.chat_template")
        system = own or system
    if chat:
        prompt = _with_system([*before, _turn("user", question)], system)
        return {"prompt": prompt, "completion": [_turn("assistant", accepted[0])]}, accepted
    return {"prompt": question if ask == "prompt" else question + QUESTION_END, "completion": accepted[0]}, accepted


def _history(reader: Reader, index: int) -> list[dict[str, str]]:
    """Earlier turns of an Alpaca row: `history`, a list of [question, answer]."""
    turns, pairs = [], reader.optional(index, "history") or []
    if not isinstance(pairs, list):
        raise reader.wrong(index, "history", f"is {kind(pairs)}, not a list", "Give [question, answer] pairs")
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise reader.wrong(index, "history", f"has {kind(pair)}, not a pair", "Give [question, answer] pairs")
        asked, said = (reader.check_text(index, "history", text) for text in pair)
        turns += [_turn("user", asked), _turn("assistant", said)]
    return turns


def marks_answers(template: str | dict[str, str]) -> bool:
    """Whether a chat template marks the assistant's turns with {% generation %}, so that TRL can mask by turn."""
    text = template if isinstance(template, str) else template.get("default", "")
    return re.search(r"\{%-?\s*generation\b", text) is not None


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    return messages if not system or messages[0]["role"] == "system" else [_turn("system", system), *messages]


def _last_assistant(messages: list[dict[str, Any]]) -> int:
    """The index of the last assistant turn, -1 if there is none."""
    return max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)


def _dataset(rows: list[dict[str, Any]], reader: Reader) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    try:
        return Dataset.from_list(rows, on_mixed_types="use_json")
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        have = f"its rows do not share one type ({' '.join(str(error).split())[:200]})"
        raise BadInput(f"read {reader.table.sources[0][1]}", have, "Give each column one type throughout") from None


# Classification


def _classification(reader: Reader, like: Rows | None) -> Rows:
    texts = {
        name: [reader.text(i, name) for i in range(len(reader))]
        for name in ("text", "text_pair")
        if name in reader.names
    }
    values = _labels(reader, like)
    kinds = {type(value) for value in values}
    if str in kinds and len(kinds) > 1:
        odd = next(i for i, value in enumerate(values) if type(value) is not type(values[0]))
        raise reader.wrong(odd, "label", f"is {kind(values[odd])}, unlike the rows before", "Give all labels one type")
    regression = like.regression if like else float in kinds and any(value != int(value) for value in values)
    if regression:
        if str in kinds:
            raise reader.wrong(0, "label", f"is {kind(values[0])}", "The training rows have numeric labels")
        return Rows(_columns(texts, [float(value) for value in values]), "text + label", regression=True)
    values = [int(value) if isinstance(value, float) else value for value in values]
    names = like.labels if like and like.labels else [str(value) for value in sorted(set(values))]
    if like is None and len(names) < 2:
        raise BadInput("train a classifier", f"every row has the label {names[0]}", "Give rows with different labels")
    number = {name: index for index, name in enumerate(names)}
    unknown = next((i for i, value in enumerate(values) if str(value) not in number), None)
    if unknown is not None:
        have = f"is {kind(values[unknown])}, which no training row has"
        raise reader.wrong(unknown, "label", have, nearest(str(values[unknown]), names))
    return Rows(_columns(texts, [number[str(value)] for value in values]), "text + label", labels=names)


def _labels(reader: Reader, like: Rows | None) -> list[str | int | float]:
    """The labels, each text or a number.

    Quoted numbers are read as numbers if nothing is lost: all are numbers, none has a leading zero ("007"), and, except
    in CSV, which has no types, no two texts are the same number.
    """
    found = [reader.get(index, "label") for index in range(len(reader))]
    texts = {value for value in found if isinstance(value, str)}
    numeric = all(NUMBER.fullmatch(text) and not PADDED.match(text) for text in texts)
    numeric = numeric and (reader.table.untyped or len({float(text) for text in texts}) == len(texts))
    known = set(like.labels or ()) if like else set()
    values = []
    for index, value in enumerate(found):
        if isinstance(value, str):
            value = reader.check_text(index, "label", value)
            values.append(float(value) if numeric and value not in known else value)
        else:
            values.append(value)
        _check_label(reader, index, values[-1])
    return values


def _check_label(reader: Reader, index: int, value: Any) -> None:
    if isinstance(value, float) and value != value or value in (float("inf"), float("-inf")):
        raise reader.wrong(index, "label", f"is {value}", "Give a finite number")
    if not isinstance(value, (str, int, float)):
        raise reader.wrong(index, "label", f"is {kind(value)}", "Give text or a number")
    if value == -1:
        raise reader.wrong(index, "label", "is -1, which marks rows without a label", "Remove unlabelled rows")


def _columns(texts: dict[str, list[str]], labels: list[int] | list[float]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({**texts, "label": labels})
