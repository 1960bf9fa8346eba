"""Errors in three parts: what was asked, what there is, what to do.

Each error has its exit code (2 bad input, 3 does not fit, 4 stopped with a checkpoint): the command line prints it and
exits without a traceback. Any other exception is a bug in trimtab and exits with 1.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST = 1200  # characters of a sentence


class TrimtabError(Exception):
    """A user's mistake or a machine's limit. `asked`, `have` and `do` are one sentence each, without a full stop."""

    exit_code = 2

    def __init__(self, asked: str, have: str, do: str):
        asked, have, do = map(shortened, (asked, have, do))
        super().__init__(asked, have, do)
        self.asked, self.have, self.do = asked, have, do

    def __str__(self) -> str:
        return f"{self.asked}: {self.have}. {self.do}."


class BadInput(TrimtabError):
    """The recipe, the data or a file is wrong (exit code 2)."""


class Untraceable(BadInput):
    """The model cannot be traced on tensors without values (exit code 2)."""


class DoesNotFit(TrimtabError):
    """The plan exceeds the budget (exit code 3)."""

    exit_code = 3


class Stopped(TrimtabError):
    """The guard stopped a run at a clean point, with a checkpoint (exit code 4)."""

    exit_code = 4


class Interrupted(TrimtabError):
    """Ctrl-C or SIGTERM: the step was finished and a checkpoint written (exit code 130, or 143 after SIGTERM)."""

    exit_code = 130


def shortened(text: str) -> str:
    """`text` with long words, and a long whole, cut in the middle."""
    cut = lambda part, most: f"{part[: most // 2]} ... {part[-most // 4 :]} ({len(part):,} characters)"  # noqa: E731
    text = re.sub(r"\S{301,}", lambda word: cut(word[0], 80), text) if len(text) > 300 else text
    return text if len(text) <= LONGEST else cut(text, LONGEST)


def nearest(word: str, known: Iterable[str]) -> str:
    """`Did you mean "x"` with the known word closest to `word`, or the list of known words."""
    known = sorted(known)
    some = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.55)
    return f'Did you mean "{close[0]}"' if close else f"Known: {some}"
