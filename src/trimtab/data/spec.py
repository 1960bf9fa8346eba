"""Which data files to read, and how. Plain data: importing it loads neither torch nor datasets."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ..validation import Block, FileName
from .metrics import METRICS
from .rewards import beside

# Our names of columns. `columns: {ours: theirs}` renames.
Column = Literal["messages", "conversations", "prompt", "completion", "question", "answer", "instruction", "input",
                 "output", "text", "text_pair", "label", "tools", "system"]  # fmt: skip
Metric = Literal[*METRICS]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class DataSpec(Block):
    """Training and test rows.

    `train`, `test`: a JSONL(.gz), CSV(.gz) or Parquet file, or a hub id (`owner/name`, `owner/name:split` or
    `owner/name:config:split`); `train` may list several. `columns`: {our name: theirs}. `chat`: True wraps prompts in
    the tokenizer's chat template, False never does, None lets the columns decide. `chat_template`: `chatml`, or a Jinja
    file, which replaces the tokenizer's own template. `system`: a system message for each chat. `too_long`: whether
    rows over `max_length` tokens are refused, cut or dropped. `limit`: how many rows are read. `metrics`: how
    `trimtab eval` scores replies to rows with answers: exact_match, contains, set_iou, final_number. `reply_tokens`:
    the longest reply of `eval` or `generate` (None: the longest answer plus 24 tokens). `rewards`: what a reply earns,
    for objectives that sample replies: exact_match, contains, exact_number, {regex: ...}, {length: ...} or a
    module:function of your own (data/rewards.py).
    """

    short: ClassVar[str] = "train"

    train: FileName | list[FileName] | None = None
    test: FileName | None = None
    columns: dict[Column, str] = field(default_factory=dict)
    chat: bool | None = None
    chat_template: FileName | None = None
    system: str | None = None
    too_long: Literal["error", "cut", "drop"] = "error"
    limit: Count | None = None
    metrics: list[Metric] = field(default_factory=lambda: ["exact_match", "contains"])
    reply_tokens: Count | None = None
    rewards: list[str | dict[str, Any]] = field(default_factory=list)

    def beside(self, folder: Path) -> DataSpec:
        """The same data, with files that are in `folder` named by their paths."""

        def found(value: Any) -> Any:
            paths = [folder / name for name in ([value] if isinstance(value, str) else value or [])]
            if not paths or value == "chatml" or not all(path.exists() for path in paths):
                return value
            return str(paths[0]) if isinstance(value, str) else [str(path) for path in paths]

        files = {key: found(getattr(self, key)) for key in ("train", "test", "chat_template")}
        return dataclasses.replace(self, **files, rewards=[beside(entry, folder) for entry in self.rewards])
