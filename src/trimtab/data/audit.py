"""`trimtab data audit FILES`: what is wrong with data before a model is trained on it.

Of each file it counts rows and tokens, and finds the rows that are too long, that occur twice or nearly so, also in
another file (a test set above all), whose roles do not alternate, whose answers are empty or cut, and those with
characters that were decoded wrongly, in another language than the rest, or with what looks like a secret. Files are
only read; `write_clean` writes copies without the rows that were found.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..files import write_text, writing
from ..model.reply import through_template
from .columns import name_columns
from .files import Table, is_hub, open_bytes, read_table, unreadable
from .near import near_pairs
from .row_faults import Row, Words, cut_answer, encoding_fault, language, role_faults, row_of, secret, words_of
from .spec import DataSpec

KINDS = {
    "broken": "rows that are no JSON object, or lack a column",
    "roles": "roles that do not alternate, or a question without an answer",
    "empty": "empty turns",
    "cut": "answers that seem cut off",
    "long": "more tokens than training.max_length",
    "encoding": "characters that were decoded wrongly",
    "language": "another language than nearly all other rows",
    "secret": "what looks like a key or a password",
    "exact": "the same text as an earlier row",
    "near": "nearly the same words as an earlier row",
    "overlap": "the same text, the same prompt or nearly the same words as a row of another file",
}
NEAR = 0.8  # Jaccard similarity of near duplicates
MOSTLY = 0.9  # of the rows in one language: the others are then a fault
PROMPT_WORDS = 5  # of a prompt that is compared alone: greetings are in every file


@dataclass(frozen=True)
class Finding:
    kind: str
    file: str
    line: int  # of a JSONL file; else the row's position
    detail: str


@dataclass
class Source:
    """One file. `rows[i]`: the row as turns, or what is wrong with it; `raw[i]`: as it stands in the file."""

    name: str
    test: bool
    rows: list[Row | str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    languages: Counter[str] = field(default_factory=Counter)


@dataclass
class Audit:
    """What was found. `sources`: the files, in the order given, test files last."""

    sources: list[Source]
    findings: list[Finding]
    skipped: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `trimtab data audit --json`."""
        files = []
        for source in self.sources:
            kinds = Counter(f.kind for f in self.findings if f.file == source.name)
            counted = {"tokens": sum(source.tokens), "longest": max(source.tokens)} if source.tokens else {}
            files.append({
                "file": source.name, "part": "test" if source.test else "train", "rows": len(source.rows), **counted,
                "languages": dict(source.languages.most_common()), "found": dict(kinds),
            })  # fmt: skip
        return {"files": files, "found": len(self.findings), "not_looked_for": self.skipped,
                "findings": [dataclasses.asdict(finding) for finding in self.findings]}  # fmt: skip

    def lines(self, most: int = 3) -> Iterator[str]:
        """The table for people; at most `most` rows of each kind and file."""
        names = [Path(source.name).name for source in self.sources]
        width = max(4, *map(len, names))
        yield f"{'file':<{width}}  {'part':<5} {'rows':>8} {'tokens':>12} {'longest':>8}  languages"
        for name, source in zip(names, self.sources, strict=True):
            tokens, longest = (f"{sum(source.tokens):,}", f"{max(source.tokens):,}") if source.tokens else ("", "")
            told = ", ".join(f"{key} {many:,}" for key, many in source.languages.most_common(4))
            part = "test" if source.test else "train"
            yield f"{name:<{width}}  {part:<5} {len(source.rows):>8,} {tokens:>12} {longest:>8}  {told}"
        for kind, what in KINDS.items():
            of_kind = [finding for finding in self.findings if finding.kind == kind]
            if of_kind:
                yield f"{kind}: {len(of_kind):,} ({what})"
            for source in self.sources:
                here = [finding for finding in of_kind if finding.file == source.name]
                for finding in here[:most]:
                    yield f"  {finding.file}, line {finding.line}: {finding.detail}"
                if len(here) > most:
                    yield f"  {source.name}: {len(here) - most:,} more"
        if self.skipped:
            yield f"not looked for: {', '.join(self.skipped)}"
        yield f"{len(self.findings):,} found" if self.findings else "nothing found"


