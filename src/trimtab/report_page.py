"""The page of a report: tables and figures of runs in one file of HTML that needs nothing else."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from .memory.budget import gib
from .report_figures import at, bars, curves, kinds, number, throughput, timeline

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --card: #f6f7f9; --text: #1d2129; --quiet: #5b6472; --line: #d9dde3;
        --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --card: #1d2129; --text: #e8eaee; --quiet: #a3acb9; --line: #363d48; --good: #5fd07f;
          --bad: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 1200px; background: var(--back); color: var(--text);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; } .quiet { color: var(--quiet); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; min-width: 0; }
.card h3 { margin-top: 0; } .figure { width: 100%; min-height: 320px; }
.wide + .grid, .wide + .wide { margin-top: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
         overflow-wrap: anywhere; }
th { font-weight: 600; } tbody th { color: var(--quiet); font-weight: 400; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; } .right { color: var(--good); } .wrong { color: var(--bad); }
table.answers td, table.facts td { min-width: 8rem; } tbody th { min-width: 6rem; overflow-wrap: normal; }
details { margin: .6rem 0; } summary { cursor: pointer; } pre { overflow-x: auto; font-size: .85rem; margin: .4rem 0; }
@media (max-width: 600px) { body { padding: .8rem; font-size: 15px; } tbody th { white-space: normal; } }
"""
SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function axis(given) {
  return Object.assign({ gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"),
                         automargin: true }, given);
}
function draw() {
  for (const [id, figure] of Object.entries(figures)) {
    for (const line of figure.layout.shapes || []) line.line.color = colour("--bad");
    for (const note of figure.layout.annotations || []) note.font = { color: colour("--bad") };
    const layout = Object.assign({ height: 320 }, figure.layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: { color: colour("--text"), family: "system-ui, 'DejaVu Sans', sans-serif", size: 12 },
      margin: { l: 8, r: 12, t: 12, b: 8 },
      xaxis: axis(figure.layout.xaxis), yaxis: axis(figure.layout.yaxis),
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    });
    Plotly.react(id, figure.data, layout, { responsive: true, displayModeBar: false });
  }
}
draw();
dark.addEventListener("change", draw);
"""


def page(runs: list[Any]) -> str:
    """The whole page about `runs` (report.Run)."""
    from plotly.offline import get_plotlyjs

    figures: dict[str, Any] = {}

    def figure(made: dict[str, Any] | None, title: str, none: str) -> str:
        if made is None:
            return f'<div class="card"><h3>{escape(title)}</h3><p class="quiet">{escape(none)}</p></div>'
        name = f"figure{len(figures)}"
        figures[name] = made
        height = made["layout"].get("height", 320)
        return (
            f'<div class="card"><h3>{escape(title)}</h3>'
            f'<div class="figure" id="{name}" style="min-height:{height}px"></div></div>'
        )

    names = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    body = [
        f"<header><h1>{escape(names)}</h1>",
        *(f'<p class="quiet">{escape(run.name)}: {escape(note)}</p>' for run in runs for note in run.notes),
        "</header>",
        _section("What was run", _facts(runs)),
        _section("Learning", '<div class="grid">' + figure(
            curves(runs, "loss", "loss"), "Loss", "No losses were logged.") + figure(
            throughput(runs), "Throughput", "No speed can be told from what was logged.") + "</div>"),
        _section("Memory over time", '<div class="grid">' + "".join(
            figure(timeline(run, _budget(run)), run.name, "There is no timeline.") for run in runs) + "</div>"
            '<p class="quiet">Anonymous memory of the process, twice a second. From the second step on the parts that '
            "stay are known: what the process held before, the weights that are copies, the adapter and the state of "
            "the optimiser. The step: activations, gradients, and what else comes and goes.</p>"),
        _section("Predicted and measured", _totals(runs) + '<div class="grid">' + "".join(
            figure(bars(run), run.name, "Nothing was predicted or measured by kind.") + _kind_table(run)
            for run in runs) + "</div>"),
        _section("Answers before and after", "".join(_answers(run, len(runs) > 1) for run in runs)),
        _section("Recipes", "".join(_recipe(run) for run in runs)),
    ]  # fmt: skip
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")
    runs_data = json.dumps({run.name: run.run for run in runs}, allow_nan=False)
    runs_data = runs_data.replace("<", "\\u003c").replace("&", "\\u0026")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(names)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>\n'
        + "\n".join(body)
        + f'\n<script type="application/json" id="figures">{data}</script>'
        f'\n<script type="application/json" id="runs">{runs_data}</script>'
        f"\n<script>{get_plotlyjs()}</script>\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def _table(head: list[str], rows: list[list[str]], kind: str = "", numbers: bool = False) -> str:
    """`rows` of HTML, the first cell of each a heading."""
    mark = ' class="n"' if numbers else ""
    top = "".join(f"<th{mark if index else ''}>{escape(name)}</th>" for index, name in enumerate(head))
    lines = "".join(
        f"<tr><th>{row[0]}</th>" + "".join(f"<td{mark}>{c}</td>" for c in row[1:]) + "</tr>" for row in rows
    )
    table = f"<table{f' class={kind}' if kind else ''}><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _budget(run: Any) -> float | None:
    """Bytes of the fast tier that the run was allowed, where its budget says so in bytes or as a size."""
    from .errors import TrimtabError
    from .memory.budget import parse

    allowed = number(at(run.run, "budget", "fast"))
    if allowed:
        return allowed
    asked = at(run.recipe, "budget", "fast")
    if asked is None or isinstance(asked, str) and ("%" in asked or asked.strip().startswith("-")):
        return None  # a share of a machine that may not be this one
    try:
        return parse(asked, 2**63)
    except TrimtabError:
        return None


def _facts(runs: list[Any]) -> str:
    def patches(run: Any) -> str:
        entries = at(run.recipe, "patches")
        told = []
        for entry in entries if isinstance(entries, list) else []:
            for name, values in entry.items() if isinstance(entry, dict) else [(str(entry), {})]:
                inner = ", ".join(f"{k}: {v}" for k, v in values.items()) if isinstance(values, dict) else ""
                told.append(f"{name} ({inner})" if inner else str(name))
        return " + ".join(told)

    def text(*path: str) -> Any:
        return lambda run: at(run.run, *path) if at(run.run, *path) is not None else ""

    def size(*path: str) -> Any:
        return lambda run: "" if number(at(run.run, *path)) is None else gib(at(run.run, *path))

    def figure(form: str, *path: str) -> Any:
        return lambda run: "" if number(at(run.run, *path)) is None else form.format(at(run.run, *path))

    def versions(run: Any) -> str:
        found = at(run.run, "versions")
        return ", ".join(f"{k} {v}" for k, v in found.items()) if isinstance(found, dict) else ""

    def model(run: Any) -> str:
        precision = at(run.recipe, "model", "precision")
        precision = None if precision == "auto" else precision
        return f"{at(run.recipe, 'model', 'name') or ''}{f', {precision}' if precision else ''}"

    def data(run: Any) -> str:
        files = at(run.recipe, "data", "train")
        return ", ".join(str(name).rpartition("/")[2] for name in (files if isinstance(files, list) else [files or ""]))

    facts: list[tuple[str, Any]] = [
        ("model", model), ("patches", patches), ("data", data),
        ("trained numbers", figure("{:,}", "trainable_parameters")), ("steps", figure("{:,}", "steps")),
        ("tokens", figure("{:,}", "tokens")), ("final loss", figure("{:.4f}", "final_loss")),
        ("tokens/s", figure("{:,.1f}", "measured", "tokens_per_second")),
        ("seconds", figure("{:,.1f}", "measured", "seconds")),
        ("budget", lambda run: "" if _budget(run) is None else gib(_budget(run) or 0)),
        ("fast tier at the peak", size("measured", "fast_peak_bytes")),
        ("of it for the run", size("measured", "fast_growth_bytes")), ("slow tier", size("measured", "slow_bytes")),
        ("tables, up a step", size("measured", "store_up_bytes_per_step")),
        ("tables, down a step", size("measured", "store_down_bytes_per_step")),
        ("rows read ahead in time", figure("{:.0%}", "measured", "store_prefetch_hit_rate")),
        ("finished", text("finished")), ("recipe's hash", text("recipe")), ("processor", text("machine", "cpu")),
        ("threads", text("machine", "threads")), ("machine's memory", size("machine", "memory_bytes")),
        ("gpu", text("machine", "gpu")), ("allocator", text("machine", "allocator")), ("versions", versions),
    ]  # fmt: skip
    rows = []
    for name, of in facts:
        cells = [str(of(run)) for run in runs]
        if any(cells):
            rows.append([escape(name), *(escape(cell) or "–" for cell in cells)])
    return _table(["", *(run.name for run in runs)], rows, kind="facts")


def _totals(runs: list[Any]) -> str:
    rows = []
    for run in runs:
        for what, key in (("fast tier, whole process", "fast_peak_bytes"), ("of it for the run", "fast_growth_bytes"),
                          ("live tensors", "live_peak_bytes")):  # fmt: skip
            planned, held = number(at(run.run, "predicted", key)), number(at(run.run, "measured", key))
            if planned is None and held is None:
                continue
            off = f"{(planned - held) / held:+.1%}" if planned is not None and held else "–"
            name = f"{run.name}: {what}" if len(runs) > 1 else what
            rows.append([escape(name), *("–" if v is None else gib(v) for v in (planned, held)), off])
    if not rows:
        return '<p class="quiet">Nothing was predicted or measured.</p>'
    return _table(["", "predicted", "measured", "plan off by"], rows, numbers=True)


def _kind_table(run: Any) -> str:
    rows = [[escape(kind), *("–" if v is None else gib(v) for v in pair)] for kind, *pair in kinds(run)]
    if not rows:
        return ""
    when = [
        f"{how} peak: {at(run.run, how, 'phase')}" for how in ("predicted", "measured") if at(run.run, how, "phase")
    ]
    told = f'<p class="quiet">{escape("; ".join(when))}</p>' if when else ""
    inner = _table(["at the peak of a step", "predicted", "measured"], rows, numbers=True)
    return f'<div class="card"><h3>{escape(run.name)}</h3>{inner}{told}</div>'


def _answers(run: Any, named: bool) -> str:
    title = f"<h3>{escape(run.name)}</h3>" if named else ""
    if not run.before and not run.after:
        return f'{title}<p class="quiet">No evaluation is in the folder: run trimtab eval, and trimtab eval --base.</p>'
    metrics = [at(part, "metrics") if isinstance(at(part, "metrics"), dict) else {} for part in (run.before, run.after)]
    rows = [
        [escape(str(name)), *("–" if number(m.get(name)) is None else f"{m[name]:.4f}" for m in metrics)]
        for name in dict.fromkeys([*metrics[0], *metrics[1]])
    ]
    counts = [at(part, "rows") for part in (run.before, run.after)]
    if counts[0] != counts[1] and all(counts):
        title += f'<p class="quiet">Of {escape(str(counts[0]))} rows before, {escape(str(counts[1]))} after.</p>'
    return title + _table(["", "before", "after"], rows, numbers=True) + _samples(run)


def _samples(run: Any) -> str:
    def by_prompt(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
        samples = at(part, "samples")
        kept = [s for s in (samples if isinstance(samples, list) else []) if isinstance(s, dict) and "prompt" in s]
        return {str(sample["prompt"]): sample for sample in kept}

    before, after = by_prompt(run.before), by_prompt(run.after)
    rows = []
    for prompt in list(dict.fromkeys([*after, *before]))[:20]:
        wanted = (after.get(prompt) or before.get(prompt) or {}).get("answers")
        wanted = [str(w) for w in wanted] if isinstance(wanted, list) else []
        cells = [escape(prompt), escape(" | ".join(wanted))]
        for part in (before, after):
            reply = str(part[prompt].get("reply", "")) if prompt in part else None
            right = reply is not None and any(w and w.lower() in reply.lower() for w in wanted)
            mark = "right" if right else "wrong"
            shown = (reply or "")[:300].strip()
            cells.append(
                "–" if reply is None else f'<span class="{mark}">{"✓" if right else "✗"} {escape(shown)}</span>'
            )
        rows.append(cells)
    return _table(["question", "wanted", "before", "after"], rows, kind="answers") if rows else ""


def _recipe(run: Any) -> str:
    import yaml

    if not run.recipe:
        return f'<p class="quiet">{escape(run.name)}: no recipe.yaml.</p>'
    text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
    return f"<details><summary>{escape(run.name)}</summary><pre>{escape(text)}</pre></details>"
