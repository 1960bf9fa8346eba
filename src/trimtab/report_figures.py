"""The figures of a report: what runs left, as plotly's traces and layouts. No colours of a theme are in them; the page
puts these on, light or dark."""

from __future__ import annotations

from typing import Any, Protocol

from .plan import SLOW, WHY

GIB = 2**30
KINDS = ("process", *WHY, *SLOW)  # as a plan names and orders them
REST = "the step"
COLOURS = {  # told apart also by those who see few colours; readable on white and on near-black
    "process": "#8c96a3", "weights": "#4477aa", "adapter": "#228833", "gradients": "#ccbb44", "optimiser": "#aa3377",
    "activations": "#ee6677", REST: "#ee6677", "logits": "#f79646", "temporaries": "#66ccee",
    "mapped weights": "#9aa7d6",
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
    """One line per run of what was logged as `key`, over the steps."""
    traces = []
    for index, run in enumerate(runs):
        rows = [(row["step"], row[key]) for row in run.metrics if number(row.get(key)) is not None]
        if rows:
            traces.append(_line(run.name, rows, index))
    return _figure(traces, "step", title) if traces else None


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
    """What the process held over time, by kind as far as it was known at each moment, with the budget."""
    if not run.memory:
        return None
    seconds, before, last = [], 0.0, 0.0
    for row in run.memory:
        now = number(row.get("seconds")) or 0.0
        if now < last:  # the run was resumed: its clock began anew
            before += last
        last = now
        seconds.append(round(before + now, 2))
    known = next((row["parts"] for row in run.memory if isinstance(row.get("parts"), dict)), {})
    parts = {kind: number(known.get(kind)) or 0 for kind in ("process", "weights", "adapter", "optimiser")}
    stacked: dict[str, list[float]] = {kind: [] for kind in (*parts, REST)}
    for row in run.memory:
        rest = float(row["anon"])
        training = isinstance(row.get("parts"), dict)
        for kind, size in parts.items():
            # before a step was metered only the process and its weights are known to be there
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
    figure["layout"]["height"] = 360
    if limit:
        figure["layout"]["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit / GIB, "y1": limit / GIB,
             "line": {"width": 2, "dash": "dash"}}
        ]  # fmt: skip
        figure["layout"]["annotations"] = [
            {"xref": "paper", "x": 1, "xanchor": "right", "y": limit / GIB, "yanchor": "bottom", "showarrow": False,
             "text": f"budget {limit / GIB:.2f} GiB"}
        ]  # fmt: skip
        top = max(limit, *(float(row["anon"]) for row in run.memory)) / GIB
        figure["layout"]["yaxis"]["range"] = [0, top * 1.12]
    return figure


def kinds(run: Any) -> list[tuple[str, float | None, float | None]]:
    """(kind, predicted bytes, measured bytes) at the peak of a step, where either is known."""
    planned, held = at(run.run, "predicted", "bytes") or {}, at(run.run, "measured", "bytes") or {}
    rows = []
    for kind in KINDS:
        pair = number(at(planned, kind)), number(at(held, kind))
        if any(pair):
            rows.append((kind, *pair))
    least = max((size or 0 for _, *pair in rows for size in pair), default=0) / 10_000  # what no one could see
    return [row for row in rows if max(size or 0 for size in row[1:]) > least]


def bars(run: Any) -> dict[str, Any] | None:
    """Predicted beside measured, kind by kind; of kinds of which both may be known."""
    rows = kinds(run)
    if not any(number(p) for _, p, _ in rows) and not any(number(m) for _, _, m in rows):
        return None
    traces = []
    for name, index, colour in (("predicted", 1, SERIES[0]), ("measured", 2, SERIES[1])):
        if any(row[index] for row in rows):
            traces.append({
                "type": "bar", "name": name, "orientation": "h", "y": [row[0] for row in rows],
                "x": [round((row[index] or 0) / 2**20, 3) for row in rows], "marker": {"color": colour},
                "hovertemplate": "%{x:.1f} MiB",
            })  # fmt: skip
    figure = _figure(traces, "MiB at the peak of a step", "")
    figure["layout"] |= {"barmode": "group", "height": 90 + 44 * len(rows), "hovermode": "closest"}
    figure["layout"]["yaxis"] |= {"autorange": "reversed", "automargin": True}
    return figure


def _figure(traces: list[dict[str, Any]], x: str, y: str) -> dict[str, Any]:
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}, "rangemode": "tozero"},
            "showlegend": len(traces) > 1, "hovermode": "x unified",
        },
    }  # fmt: skip
