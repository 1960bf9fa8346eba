"""What a report shows of a run of several stages: the task matrix, its figures, the change of each task, the costs."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from ..memory.budget import gib
from .figures import at, number

LABELS = {"acc": "ACC", "bwt": "BWT", "forgetting": "forgetting", "fwt": "FWT"}
MEANING = (
    "Row by row, the score on each task's test set: of the base, then after each stage. ACC is the mean of the last "
    "row; BWT what earlier tasks gained since they were trained; forgetting what they lost since their best; FWT what "
    "a task gained before it was trained. For losses the signs are turned: forgetting is a rise."
)


def marks(run: Any) -> dict[str, Any]:
    """Shapes and annotations for curves over the steps: a line where each stage begins, with its name."""
    shapes, notes, step = [], [], 0
    for stage in _stages(run):
        if step:
            shapes.append({"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": step + 0.5, "x1": step + 0.5,
                           "name": "--quiet", "line": {"width": 1, "dash": "dot"}})  # fmt: skip
        notes.append({"yref": "paper", "y": 1, "yanchor": "top", "x": step + 0.5, "xanchor": "left", "showarrow": False,
                      "name": "--quiet", "text": escape(str(stage.get("name", "")))})  # fmt: skip
        step += int(number(stage.get("steps")) or 0)
    return {"shapes": shapes, "annotations": notes} if len(notes) > 1 else {}


def matrix(run: Any) -> dict[str, Any] | None:
    """The task matrix of the run's main metric as a heat map."""
    names, rows = at(run.run, "tasks", "names"), _rows(run)
    if not rows or not isinstance(names, list):
        return None
    labels = ["base", *(f"after {name}" for name in names)][: len(rows)]
    metric = str(at(run.run, "tasks", "metric"))
    if isinstance(row := at(run.run, "tasks", "switched", "row", metric), list):
        rows, labels = [*rows, row], [*labels, "each with its own adapter"]
    for name in ("sequential", "joint"):
        if isinstance(row := at(run.run, "baselines", name, "row", metric), list):
            rows, labels = [*rows, row], [*labels, f"{name} (baseline)"]
    losses = metric == "loss"
    trace = {
        "type": "heatmap", "x": [escape(str(name)) for name in names], "y": [escape(label) for label in labels],
        "z": rows, "texttemplate": "%{z:.3f}",
        "hovertemplate": "%{y}, on %{x}: %{z:.4f}<extra></extra>", "colorscale": "Blues", "reversescale": not losses,
        "showscale": False, "xgap": 2, "ygap": 2,
    }  # fmt: skip
    axes = {"xaxis": {"side": "top", "type": "category"}, "yaxis": {"autorange": "reversed", "type": "category"}}
    return {"data": [trace], "layout": {**axes, "height": 90 + 44 * len(rows), "hovermode": "closest"}}


def section(run: Any, figure: Callable[..., str], table: Callable[..., str]) -> str:
    """The part of the page about a run's stages; "" if it has one stage only."""
    if not _stages(run) or not _rows(run):
        return ""
    metric = str(at(run.run, "tasks", "metric"))
    drawn = figure(matrix(run), f"{run.name}: {metric} on each task", "No scores were written.")
    return f'<div class="grid">{drawn}</div><p class="quiet">{MEANING}</p>' + "".join(
        (_figures(run, table), _changes(run, table), _general(run, table), _costs(run, table))
    )


def _stages(run: Any) -> list[dict[str, Any]]:
    found = at(run.run, "stages")
    return [stage for stage in found if isinstance(stage, dict)] if isinstance(found, list) else []


def _rows(run: Any) -> list[list[float]]:
    found = at(run.run, "tasks", "matrix", str(at(run.run, "tasks", "metric")))
    return found if isinstance(found, list) and all(isinstance(row, list) for row in found) else []


