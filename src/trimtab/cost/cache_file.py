"""What was measured of a machine, kept as JSON in the cache folder for plans to come.

A file that is damaged, of another form or of another machine counts as not there; it is written whole or not at all.
Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import write_text
from ..validation import read_json


def read(path: Path, form: int, machine: dict[str, Any]) -> dict[str, Any] | None:
    """What `write` put there of `machine` in this `form`, with the key "machine"; None where that is not so."""
    found = read_json(path)
    if found is None or found.pop("form", None) != form or found.get("machine") != machine:
        return None
    return found


def write(path: Path, form: int, content: dict[str, Any]) -> bool:
    """`content` names its "machine". False where the cache cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"form": form, **content}, indent=1))
    except OSError:
        return False
    return True
