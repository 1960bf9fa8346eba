"""Which data, and what its columns are called. Plain data: importing it loads neither torch nor datasets."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import BadInput, nearest
from .metrics import METRICS

# What a column may be to us. `columns: {ours: theirs}` renames.
CANONICAL = ("messages", "conversations", "prompt", "completion", "question", "answer", "instruction", "input",
             "output", "text", "text_pair", "label", "tools", "system")  # fmt: skip
TOO_LONG = ("error", "cut", "drop")


@dataclass(frozen=True)
class DataSpec:
    """Training and test rows.

    `train`, `test`: a JSONL(.gz), CSV(.gz) or Parquet file, or a hub id (`owner/name`, `owner/name:split` or
    `owner/name:config:split`); `train` may list several. `columns`: {our name: theirs}. `chat`: None lets the form
    decide, True wraps prompts in the tokenizer's chat template, False never does. `chat_template`: `chatml`, or a Jinja
    file, in place of the tokenizer's own template. `system`: a system message for each chat. `too_long`: rows over
    `max_length` tokens are refused, cut or dropped. `limit`: only the first so many rows. `metrics`: how `trimtab eval`
    scores replies to rows with answers: exact_match, contains, set_iou, final_number. `reply_tokens`: how long a reply
    of `eval` or `generate` may be (None: the longest answer and 24 tokens more).
    """

    train: str | list[str] | None = None
    test: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    chat: bool | None = None
    chat_template: str | None = None
    system: str | None = None
    too_long: str = "error"
    limit: int | None = None
    metrics: list[str] = field(default_factory=lambda: ["exact_match", "contains"])
    reply_tokens: int | None = None

    def __post_init__(self) -> None:
        for ours in self.columns:
            if ours not in CANONICAL:
                raise BadInput(
                    f'data.columns: "{ours}"', "no such column is known to trimtab", nearest(ours, CANONICAL)
                )
        if self.too_long not in TOO_LONG:
            raise BadInput(
                f'data.too_long: "{self.too_long}"', "there is no such choice", nearest(str(self.too_long), TOO_LONG)
            )
        if self.limit is not None and self.limit < 1:
            raise BadInput(f"data.limit: {self.limit}", "no row would be left", "Give a number of rows, 1 or more")
        if self.reply_tokens is not None and self.reply_tokens < 1:
            raise BadInput(f"data.reply_tokens: {self.reply_tokens}", "no reply would be left", "Give 1 or more")
        for name in self.metrics:
            if name not in METRICS:
                raise BadInput(f'data.metrics: "{name}"', "no such metric is known to trimtab", nearest(name, METRICS))
