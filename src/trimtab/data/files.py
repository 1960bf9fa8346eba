"""Files and hub ids -> rows (dicts), each with its position ("facts.jsonl.gz, line 12") for error messages.

JSONL is read line by line here and not through `datasets`, whose reader names no line and merges nested keys of rows.
Nothing is cached or written beside the user's files.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BadInput, nearest

LONGEST_LINE, MOST_EMPTY, LARGEST_CSV = 2**23, 1_000_000, 2**31  # bytes of a row, empty lines, bytes of a file
SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass
class Table:
    """Rows in order. `numbers[i]` is row i's line (JSONL) or position in its source, counted from 1."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    sources: list[tuple[int, str, str]] = field(default_factory=list)  # first row, name, "line" or "row"

    def where(self, index: int) -> str:
        _, name, unit = max(source for source in self.sources if source[0] <= index)
        return f"{name}, {unit} {self.numbers[index]}"

    @property
    def untyped(self) -> bool:
        """Whether all values are text because the format has no types (CSV)."""
        return any(Path(name.removesuffix(".gz")).suffix.lower() == ".csv" for _, name, _ in self.sources)


def read_table(names: list[str], limit: int | None, part: str) -> Table:
    """The first `limit` rows of all sources in turn. `part` ("train" or "test") is a hub id's default split."""
    table = Table()
    for name in names:
        start = len(table.rows)
        room = None if limit is None else limit - start
        if room == 0:
            break
        unit, rows = _open(name, part)
        table.sources.append((start, name, unit))
        for number, row in rows:
            if room is not None and len(table.rows) - start == room:
                break
            table.rows.append(row)
            table.numbers.append(number)
        if len(table.rows) == start:
            raise BadInput(f"read {name}", "it has no rows", "Give a data set with at least one row")
    return table


def is_hub(name: str) -> bool:
    """Whether a name is not a local file but a data set on the hub."""
    path = Path(name).expanduser()
    kind = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"][-1:]
    packed = path.suffix.lower() == ".gz"
    local = packed or kind and kind[0] in SUFFIXES or name.startswith(("/", ".", "~")) or name.count("/") > 1
    return not path.exists() and not local


def _open(name: str, part: str) -> tuple[str, Iterator[tuple[int, dict[str, Any]]]]:
    path = Path(name).expanduser()
    if path.is_dir():
        raise BadInput(f"read {name}", "it is a folder", "Name a JSONL, CSV or Parquet file in it")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if packed else suffixes)[-1:]
    if path.is_file():
        if kind == [".jsonl"]:
            return "line", _jsonl(path, packed)
        if kind == [".csv"]:
            return "row", _csv(path, packed)
        if kind == [".parquet"] and not packed:
            return "row", _parquet(path)
        raise BadInput(
            f"read {name}", "its name ends in none of " + ", ".join(SUFFIXES), "Use .jsonl(.gz), .csv(.gz) or .parquet"
        )
    if not is_hub(name):
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, beside) if beside else "Check the path"
        raise BadInput(f"read {name}", "there is no such file", hint)
    return "row", _hub(name, part)


def open_bytes(path: Path, packed: bool) -> BinaryIO:
    return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]


def _jsonl(path: Path, packed: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    do = "Each line must be one JSON object in UTF-8"
    number = 0
    try:
        with open_bytes(path, packed) as file:
            empty = 0
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    have = f"it is longer than {LONGEST_LINE // 2**20} MiB"
                    raise BadInput(f"read {path}, line {number}", have, "Divide the text into rows")
                if not line.strip():
                    empty += 1
                    if empty > MOST_EMPTY:
                        raise BadInput(f"read {path}", f"it has more than {MOST_EMPTY:,} empty lines", do)
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError:
                    raise BadInput(f"read {path}, line {number}", "it is not UTF-8", do) from None
                except (ValueError, RecursionError) as error:
                    raise BadInput(f"read {path}, line {number}", f"it is not JSON ({error})", do) from None
                if not isinstance(row, dict):
                    raise BadInput(f"read {path}, line {number}", f"it is a {type(row).__name__}, not an object", do)
                yield number, row
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, number, error) from None


def _csv(path: Path, packed: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Values stay text (labels are read as numbers later), so that an answer "007" does not become 7."""
    import pyarrow as pa
    import pyarrow.csv as pc

    try:
        with open_bytes(path, packed) as file:
            content = file.read(LARGEST_CSV + 1)
        if len(content) > LARGEST_CSV:
            have = f"it has more than {LARGEST_CSV // 2**30} GiB{' unpacked' if packed else ''}, which are read at once"
            raise BadInput(f"read {path}", have, "Write it as JSONL or Parquet")
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadInput(f"read {path}, line {line}", "it is not UTF-8", "Save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, 0, error) from None
    if not content.strip():
        raise BadInput(f"read {path}", "it has no rows", "Give a data set with at least one row")
    parse = pc.ParseOptions(newlines_in_values=True)
    read = pc.ReadOptions(block_size=max(1 << 20, len(content) + 1))
    try:
        names = pc.open_csv(pa.BufferReader(content), read, parse).schema.names
        text = pc.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
        rows = pc.read_csv(pa.BufferReader(content), read, parse, text).to_pylist()
    except (pa.ArrowException, OverflowError) as error:
        do = "Give each row as many fields as the header, and quote commas"
        raise BadInput(f"read {path}", f"it is not CSV ({_short(error)})", do) from None
    yield from enumerate(rows, 1)


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise BadInput(
            f"read {path}", f"it is not an intact Parquet file ({_short(error)})", "Write the file again"
        ) from None


def _hub(name: str, part: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """`owner/name[:config][:split]`; without a split: "train", and for the test "test" or else "validation"."""
    import datasets

    identity, *rest = name.split(":")
    config = rest[0] if len(rest) > 1 else None
    asked = f'read "{name}"'
    do = "Check the id and the split, or name a JSONL, CSV or Parquet file"
    try:
        splits = datasets.get_dataset_split_names(identity, config) if not rest else [rest[-1]]
        wanted = ["train"] if part == "train" else ["test", "validation"]
        split = rest[-1] if rest else next((s for s in wanted if s in splits), None)
        if split is None:
            raise BadInput(asked, f"it has the splits {', '.join(splits)}", f'Name one, as in "{name}:{splits[0]}"')
        data = datasets.load_dataset(identity, config, split=split)
    except BadInput:
        raise
    except Exception as error:  # `datasets` raises dozens of kinds for a wrong id, a lost line or a bad file
        have = f"there is no such file, and the hub does not return it ({type(error).__name__}: {_short(error)})"
        raise BadInput(asked, have, do) from None
    yield from enumerate(data, 1)


def unreadable(path: Path, number: int, error: Exception) -> BadInput:
    packed = isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error))
    have = f"it is not intact gzip ({_short(error)})" if packed else f"it cannot be read ({_short(error)})"
    at = f" after line {number}" if number else ""
    return BadInput(
        f"read {path}{at}", have, "Write the file again, or name it without .gz" if packed else "Check the file"
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
