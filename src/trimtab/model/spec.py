"""Which model, at which precision. Plain data: importing it loads no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from ..errors import BadInput
from ..validation import Block, FileName


@dataclass(frozen=True)
class ModelSpec(Block):
    """A base model.

    `name`: hub id, folder, GGUF file or short name (`smollm2-135m`, `minilm-l6`). `precision`: "auto" is the file's own
    (the weights then stay mapped); "nf4" and "int8" quantise the linears with bitsandbytes, but not stacked experts.
    `revision`: a branch, tag or commit of a hub id. `trust_remote_code`: run Python code that comes with the model.
    """

    short: ClassVar[str] = "name"

    name: FileName
    precision: Literal["auto", "bf16", "fp32", "fp16", "nf4", "int8"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise BadInput(f"model: {self.name!r}", "it names no model", "Name a hub id, a folder or a GGUF file")
