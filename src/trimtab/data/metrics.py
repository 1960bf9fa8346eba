"""Scores of a reply. `data: {metrics: [...]}` names those that `trimtab eval` reports, each a mean over rows.

    exact_match   whether the reply equals an accepted answer, after SQuAD's normalisation
    contains      whether an accepted answer occurs in the reply as whole words, after the same normalisation
    set_iou       comma-separated names (of APIs, say) as sets: shared names over all names
    final_number  whether the last number of the reply equals the answer's (GSM8K: the number after "####")

A row may have several accepted answers; the best one counts. Scores are between 0 and 1.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from unicodedata import name as name_of
from unicodedata import normalize

SPACES = " \u00a0\u2007\u2009\u202f"  # between the thousands of a number; "10 200 300" after another number is a list
NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)])-)?
    (?: (?:(?P<whole>\d+)[{SPACES}]+)? (?<![/\d.,])(?P<over>\d+)/(?P<under>\d+)(?![\d/]|\.\d)
      | (?P<plain>
          (?:(?<![\d][{SPACES}])\d{{1,3}}(?P<gap>[{SPACES}])\d{{3}}(?:(?P=gap)\d{{3}})*(?!\d)
            | \d+(?:,\d{{3}})*) (?:\.\d+)?
          | \.\d+)
        (?:[eE](?P<power>[+-]?\d{{1,3}})(?!\d))?
    )""",
    re.VERBOSE,
)
LATEX = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
MARK = "####"  # before the final number in GSM8K's answers


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(ch for ch in text.lower() if ch not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(reply: str, accepted: Sequence[str]) -> float:
    return float(normalise(reply) in {normalise(answer) for answer in accepted})


def contains(reply: str, accepted: Sequence[str]) -> float:
    said = f" {normalise(reply)} "
    return float(any(f" {normalise(answer)} " in said for answer in accepted if normalise(answer)))


def set_iou(reply: str, accepted: Sequence[str]) -> float:
    """Fields end at commas and line ends; case, order and repeats do not count. Two empty sets are equal."""
    said = fields(reply)
    return max(len(said & fields(a)) / len(said | fields(a)) if said | fields(a) else 1.0 for a in accepted)


def fields(text: str) -> set[str]:
    return {" ".join(field.split()) for field in re.split(r"[,\n]", text.lower())} - {""}


def final_number(reply: str, accepted: Sequence[str]) -> float:
    said = number(reply)
    return float(said is not None and said in [number(answer) for answer in accepted])


def number(text: str) -> Fraction | None:
    """The first number after the first "####", or the last number if there is no "####"; None if there is none.

    Understands fractions (3/4, 1 1/2, ¾, LaTeX's), powers of ten (1e3), groups of three digits after commas or spaces
    (1,234 or 1 234), and the minus sign U+2212. A fraction over 0 is not a number.
    """
    text = LATEX.sub(r" \1/\2 ", "".join(_ascii(ch) for ch in text))
    _, mark, after = text.partition(MARK)
    found = list(NUMBER.finditer(after if mark else text))
    return _value(found[0 if mark else -1]) if found else None


def _ascii(ch: str) -> str:
    """Vulgar fractions as digits, and Unicode's signs for minus and division as - and /."""
    if ch.isascii():
        return ch
    if name_of(ch, "").startswith("VULGAR FRACTION"):
        return f" {normalize('NFKC', ch)}".replace("\u2044", "/")
    return {"\u2212": "-", "\u2044": "/"}.get(ch, ch)


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["sign"] else 1
    if match["over"] is not None:
        over, under = Fraction(Decimal(match["over"])), Fraction(Decimal(match["under"]))
        return sign * (Fraction(Decimal(match["whole"] or 0)) + over / under) if under else None
    plain = re.sub(f"[,{SPACES}]", "", match["plain"])
    return sign * Fraction(Decimal(plain)) * Fraction(10) ** int(match["power"] or 0)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match, "contains": contains, "set_iou": set_iou, "final_number": final_number,
}  # fmt: skip
