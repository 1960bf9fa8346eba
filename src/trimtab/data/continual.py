"""What a model keeps and loses over stages of training: figures of a task matrix, and intervals of paired scores.

    a[i][j]   the score on task j after stage i; row 0 is the base, before any training; T tasks, one per stage

    ACC          mean over j of a[T][j]
    BWT          mean over j < T of a[T][j] - a[j][j]                        (Lopez-Paz and Ranzato, arXiv 1706.08840)
    forgetting   mean over j < T of max over 1 <= i < T of a[i][j], minus a[T][j]   (Chaudhry et al., arXiv 1801.10112)
    FWT          mean over j > 1 of a[j-1][j] - a[0][j]                     (1706.08840, with the base as the baseline)

A higher score is better; for losses the sign of the differences is turned, so that forgetting is a rise of the loss.
In forgetting, i starts at j: a task that has not been trained yet cannot be forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

LOSSES = ("loss", "perplexity")  # lower is better
RESAMPLES, LEVEL = 2000, 0.95


def figures(matrix: Sequence[Sequence[float]], metric: str) -> dict[str, float]:
    """ACC, BWT, forgetting and FWT of a task matrix of T + 1 rows and T columns; of one task only ACC.

    ACC is in the metric's own unit. The others are positive where a higher score, or a lower loss, would be.
    """
    sign = -1.0 if metric in LOSSES else 1.0
    last, tasks = matrix[-1], len(matrix) - 1
    found = {"acc": sum(last) / len(last)}
    if tasks > 1:
        earlier = range(tasks - 1)  # column j belongs to row j + 1
        found["bwt"] = sign * sum(last[j] - matrix[j + 1][j] for j in earlier) / len(earlier)
        best = [max(sign * row[j] for row in matrix[j + 1 : -1]) for j in earlier]
        found["forgetting"] = sum(top - sign * last[j] for j, top in zip(earlier, best, strict=True)) / len(earlier)
        found["fwt"] = sign * sum(matrix[j][j] - matrix[0][j] for j in range(1, tasks)) / (tasks - 1)
    return found


def interval(before: Sequence[float], after: Sequence[float], seed: int = 0) -> dict[str, float]:
    """The mean of after - before over paired rows, with a 95 % interval by the bootstrap over rows (percentiles)."""
    import numpy

    change = numpy.asarray(after, dtype=float) - numpy.asarray(before, dtype=float)
    draws = numpy.random.default_rng(seed).integers(0, len(change), (RESAMPLES, len(change)))
    low, high = numpy.quantile(change[draws].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"change": float(change.mean()), "low": float(low), "high": float(high)}
