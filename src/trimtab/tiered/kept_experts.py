"""What experts.json says of a store of experts that is kept: whose they are, in which precision, and their checksums.

experts.json    identity: of the model's files; precision: "float32", "nf4", ...; layout: of each layer, the number
                of experts and the tensors of one; crc32: of each record
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import BadInput
from ..validation import read_json

SUMS = "crc32"


def meaning(layers: Sequence[Any], form: Any, identity: str) -> dict[str, Any]:
    """The content of experts.json for these layers (tiered/experts.py), without checksums."""
    dtypes = {str(dtype).removeprefix("torch.") for layer in layers for _, dtype in layer.shapes.values()}
    layout = [[len(layer.rows), *([name, list(part.shape), str(part.dtype)] for name, part in layer.parts.items())]
              for layer in layers]  # fmt: skip
    packed = [] if form is None else [form.name]
    return {"identity": identity, "precision": " of ".join([*packed, ", ".join(sorted(dtypes))]), "layout": layout}


def require(file: Path, wanted: dict[str, Any], rows: int) -> list[int]:
    """The checksums of the `rows` records. BadInput if experts.json does not say what is `wanted`."""
    known = read_json(file) or {}
    sums = known.pop(SUMS, None)
    precision = known.get("precision")
    if not known:
        have = f"its {file.name} is missing or damaged"
    elif not isinstance(sums, list) or len(sums) != rows and known == wanted:
        have = f"its {file.name} does not have a checksum of each expert"
    elif known.get("identity") != wanted["identity"]:
        have = "it has the experts of another model"
    elif precision != wanted["precision"]:
        now = f"this run needs them in {wanted['precision']} (model: precision, and the patch's own)"
        have = f"it has this model's experts in {precision}, and {now}"
    elif known != wanted:
        have = "it has this model's experts in another layout"
    else:
        return sums
    raise BadInput(f"store: {file.parent}", have, "Name another folder, or remove this one")


def sum_of(parts: Iterable[Tensor]) -> int:
    """The CRC-32 of a record's parts, each a tensor of bytes, without the padding between them."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part.numpy(), crc)
    return crc
