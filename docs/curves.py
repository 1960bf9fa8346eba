"""The curves of `docs/results.md`, as SVG text: recall against facts and against exposures, from knowledge.json."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"MEFT": "#b45309", "Parallel Adapter": "#475569", "LoRA": "#1d4ed8", "PaCA": "#0f766e"}
RECALL = re.compile(r"([\d.e-]+) \(([\d.e-]+) \.\. ([\d.e-]+)\)")  # a median and its range, as the benchmark writes it


def knowledge(found: dict[str, Any]) -> str:
    """Random facts: recall against their number (each side at its exposures), and against exposures (at one number)."""
    points: dict[tuple[str, int, int], tuple[float, ...]] = {}  # (side, facts, exposures): recall, least, most
    for row in found["rows"]:
        if row["side"] in COLOURS and (told := RECALL.fullmatch(str(row.get("recall", "")))):
            points[row["side"], row["facts"], row["exposures"]] = tuple(map(float, told.groups()))
    same = min(facts for _, facts, _ in points)  # where exposures were varied
    with matplotlib.rc_context({"svg.hashsalt": "trimtab", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9.5, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for side, exposures in dict.fromkeys((side, seen) for side, _, seen in sorted(points, key=ordered)):
            of = [(facts, recall) for (name, facts, seen), recall in sorted(points.items())
                  if (name, seen) == (side, exposures)]  # fmt: skip
            if len(of) > 1:
                line(left, of, side, f"{side}, {exposures} times", "--" if exposures > 80 else "-")
        for side in COLOURS:
            of = [(seen, recall) for (name, facts, seen), recall in sorted(points.items())
                  if (name, facts) == (side, same)]  # fmt: skip
            line(right, of, side, side, "-")
        left.axhline(0.95, color="#94a3b8", linewidth=0.8, linestyle=":")
        left.set(title="More facts, each seen this many times", xlabel="facts", ylabel="recall", xscale="log")
        right.set(title=f"{same:,} random facts", xlabel="times each was seen", xscale="log")
        for axes in (left, right):
            axes.set_ylim(-0.03, 1.03)
            axes.legend(frameon=False, fontsize=8, handlelength=3.5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.minorticks_off()
            ticks = [mark for mark in (10, 20, 40, 80, 1000, 2000, 5000, 10000, 20000) if within(axes, mark)]
            axes.set_xticks(ticks, [f"{mark:,}" for mark in ticks])
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(text.rstrip() for text in out.getvalue().splitlines()) + "\n"


def ordered(point: tuple[str, int, int]) -> tuple[int, int]:
    return list(COLOURS).index(point[0]), point[2]


def line(axes: Axes, of: list[tuple[int, tuple[float, ...]]], side: str, label: str, style: str) -> None:
    """A line through the medians over the seeds, with a bar from the lowest to the highest."""
    at, recall = [x for x, _ in of], [y for _, (y, _, _) in of]
    reach = [[y - low for _, (y, low, _) in of], [high - y for _, (y, _, high) in of]]
    axes.errorbar(at, recall, yerr=reach, label=label, color=COLOURS[side], linestyle=style, marker="o", markersize=4,
                  capsize=2, linewidth=1.6, elinewidth=0.8)  # fmt: skip


def within(axes: Axes, mark: int) -> bool:
    low, high = axes.get_xlim()
    return low <= mark <= high
