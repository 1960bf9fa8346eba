"""The figures of a report, as plotly's traces and layouts. They have no theme; the page adds a light or a dark one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from ..memory.budget import gib
from ..planning.plan import SLOW, WHY

GIB = 2**30
KINDS = ("process", *WHY, *SLOW)  # as a plan names and orders them
REST = "the step"
HOWS = {  # the key in run.json -> what the page calls it
    "shown": "plan shown before", "predicted": "run's own plan", "measured": "measured",
}  # fmt: skip
THIN = 0.06  # of an axis' height: the band for the memory of the process before the run
COLOURS = {  # distinguishable with colour blindness; readable on white and on near-black
    "process": "#8c96a3", "weights": "#4477aa", "adapter": "#228833", "gradients": "#ccbb44", "optimizer": "#aa3377",
    "activations": "#ee6677", REST: "#ee6677", "logits": "#f79646", "temporaries": "#66ccee",
    "mapped weights": "#9aa7d6", "experts": "#ee8866", "experts in the slow tier": "#f5c9b4",
}  # fmt: skip
SERIES = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee", "#f79646", "#8c96a3")


class Found(Protocol):
    name: str
    run: dict[str, Any]
    metrics: list[dict[str, Any]]
    memory: list[dict[str, Any]]


def number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def at(tree: Any, *path: str) -> Any:
    """The value under `path`, or None."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def curves(runs: list[Any], key: str, title: str) -> dict[str, Any] | None:
    """The logged values of `key` over the steps, one line per run. A switch makes the axis logarithmic."""
    traces = []
    for index, run in enumerate(runs):
        rows = [(row["step"], row[key]) for row in run.metrics if number(row.get(key)) is not None]
        if rows:
            traces.append(_line(run.name, rows, index))
    if not traces:
        return None
    figure = _figure(traces, "step", title)
    logs = [math.log10(y) for trace in traces for y in trace["y"] if y > 0]
    if logs:
        room = 0.05 * (max(logs) - min(logs)) or 0.1
        span = [round(min(logs) - room, 4), round(max(logs) + room, 4)]  # powers of ten, as plotly wants them here
        figure["switch"] = {"label": "log scale", "yaxis": {"type": "log", "range": span, **_log_ticks(*span)}}
    return figure


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """Round values between 10**low and 10**high, written out; plotly would write single digits without their power."""
    for heads in ([10], [10, 20, 50], range(10, 100, 10), range(10, 100, 5), range(10, 100)):
        ticks = [head * 10.0 ** (power - 1) for power in range(math.floor(low), math.ceil(high)) for head in heads]
        ticks = [float(f"{tick:.2g}") for tick in ticks if low <= math.log10(tick) <= high]
        if len(ticks) >= 3:
            return {"tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return {}


def throughput(runs: list[Any]) -> dict[str, Any] | None:
    """Tokens per second between one log and the next."""
    traces = []
    for index, run in enumerate(runs):
        rows: list[tuple[float, float]] = []
        last: tuple[float, float] | None = None
        for row in run.metrics:
            seconds, tokens = number(row.get("seconds")), number(row.get("num_tokens"))
            if seconds is None or tokens is None or "loss" not in row:
                continue
            if last and seconds > last[0] and tokens > last[1]:  # less: the run was resumed there
                rows.append((row["step"], round((tokens - last[1]) / (seconds - last[0]), 2)))
            last = seconds, tokens
        if rows:
            traces.append(_line(run.name, rows, index))
    return _figure(traces, "step", "tokens/s") if traces else None


def _line(name: str, rows: list[tuple[Any, Any]], index: int) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines+markers" if len(rows) < 40 else "lines", "name": name,
        "x": [x for x, _ in rows], "y": [y for _, y in rows], "line": {"color": SERIES[index % len(SERIES)]},
    }  # fmt: skip


