"""The page of a report: tables and figures of runs in one self-contained HTML file."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from ..memory.budget import gib
from .figures import HOWS, at, bars, curves, kinds, number, throughput, timelines
from .style import SCRIPT, STYLE
from .tasks import marks, section


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
        head = f"<h3>{escape(title)}</h3>"
        if switch := made.get("switch"):
            label = escape(switch["label"])
            head += f'<button type="button" data-figure="{name}" aria-pressed="false">{label}</button>'
        return (
            f'<div class="card"><div class="head">{head}</div>'
            f'<div class="figure" id="{name}" style="min-height:{height}px"></div></div>'
        )

    def marked(made: dict[str, Any] | None) -> dict[str, Any] | None:
        if made is not None and len(runs) == 1:
            made["layout"] |= marks(runs[0])
        return made

    staged = "".join(section(run, figure, _table) for run in runs)
    names = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    body = [
        f"<header><h1>{escape(names)}</h1>",
        *(f'<p class="quiet">{escape(run.name)}: {escape(note)}</p>' for run in runs for note in run.notes),
        "</header>",
        _section("What was run", _facts(runs) +
            '<p class="quiet">The fast tier is the memory where the model computes: GPU memory, or on a CPU the '
            "process's own memory without mapped files. The slow tier is the larger memory below it: mapped files, or "
            "host RAM under a GPU.</p>"),
        _section("Tasks", staged) if staged else "",
        _section("Loss and speed", '<div class="grid">' + figure(
            marked(curves(runs, "loss", "loss")), "Loss", "No losses were logged.") + figure(
            marked(throughput(runs)), "Throughput", "The logs are not enough to compute a speed.") + "</div>"),
        *_rewards(runs, figure),
        _section("Memory over time", '<div class="grid">' + "".join(
            figure(made, run.name, "There is no timeline.")
            for run, made in zip(runs, timelines(runs, [_budget(run) for run in runs]), strict=True)) + "</div>"
            '<p class="quiet">Anonymous memory of the process, sampled twice a second. From the second step on, the '
            "constant parts are known: the process before training (interpreter and libraries), copied weights, the "
            "adapter and the optimizer's state. The step is the rest: activations, gradients and temporaries. The "
            "memory of the process before training does not change, so it is drawn as a thin band: the axis starts "
            "just below it.</p>"),
        _section("Predicted and measured", _totals(runs) + '<div class="grid">' + "".join(
            figure(bars(run, runs), run.name, "Nothing was predicted or measured by kind.") for run in runs)
            + "".join(map(_kind_table, runs)) + "</div>"),
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


def _rewards(runs: list[Any], figure: Any) -> list[str]:
    """Of runs that sampled replies: reward, share of equal groups and length over time, and replies."""
    some = [run for run in runs if any(number(row.get("reward")) is not None for row in run.metrics)]
    if not some:
        return []
    shown = (("reward", "Reward"), ("frac_reward_zero_std", "Share of prompts whose replies earned the same"),
             ("completions/mean_length", "Tokens of a reply"), ("kl", "Divergence from the base"))  # fmt: skip
    found = [(title, curves(some, key, title.lower())) for key, title in shown]
    cards = "".join(figure(made, title, "") for title, made in found if made is not None)
    tables = ""
    for run in some:
        rows = [[escape(str(s.get("step"))), escape(str(s.get("prompt"))[-300:]), escape(str(s.get("reply"))[:600]),
                 escape(", ".join(f"{k} {v}" for k, v in s.items() if k not in ("step", "prompt", "reply")))]
                for s in run.samples]  # fmt: skip
        tables += f"<h3>{escape(run.name)}</h3>" + _table(["step", "prompt", "reply", "earned"], rows) if rows else ""
    return [_section("Rewards", f'<div class="grid">{cards}</div>{tables}')]


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def _table(head: list[str], rows: list[list[str]], kind: str = "", numbers: bool = False) -> str:
    """An HTML table; the first cell of each row is a heading. A narrow screen stacks rows of several values."""
    mark = ' class="n"' if numbers else ""
    kinds = " ".join([kind] * bool(kind) + ["stack"] * (len(head) > 2))
    labels = [f' data-label="{escape(name)}"' if name else "" for name in head]
    top = "".join(f"<th{mark if index else ''}>{escape(name)}</th>" for index, name in enumerate(head))
    lines = ""
    for first, *cells in rows:
        inner = "".join(f"<td{mark}{label}>{cell}</td>" for label, cell in zip(labels[1:], cells, strict=True))
        lines += f"<tr><th>{first}</th>{inner}</tr>"
    table = f'<table class="{kinds}"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _size(size: float) -> str:
    return gib(size) if size >= 2**20 else f"{size / 2**10:,.1f} KiB" if size >= 2**10 else f"{size:,.0f} B"


def _budget(run: Any) -> float | None:
    """The run's budget of the fast tier in bytes; None if there is none, or if it was a share of the machine."""
    from ..errors import TrimtabError
    from ..memory.budget import parse

    allowed = number(at(run.run, "budget", "fast"))
    if allowed:
        return allowed
    asked = at(run.recipe, "budget", "fast")
    if asked is None or isinstance(asked, str) and ("%" in asked or asked.strip().startswith("-")):
        return None  # a share of a machine that may be another one
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
        ("trained parameters", figure("{:,}", "trainable_parameters")), ("steps", figure("{:,}", "steps")),
        ("tokens", figure("{:,}", "tokens")), ("final loss", figure("{:.4f}", "final_loss")),
        ("tokens/s", figure("{:,.1f}", "measured", "tokens_per_second")),
        ("seconds", figure("{:,.1f}", "measured", "seconds")),
        ("budget", lambda run: "" if _budget(run) is None else gib(_budget(run) or 0)),
        ("fast tier at the peak", size("measured", "fast_peak_bytes")),
        ("of which added by the run", size("measured", "fast_growth_bytes")),
        ("slow tier", size("measured", "slow_bytes")),
        ("fetched from tables per step", size("measured", "store_up_bytes_per_step")),
        ("written to tables per step", size("measured", "store_down_bytes_per_step")),
        ("rows prefetched in time", figure("{:.0%}", "measured", "store_prefetch_hit_rate")),
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
    """The plan that was shown before each run, the run's own plan, and the measurement."""
    wanted = (
        ("fast tier, whole process", "fast_peak_bytes", _size),
        ("of which added by the run", "fast_growth_bytes", _size),
        ("live tensors", "live_peak_bytes", _size), ("tokens/s", "tokens_per_second", "{:,.1f}".format),
    )  # fmt: skip
    hows = _hows(runs)
    rows = []
    for run in runs:
        for what, key, form in wanted:
            values = {how: number(at(run.run, how, key)) for how in HOWS}
            if not any(values.values()):
                continue
            planned, held = values["predicted"], values["measured"]
            off = f"{(planned - held) / held:+.1%}" if planned is not None and held else "–"
            name = f"{run.name}: {what}" if len(runs) > 1 else what
            cells = ("–" if (value := values[how]) is None else form(value) for how in hows)
            rows.append([escape(name), *cells, off])
    if not rows:
        return '<p class="quiet">Nothing was predicted or measured.</p>'
    table = _table(["", *(HOWS[how] for how in hows), "run's own plan minus measured"], rows, numbers=True)
    return table + "".join(f'<p class="quiet">{escape(line)}</p>' for run in runs if (line := _batches(run, runs)))


