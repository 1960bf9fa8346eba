"""Which model, at which precision. Plain data: importing it loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BadInput, nearest

PRECISIONS = ("auto", "bf16", "fp32", "fp16", "nf4", "int8")


@dataclass(frozen=True)
class ModelSpec:
    """A base model.

    `name`: hub id, folder, GGUF file or short name (`smollm2-135m`, `minilm-l6`); `precision`: "auto" is the file's own
    (the weights then stay mapped), "nf4" and "int8" quantise the linears through bitsandbytes (stacked experts stay as
    they are); `revision`: a branch, tag or commit of a hub id; `trust_remote_code`: run Python code that comes with the
    model.
    """

    name: str
    precision: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise BadInput(
                f"model: {self.name!r}", "a model is named by a text", "Name a hub id, a folder or a GGUF file"
            )
        if self.precision not in PRECISIONS:
            raise BadInput(
                f'precision: "{self.precision}"', "there is no such precision", nearest(str(self.precision), PRECISIONS)
            )