def timeline(run: Any, limit: float | None) -> dict[str, Any] | None:
    """The memory of the process over time, by kind as far as it was known at each moment, with the budget."""
    if not run.memory:
        return None
    seconds, before, last = [], 0.0, 0.0
    for row in run.memory:
        now = number(row.get("seconds")) or 0.0
        if now < last:  # the run was resumed: its clock restarted
            before += last
        last = now
        seconds.append(round(before + now, 2))
    known = next((row["parts"] for row in run.memory if isinstance(row.get("parts"), dict)), {})
    parts = {kind: number(known.get(kind)) or 0 for kind in ("process", "weights", "adapter", "optimizer")}
    stacked: dict[str, list[float]] = {kind: [] for kind in (*parts, REST)}
    for row in run.memory:
        rest = float(row["anon"])
        training = isinstance(row.get("parts"), dict)
        for kind, size in parts.items():
            # until a step was metered, only the process and its weights are known
            held = min(rest, size if training or kind in ("process", "weights") else 0)
            stacked[kind].append(held)
            rest -= held
        stacked[REST].append(rest)
    if not known:
        stacked = {"process": [float(row["anon"]) for row in run.memory]}
    traces = [
        {
            "type": "scatter", "mode": "lines", "stackgroup": "held", "name": kind, "x": seconds,
            "y": [round(size / GIB, 4) for size in sizes], "line": {"width": 0.5, "color": COLOURS[kind]},
            "fillcolor": COLOURS[kind], "hovertemplate": "%{y:.2f} GiB",
        }
        for kind, sizes in stacked.items() if any(sizes)
    ]  # fmt: skip
    figure = _figure(traces, "seconds", "GiB of the fast tier")
    figure["layout"] |= {"height": 360, "showlegend": True}
    figure["extent"] = {
        "low": min([parts["process"], *(float(row["anon"]) for row in run.memory if row.get("parts"))]) / GIB,
        "high": max([limit or 0.0, *(float(row["anon"]) for row in run.memory)]) / GIB,
        "seconds": max(seconds),
    }
    if limit:
        figure["layout"]["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit / GIB, "y1": limit / GIB,
             "line": {"width": 2, "dash": "dash"}}
        ]  # fmt: skip
        figure["layout"]["annotations"] = [
            {"xref": "paper", "x": 1, "xanchor": "right", "y": limit / GIB, "yanchor": "bottom", "showarrow": False,
             "text": f"budget {gib(limit)}"}
        ]  # fmt: skip
    return figure


def timelines(runs: list[Any], limits: list[float | None]) -> list[dict[str, Any] | None]:
    """The timeline of each run, all on the same axes.

    The memory of the process before the run does not change and is often the largest part. So the axis starts just
    below it, which makes it a thin band, unless it is small or unknown. A switch makes the axis start at zero.
    """
    figures = [timeline(run, limit) for run, limit in zip(runs, limits, strict=True)]
    extents = [figure["extent"] for figure in figures if figure]
    if not extents:
        return figures
    low, high = (choose(e[key] for e in extents) for choose, key in ((min, "low"), (max, "high")))
    room = high - low
    whole = [0, round(high + 0.12 * high, 4)]
    cut = [round(low - THIN * room, 6), round(high + 0.12 * room, 6)]
    for figure in figures:
        if figure is None:
            continue
        figure["layout"]["xaxis"]["range"] = [0, max(e["seconds"] for e in extents) or 1]
        figure["layout"]["yaxis"]["range"] = whole
        if low > 0.15 * high and room > 0:
            figure["layout"]["yaxis"]["range"] = cut
            figure["switch"] = {"label": "axis from zero", "yaxis": {"range": whole}}
    return figures


def kinds(run: Any, beside: Sequence[Any] = ()) -> list[tuple[str, dict[str, float]]]:
    """(kind, bytes by source: the keys of HOWS) at the peak of a step, for each kind that is known.

    With runs `beside` it, the kinds are those of all runs.
    """

    def known(of: Any) -> dict[str, dict[str, float]]:
        sizes = {how: at(of.run, how, "bytes") or {} for how in HOWS}
        found = {kind: {how: size for how in HOWS if (size := number(at(sizes[how], kind))) is not None}
                 for kind in KINDS}  # fmt: skip
        most = max((size for held in found.values() for size in held.values()), default=0)
        return {k: held for k, held in found.items() if max(held.values(), default=0) > most / 10_000}  # visible

    own = known(run)
    every = set(own).union(*(known(other) for other in beside))
    return [(kind, own.get(kind, {})) for kind in KINDS if kind in every]


def bars(run: Any, beside: Sequence[Any] = ()) -> dict[str, Any] | None:
    """The plans beside the measurement, kind by kind; on the same axes as the runs `beside` it."""
    rows = kinds(run, beside)
    traces = []
    for index, (how, name) in enumerate(HOWS.items()):
        if any(held.get(how) for _, held in rows):
            traces.append({
                "type": "bar", "name": name, "orientation": "h", "y": [kind for kind, _ in rows],
                "x": [round(held.get(how, 0) / 2**20, 3) for _, held in rows],
                "marker": {"color": (SERIES[4], SERIES[0], SERIES[1])[index]}, "hovertemplate": "%{customdata}",
                "customdata": [gib(held.get(how, 0)) for _, held in rows],
            })  # fmt: skip
    if not traces:
        return None
    figure = _figure(traces, "MiB at the peak of a step", "")
    figure["layout"] |= {"barmode": "group", "height": 110 + 44 * len(rows), "hovermode": "closest", "showlegend": True}
    figure["layout"]["yaxis"] |= {"autorange": "reversed", "automargin": True}
    most = max(size for other in (run, *beside) for _, held in kinds(other) for size in held.values())
    figure["layout"]["xaxis"]["range"] = [0, round(most * 1.05 / 2**20, 4)]
    return figure


def _figure(traces: list[dict[str, Any]], x: str, y: str) -> dict[str, Any]:
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}, "rangemode": "tozero"},
            "showlegend": len(traces) > 1, "hovermode": "x unified",
        },
    }  # fmt: skip
