"""Makes the rows that toolbench.yaml trains on: `python make_toolbench.py FOLDER [OUT]`.

FOLDER has train.jsonl(.gz) and test.jsonl(.gz) with ToolBench's queries, one per row: `query`, `available_tools` (JSON
schemas) and `called` (names in order). The rows in OUT (default: toolbench/ beside this file) have `question` (the
request and the names of the available APIs) and `answer` (the names that were called, each once, comma-separated).
Names of unavailable APIs and ToolBench's own Finish are dropped, as is a row without any name left.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

END = "Finish"  # ToolBench's way to end a run; not an API


def row(found: dict[str, Any]) -> dict[str, str] | None:
    """One row of ToolBench as question and answer."""
    names = [tool["name"] for tool in found["available_tools"] if tool["name"] != END]
    called = [name for name in dict.fromkeys(found["called"]) if name in names]
    if not called:
        return None
    question = f"{found['query'].strip()}\nAPIs: {', '.join(names)}\nWhich of them are needed?"
    return {"question": question, "answer": ", ".join(called)}


def make(folder: Path, out: Path) -> dict[str, int]:
    """-> the number of rows written for each part."""
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for part in ("train", "test"):
        source = next(path for path in (folder / f"{part}.jsonl.gz", folder / f"{part}.jsonl") if path.is_file())
        with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as lines:
            rows = [made for line in lines if (made := row(json.loads(line)))]
        text = "".join(json.dumps(made, ensure_ascii=False) + "\n" for made in rows)
        (out / f"{part}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        counts[part] = len(rows)
    return counts


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "toolbench"
    print(make(Path(sys.argv[1]), where))
