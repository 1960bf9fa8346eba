"""How right a reply is: `data: {metrics: [...]}` names which of these `trimtab eval` reports, each a mean over rows.

    exact_match   the reply is an accepted answer, after SQuAD's normalisation
    contains      an accepted answer occurs in the reply, word by word, after the same normalisation
    set_iou       comma-separated names (of APIs, say) as sets: shared names over all names
    final_number  the number that the reply ends on is the answer's (GSM8K: what follows "####")

A row may have several accepted answers; the best one counts. Scores are between 0 and 1.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from decimal import Decimal

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
MARK = "####"  # before the final number in GSM8K's answers


def normalise(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
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


def number(text: str) -> Decimal | None:
    """The first number after the first mark, or the last one where there is no mark; None where there is none."""
    _, mark, after = text.partition(MARK)
    found = NUMBER.findall(after if mark else text)
    return Decimal(found[0 if mark else -1].replace(",", "")) if found else None


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match, "contains": contains, "set_iou": set_iou, "final_number": final_number,
}  # fmt: skip
