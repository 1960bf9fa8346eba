"""JSON files of measurements in the cache folder, written atomically.

A file that is damaged, of another format or of another machine is ignored. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import write_text
from ..validation import read_json


def read(path: Path, form: int, machine: dict[str, Any]) -> dict[str, Any] | None:
    """The content that `write` stored for `machine` in format `form`; None if there is none."""
    found = read_json(path)
    if found is None or found.pop("form", None) != form or found.get("machine") != machine:
        return None
    return found


def write(path: Path, form: int, content: dict[str, Any]) -> bool:
    """Writes `content`, which has the key "machine"; -> False if the cache cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"form": form, **content}, indent=1))
    except OSError:
        return False
    return True
