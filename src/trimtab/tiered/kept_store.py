"""The files of a store of experts that is kept, and how two stores differ.

experts.bin     the records
experts.json    what they come from, their layout, and the CRC-32 of each
"""

from __future__ import annotations

from typing import Any

DATA, MEANING = "experts.bin", "experts.json"
SUMS = "crc32"  # in experts.json


def difference(known: dict[str, Any], meaning: dict[str, Any]) -> str:
    """How the store that experts.json says to be there differs from the one that is needed, as a sentence."""
    if not known:
        return f"its {MEANING} is missing or damaged"
    if known.get("identity") != meaning["identity"]:
        return "it has the experts of another model"
    try:
        there, wanted = _precision(known), _precision(meaning)
    except (KeyError, IndexError, TypeError, ValueError):
        there = ""
    if not there:
        return f"its {MEANING} is missing or damaged"
    if there == wanted:
        return "it has the experts of this model in another layout"
    return f"it has the model's experts in {there}, and this run needs them in {wanted} (model.precision, precision)"


def _precision(meaning: dict[str, Any]) -> str:
    """Of the experts in a store, from its experts.json: "float32", or "nf4"."""
    dtypes = sorted({str(part[2]).removeprefix("torch.") for _, *parts in meaning["layout"] for part in parts})
    return str(meaning["form"]) if "form" in meaning else ", ".join(dtypes)