def audit(
    train: Sequence[str], test: Sequence[str] = (), spec: DataSpec | None = None, tokenizer: Any = None,
    max_length: int | None = None, near: float = NEAR, skip: Iterable[str] = (),
) -> Audit:  # fmt: skip
    """Reads the files and looks for faults.

    `spec`: names columns and says whether rows are chats. With a `tokenizer` tokens are counted as in training, and
    rows over `max_length` are found. `near`: the similarity of near duplicates; 0: they are not looked for. `skip`:
    kinds that are left out. Of rows that occur in two files the one in the test file, or else in the earlier file,
    is not reported.
    """
    spec, skip = spec or DataSpec(), list(skip)
    if unknown := set(skip) - KINDS.keys():
        raise BadInput(f"audit without {sorted(unknown)[0]}", "there is no such kind", f"Known: {', '.join(KINDS)}")
    if not 0 <= near <= 1:
        raise BadInput(f"near duplicates of a similarity of {near}", "it is a share", "Give a number from 0 to 1")
    names = [*train, *test]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(f"audit {twice[0]}", "it is named twice", "Name each file once")
    if not names:
        raise BadInput("audit", "no file was named", "Name JSONL, CSV or Parquet files, or a recipe with --recipe")
    sources = [read(name, spec, name in test) for name in names]
    found: list[Finding] = []
    words = Words(row.text for source in sources for row in source.rows if isinstance(row, Row))
    for source in sources:
        if tokenizer is not None:
            source.tokens = [count_tokens(row, spec, tokenizer) if isinstance(row, Row) else 0 for row in source.rows]
        found += _row_findings(source, words, max_length if tokenizer is not None else None)
        found += _languages(source)
    if near == 0:
        skip.append("near")
    wanted = {"exact", "near", "overlap"} - set(skip)
    found += _duplicates(sources, near, wanted) if wanted else []
    order = {name: index for index, name in enumerate(names)}
    rank = {kind: index for index, kind in enumerate(KINDS)}
    found = sorted(
        {f for f in found if f.kind not in skip}, key=lambda f: (order[f.file], f.line, rank[f.kind], f.detail)
    )
    if tokenizer is None:
        skip.append("long (give --recipe)")
    return Audit(sources, found, skip)


# --- reading ---------------------------------------------------------------------------------------------------------


def read(name: str, spec: DataSpec, test: bool = False) -> Source:
    """The rows of a file. What `train` would refuse of single rows of a JSONL file is kept as a fault."""
    path, source = Path(name).expanduser(), Source(name, test)
    kinds = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"][-1:]
    packed = path.suffix.lower() == ".gz"
    if is_hub(name) or kinds != [".jsonl"] or not path.is_file():
        table = read_table([name], spec.limit, "test" if test else "train")
        rows: list[dict[str, Any] | str] = list(table.rows)
        source.raw = [json.dumps(row, ensure_ascii=False, default=str) for row in table.rows]
        source.lines = table.numbers
    else:
        rows = []
        try:
            with open_bytes(path, packed) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        rows.append(_parsed(line))
                        source.raw.append(line.decode("utf-8", "replace").rstrip("\r\n"))
                        source.lines.append(number)
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(path, 0, error) from None
    first = next((row for row in rows if isinstance(row, dict)), None)
    if first is None:
        raise BadInput(f"audit {name}", "none of its rows is a JSON object", "Give a data set with at least one row")
    columns = _columns(first, spec, name)
    source.rows = [row if isinstance(row, str) else row_of(row, columns) for row in rows]
    return source