def _hows(runs: list[Any]) -> list[str]:
    """The columns of the table: only some runs have a plan that was shown before."""
    return [how for how in HOWS if how != "shown" or any(at(run.run, "shown") for run in runs)]


def _batches(run: Any, runs: list[Any]) -> str:
    """The batch of each plan: if these differ, so do the figures."""
    found = {}
    for how in ("shown", "predicted"):
        rows, tokens = (number(at(run.run, how, "batch", key)) for key in ("rows", "tokens"))
        if rows and tokens:
            found[how] = f"batches of {rows:,} x {tokens:,} tokens"
    if "predicted" not in found:
        return ""
    told = f"the run planned for {found['predicted']}, the largest in its data"
    if found.get("shown") == found["predicted"]:
        told = f"both plans are for {found['shown']}, the largest in the data"
    elif "shown" in found:
        told = f"the plan shown before was for {found['shown']}; {told}"
    else:
        told += "; no plan of this recipe was shown before the run (trimtab plan)"
    return f"{run.name}: {told}." if len(runs) > 1 else f"{told[0].upper()}{told[1:]}."


def _kind_table(run: Any) -> str:
    hows = _hows([run])
    rows = [
        [escape(kind), *("–" if held.get(how) is None else _size(held[how]) for how in hows)]
        for kind, held in kinds(run)
    ]
    if not rows:
        return ""
    when = [f"{HOWS[how]}: {at(run.run, how, 'phase')}" for how in hows if at(run.run, how, "phase")]
    told = f'<p class="quiet">The part of a step with the peak: {escape("; ".join(when))}.</p>' if when else ""
    inner = _table(["at the peak of a step", *(HOWS[how] for how in hows)], rows, numbers=True)
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
        title += f'<p class="quiet">On {escape(str(counts[0]))} rows before, {escape(str(counts[1]))} after.</p>'
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
        return f'<p class="quiet">{escape(run.name)}: there is no recipe.yaml.</p>'
    text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
    return f"<details><summary>{escape(run.name)}</summary><pre>{escape(text)}</pre></details>"
