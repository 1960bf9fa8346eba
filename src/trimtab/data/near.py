"""Near duplicates among texts: MinHash with locality-sensitive hashing (Broder 1997), by `datasketch`.

Texts are sets of three consecutive words. The library proposes pairs; each is then compared exactly, so that a text is
reported only if its Jaccard similarity to another is what was asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from ..errors import BadInput
from .row_faults import words_of

WORDS = 3  # in a shingle
LEAST = 8  # words of a text; shorter ones differ by a word that may be all of their meaning
BANDS = 32, 4  # of 128 hashes: a pair of similarity 0.8 is proposed with probability 1 - 5e-8


def near_pairs(texts: Sequence[str], least: float) -> Iterator[tuple[int, int, float]]:
    """(i, j, similarity) with j < i for each text i that is at least `least` similar to an earlier one.

    BadInput if datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise BadInput(
            "near duplicates", "datasketch is not installed", 'Run: pip install "trimtab[audit]", or give --near 0'
        ) from None
    index = MinHashLSH(num_perm=BANDS[0] * BANDS[1], params=BANDS)
    sets: dict[int, set[int]] = {}
    for i, text in enumerate(texts):
        shingles = shingles_of(text)
        if not shingles:
            continue
        sketch = MinHash(num_perm=BANDS[0] * BANDS[1], hashfunc=int)
        sketch.update_batch(sorted(shingles))
        best = max(((_similar(shingles, sets[j]), -j) for j in index.query(sketch)), default=(0.0, 0))
        if best[0] >= least:
            yield i, -best[1], best[0]
        sets[i] = shingles
        index.insert(i, sketch)


def shingles_of(text: str) -> set[int]:
    """Hashes (32 bits) of the text's runs of three words; empty if it has too few."""
    words = words_of(text)
    if len(words) < LEAST:
        return set()
    runs = (" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))
    return {int.from_bytes(hashlib.blake2b(run.encode("utf-8", "replace"), digest_size=4).digest()) for run in runs}


def _similar(one: set[int], two: set[int]) -> float:
    return len(one & two) / len(one | two)