def _parsed(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "it is not UTF-8"
    except (ValueError, RecursionError):
        return "it is not JSON"
    return row if isinstance(row, dict) else "it is not a JSON object"


def _columns(first: dict[str, Any], spec: DataSpec, name: str) -> dict[str, str]:
    """Our names of the columns, for a language model or else for a classifier."""
    table = Table([first], [1], [(0, name, "line")])
    try:
        return name_columns(table, spec, "causal-lm" if "label" not in first else "classification")
    except BadInput:
        return name_columns(table, spec, "causal-lm")


def count_tokens(row: Row, spec: DataSpec, tokenizer: Any) -> int:
    """Tokens of a row as training would render it."""
    chat = bool(getattr(tokenizer, "chat_template", None)) and row.chat(spec.chat)
    if chat:
        messages = [{"role": role, "content": text} for role, text in row.turns]
        try:
            text = through_template(tokenizer, messages, tokenize=False)
            return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except Exception:  # a template is a program by someone else; it refuses rows whose roles do not alternate
            pass
    return len(tokenizer(row.text, verbose=False)["input_ids"])


# --- looking ---------------------------------------------------------------------------------------------------------


def _row_findings(source: Source, words: Words, max_length: int | None) -> Iterator[Finding]:
    for index, row in enumerate(source.rows):
        line = source.lines[index]
        if isinstance(row, str):
            yield Finding("encoding" if "UTF-8" in row else "broken", source.name, line, row)
            continue
        if row.turns[0][0] != "text":
            for kind, detail in role_faults(row.turns, row.calls):
                yield Finding(kind, source.name, line, detail)
        elif not row.text.strip():
            yield Finding("empty", source.name, line, "its text is empty")
        if row.answer and (detail := cut_answer(row.answer, words)):
            yield Finding("cut", source.name, line, detail)
        if detail := encoding_fault(row.text):
            yield Finding("encoding", source.name, line, detail)
        if detail := secret(row.text):
            yield Finding("secret", source.name, line, f"it has what looks like {detail}")
        if max_length is not None and source.tokens[index] > max_length:
            yield Finding("long", source.name, line, f"it has {source.tokens[index]:,} of {max_length:,} tokens")


def _languages(source: Source) -> Iterator[Finding]:
    told = [language(row.text) if isinstance(row, Row) else "" for row in source.rows]
    source.languages = Counter(name for name in told if name)
    main, most = next(iter(source.languages.most_common(1)), ("", 0))
    if most < MOSTLY * sum(source.languages.values()):
        return
    for index, name in enumerate(told):
        if name not in ("", main):
            yield Finding("language", source.name, source.lines[index], f"it is {name}, the file {main}")


def _duplicates(sources: list[Source], near: float, wanted: set[str]) -> Iterator[Finding]:
    """Rows that equal an earlier one; test files count as earlier than those that are trained on."""
    every = [(source, index, row) for source in sorted(sources, key=lambda s: not s.test)
             for index, row in enumerate(source.rows) if isinstance(row, Row)]  # fmt: skip
    seen: dict[str, int] = {}
    prompts: dict[str, int] = {}
    known: set[int] = set()

    def finding(at: int, other: int, how: str, kind: str) -> Finding:
        (source, index, _), (first, place, _) = every[at], every[other]
        return Finding(
            kind if first is source else "overlap", source.name, source.lines[index],
            f"{how} line {first.lines[place]}{'' if first is source else f' of {first.name}'}",
        )  # fmt: skip

    for at, (source, _, row) in enumerate(every):
        text, prompt = " ".join(row.text.casefold().split()), " ".join(row.prompt.casefold().split())
        if text in seen:
            known.add(at)
            yield finding(at, seen[text], "as", "exact")
        elif len(words_of(prompt)) >= PROMPT_WORDS and every[prompts.get(prompt, at)][0] is not source:
            known.add(at)
            yield finding(at, prompts[prompt], "the prompt of", "overlap")
        seen.setdefault(text, at)
        prompts.setdefault(prompt, at)
    if "near" in wanted:
        left = [at for at in range(len(every)) if at not in known]
        for one, two, share in near_pairs([every[at][2].text for at in left], near):
            yield finding(left[one], left[two], f"{share:.0%} as", "near")


# --- the cleaned copy ------------------------------------------------------------------------------------------------


def write_clean(made: Audit, folder: Path, overwrite: bool = False) -> list[Path]:
    """Write each file without the rows that were found, as FOLDER/NAME.jsonl; -> the files. Never in place."""
    targets = []
    for source in made.sources:
        stem = Path(source.name.rpartition("/")[2]).name.removesuffix(".gz")
        targets.append(folder / f"{Path(stem).stem if Path(stem).suffix else stem.replace(':', '-')}.jsonl")
    for target in targets:
        asked = f"write {target}"
        if any(target.resolve() == Path(other.name).expanduser().resolve() for other in made.sources):
            raise BadInput(asked, "it is one of the files that were read", "Name another folder with --write")
        if targets.count(target) > 1:
            raise BadInput(asked, "two files have this name", "Audit them one by one, or rename one")
        if target.exists() and not overwrite:
            raise BadInput(asked, "it exists", "Name another folder, or give --overwrite")
    gone = {(finding.file, finding.line) for finding in made.findings}
    for source, target in zip(made.sources, targets, strict=True):
        kept = [raw for raw, line in zip(source.raw, source.lines, strict=True) if (source.name, line) not in gone]
        with writing(f"write {target}", "Name another folder with --write"):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(target, "".join(raw + "\n" for raw in kept))
    return targets