def _figures(run: Any, table: Callable[..., str]) -> str:
    found = at(run.run, "tasks", "figures")
    rows = [
        [escape(metric), *("" if number(held.get(key)) is None else f"{held[key]:+.4f}" for key in LABELS)]
        for metric, held in (found if isinstance(found, dict) else {}).items() if isinstance(held, dict)
    ]  # fmt: skip
    for name in ("sequential", "joint", "frozen"):
        for metric in found if isinstance(found, dict) and at(run.run, "baselines", name) else {}:
            held = {"acc": at(run.run, "baselines", name, "acc", metric)}
            held |= at(run.run, "baselines", name, "figures", metric) or {}
            cells = ("" if number(held.get(key)) is None else f"{held[key]:+.4f}" for key in LABELS)
            rows.append([escape(f"{metric}, {name}"), *cells])
    return table(["metric", *LABELS.values()], rows, numbers=True) if rows else ""


def _changes(run: Any, table: Callable[..., str]) -> str:
    """Last stage minus base, over paired rows, with 95 % intervals."""
    found, rows = at(run.run, "tasks", "change"), []
    for task, metrics in (found if isinstance(found, dict) else {}).items():
        for metric, held in (metrics if isinstance(metrics, dict) else {}).items():
            values = [number(at(held, key)) for key in ("change", "low", "high")]
            if None not in values:
                change, low, high = values
                rows.append([escape(f"{task}: {metric}"), f"{change:+.4f}", f"{low:+.4f} to {high:+.4f}",
                             "no difference shown" if low <= 0 <= high else ""])  # type: ignore[operator] # fmt: skip
    head = ["last stage minus base, mean of the rows", "change", "95 % interval", ""]
    return table(head, rows, numbers=True) if rows else ""


def _general(run: Any, table: Callable[..., str]) -> str:
    """The perplexity on text that is of no task: of the base, then after each stage."""
    found = at(run.run, "tasks", "general", "perplexity")
    values = [number(value) for value in found] if isinstance(found, list) else []
    if not values or None in values:
        return ""
    change = [number(at(run.run, "tasks", "general", "change_of_loss", key)) for key in ("change", "low", "high")]
    names = ["base", *(f"after {stage.get('name')}" for stage in _stages(run))]
    rows = [[escape(name), f"{value:,.2f}", f"{value / values[0] - 1:+.1%}"]  # type: ignore[operator]
            for name, value in zip(names, values, strict=False)]  # fmt: skip
    if None not in change:
        rows.append(["change of the loss in the end, mean of the rows", f"{change[0]:+.4f}",
                     f"{change[1]:+.4f} to {change[2]:+.4f}"])  # fmt: skip
    file = escape(str(at(run.run, "tasks", "general", "file")))
    return table([f"perplexity on {file}", "", "to the base"], rows, numbers=True)


def _costs(run: Any, table: Callable[..., str]) -> str:
    rows = []
    for stage in _stages(run):
        measured = stage.get("measured") if isinstance(stage.get("measured"), dict) else {}
        peak, seconds = number(measured.get("fast_peak_bytes")), number(measured.get("seconds"))  # type: ignore[union-attr]
        rows.append([
            escape(str(stage.get("name"))), escape(str(stage.get("carry"))), f"{number(stage.get('steps')) or 0:,}",
            f"{number(stage.get('tokens')) or 0:,}", "" if seconds is None else f"{seconds:,.1f}",
            "" if peak is None else gib(int(peak)),
            "" if number(stage.get("final_loss")) is None else f"{stage['final_loss']:.4f}",
        ])  # fmt: skip
    head = ["stage", "carries", "steps", "tokens", "seconds", "fast tier at the peak", "final training loss"]
    return table(head, rows, numbers=True) + _kept(run)


def _kept(run: Any) -> str:
    """What was kept of earlier stages for the last one."""
    keys = ("bytes", "budget_bytes", "rows", "seen")
    size, budget, rows, seen = (number(at(run.run, "rehearsal", key)) for key in keys)
    if size is None or budget is None or rows is None or not seen:
        return ""
    told = f"{size:,} of {budget:,} bytes: {rows:,} of {seen:,} rows seen before ({rows / seen:.1%})"
    return f'<p class="quiet">Rehearsed in the last stage: {told}.</p>'
