"""Writes the generated parts of the documents: `python docs/build.py` (`--check` only says whether they are current).

    README.md           the table of methods; the demo's output, from docs/demo.txt
    docs/index.md       the table of methods, with links
    docs/which-method.md  what a search found, from benchmarks/results/plan_time.json
    docs/recipe.md      the keys of a recipe, from the dataclasses
    docs/methods/*.md   the fields of each patch
    docs/architectures.md  which patch works on which model, from docs/architectures.json
    docs/results.md     the whole page, from benchmarks/results/*.json (their format: benchmarks/README.md)
    docs/architecture.svg  the packages and their imports, from src/trimtab (docs/structure.py)
    docs/knowledge.svg  learning curves, from benchmarks/results/knowledge.json

A generated part of a page is between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import operator
import re
import sys
from pathlib import Path
from typing import Any

from trimtab import methods, recipe
from trimtab.contracts import Objective
from trimtab.data.spec import DataSpec
from trimtab.data.stage import Ewc
from trimtab.engine.fields import REFUSED
from trimtab.model.spec import ModelSpec
from trimtab.schema import comments

sys.path.insert(0, str(Path(__file__).parent))
from curves import knowledge  # noqa: E402
from structure import picture  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
PLAIN, CHECKPOINTING = "TRL + PEFT LoRA r 8", "TRL + PEFT LoRA r 8, checkpointing"  # sides of benchmarks/sft_speed.py
NAMED = ("name", "title", "claim", "date", "machine", "versions", "summary", "rows")  # required in each result


def build(root: Path = ROOT) -> dict[Path, str]:
    """-> every generated page and its text, from the pages in `root` as they are now."""
    pages: dict[Path, str] = {}
    for path, regions in {
        root / "README.md": {
            "methods": method_table("docs/methods/"),
            "demo": demo(root),
            "figures": headline(root),
        },
        root / "docs/which-method.md": {"search": search(root)},
        root / "docs/index.md": {"methods": method_table("methods/")},
        root / "docs/recipe.md": {"keys": recipe_keys()},
        **{
            root / f"docs/methods/{name}.md": {"fields": fields_table(methods.find(name))}
            for name in methods.names("patch")
        },
    }.items():
        text = path.read_text(encoding="utf-8")
        for name, content in regions.items():
            text = replace(text, name, content, path)
        pages[path] = text
    pages[root / "docs/architectures.md"] = architectures(json.loads((root / "docs/architectures.json").read_text()))
    curves = root / "benchmarks/results/knowledge.json"
    if curves.is_file():
        pages[root / "docs/knowledge.svg"] = knowledge(json.loads(curves.read_text(encoding="utf-8")))
    pages[root / "docs/architecture.svg"] = picture()
    pages[root / "docs/results.md"] = results(sorted((root / "benchmarks/results").glob("*.json")))
    return pages


def replace(text: str, name: str, content: str | None, path: Path) -> str:
    """`text` with the region `name` replaced by `content`; None leaves it unchanged."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{path}: one {begin} and one {end} are needed")
    head, rest = text.split(begin)
    old, tail = rest.split(end)
    return f"{head}{begin}\n{content}\n{end}{tail}" if content is not None else f"{head}{begin}{old}{end}{tail}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# --- methods and recipes ---------------------------------------------------------------------------------------------


def method_table(folder: str) -> str:
    rows = []
    for name in methods.names("patch"):
        row = methods.TABLE[name]
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper else ""
        rows.append(
            [f"[{row.title}]({folder}{name}.md)", f"`{name}`", row.summary, paper, ", ".join(row.exports) or "no"]
        )
    for kind in ("objective", "stepper"):
        for name in methods.names(kind):
            row = methods.TABLE[name]
            paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper else ""
            title = f"[{row.title}]({folder}{name}.md)" if paper else row.title  # those of a paper have a page
            rows.append([title, f"`{kind}: {name}`", row.summary, paper, ""])
    return table(["method", "in a recipe", "what it does", "paper (arXiv)", "exports to"], rows)


def demo(root: Path) -> str | None:
    captured = root / "docs/demo.txt"
    return f"```text\n{captured.read_text(encoding='utf-8').strip()}\n```" if captured.is_file() else None


def headline(root: Path) -> str | None:
    """The README's figures, the least flattering first, from the result files of three benchmarks."""
    paths = [root / f"benchmarks/results/{name}.json" for name in ("sft_speed", "meft_scale", "knowledge")]
    if not all(path.is_file() for path in paths):
        return None
    speed, scale, facts = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    row = [
        "MEFT r 16,384, tables in a file",
        f"{1 / scale['summary']['step_to_dense']:.2f} x",
        f"{scale['summary']['fast_to_dense']:.2f} x",
    ]
    peer = "against the dense Parallel Adapter r 16,384 (the same model and batch, AdamW)"
    dense = table([peer, "tokens/s", "growth of memory"], [row])
    return "\n\n".join([against_trl(speed), dense, random_facts(facts), real_facts(facts["summary"])])


def against_trl(found: dict[str, Any]) -> str:
    """Speed and memory against TRL with activation checkpointing, then without.

    If a result has no ratios to TRL with checkpointing, they are derived from the ratios without and TRL's two medians.
    """
    growth = "growth of anonymous memory, GiB"
    sides, summary = {row["side"]: row for row in found["rows"]}, found["summary"]
    plain, strict = sides[PLAIN], sides[CHECKPOINTING]
    rows: dict[str, list[list[str]]] = {"with": [], "without": []}
    for ours, key in (("PaCA r 8", "paca"), ("LoRA r 8", "lora")):
        for setting, cells in rows.items():
            ratios = []
            for what, column in (("speed", "tokens/s"), ("memory", growth)):
                ratio = summary[f"{key}_{what}_ratio"]
                if setting == "with":
                    derived = ratio * median(plain[column]) / median(strict[column])
                    ratio = summary.get(f"{key}_{what}_ratio_checkpointing", derived)
                ratios.append(f"{ratio:.2f} x")
            cells.append([ours, f"{setting} activation checkpointing", *ratios])
    head = ["against TRL + PEFT LoRA r 8 (SmolLM2-135M, bf16, 4 x 256 tokens, CPU, same malloc)", "TRL",
            "tokens/s", "growth of memory"]  # fmt: skip
    below = (
        f"TRL checkpoints activations by default. It reaches {median(strict['tokens/s']):.0f} tokens/s with "
        f"checkpointing (runs: {strict['runs']}) and {median(plain['tokens/s']):.0f} without (runs: {plain['runs']}). "
        "trimtab ran without checkpointing in both comparisons."
    )
    return f"{table(head, rows['with'] + rows['without'])}\n\n{below}"


def median(spread: str) -> float:
    """The first figure of "median (least .. most)"."""
    return float(spread.split()[0].replace(",", ""))


def interval(summary: dict[str, Any], key: str, form: str) -> tuple[str, str]:
    """Mean and 95 % interval of a figure; the file has the lower end, and Student's t is symmetric."""
    mean, low = summary[key], summary[f"{key}_low"]
    return format(mean, form), f"{format(low, form)} to {format(2 * mean - low, form)}"


def random_facts(found: dict[str, Any]) -> str:
    summary, first = found["summary"], {}
    for row in found["rows"]:  # a method's first row with its number of facts
        if "facts learned at 95 % recall" in row:
            first.setdefault(row["side"].split(" (")[0], row)
    lora, dense = (interval(summary, key, ".2f") for key in ("facts_meft_to_lora", "facts_meft_to_dense"))
    ours = first["MEFT"]
    small = [first[name]["parameters"] for name in ("LoRA", "PaCA")]
    exposures = sorted({row["exposures"] for row in found["rows"] if row["side"].startswith(("LoRA", "PaCA"))
                        and "facts learned at 95 % recall" in row})  # fmt: skip
    head = ["random facts that MEFT learns at 95 % recall, against", "facts", "95 % interval", "conditions"]
    rows = [
        ["the better of LoRA and PaCA", f"{lora[0]} x", lora[1],
         f"equal fast memory; MEFT trains {ours['parameters']:,} parameters in {ours['slow, KiB'] / 1024:.0f} MiB of "
         f"slow memory, LoRA {small[0]:,}, PaCA {small[1]:,}; MEFT sees each fact {ours['exposures']} times, LoRA and "
         f"PaCA {' or '.join(map(str, exposures))}, whichever is better"],
        ["the dense Parallel Adapter of the same width", f"{dense[0]} x", dense[1],
         f"as many parameters; MEFT uses {ours['fast, KiB']:,} KiB of fast memory, the dense adapter "
         f"{first['Parallel Adapter']['fast, KiB']:,}, and the dense adapter sees each fact "
         f"{first['Parallel Adapter']['exposures']} times"],
    ]  # fmt: skip
    below = (
        "The model is a transformer of two blocks (hidden size 64), with three seeds. The next table is for a real "
        "model."
    )
    return f"{table(head, rows)}\n\n{below}"


def real_facts(summary: dict[str, Any]) -> str:
    """On a real model the methods hardly differ; the table says so where an interval spans zero."""
    rows = []
    for many, part in (("4,000 cities, with more pairs per token", "real_4000"), ("1,000 cities", "real")):
        mean, span = interval(summary, f"{part}_meft_minus_best_points", "+.1f")
        low, high = (float(end) for end in span.split(" to "))
        rows.append([many, mean, span, "no difference shown" if low <= 0 <= high else "a difference"])
    head = ["countries of cities in SmolLM2-135M: correct answers of MEFT minus those of the best other method at "
            "equal fast memory", "points", "95 % interval", ""]  # fmt: skip
    return table(head, rows)


def search(root: Path) -> str | None:
    """The extremes of a search: the whole batch at once and the smallest micro-batch, on a bf16 and an nf4 base."""
    path = root / "benchmarks/results/plan_time.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))["candidates"]
    sizes = {row["micro_batch"] for row in found}
    ends = ((max(sizes), False), (min(sizes), True))
    rows = [
        [row["method"], str(row["micro_batch"]), "yes" if row["activation_checkpointing"] else "no", row["precision"],
         f"{row['fast_peak_bytes'] / 2**30:.2f} GiB", f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"]
         else "-", f"{row['trained']:,}", "yes" if row["fits"] else "no"]
        for row in found
        if row["precision"] in ("bf16", "nf4") and row["chunk"] is None and "activation_checkpointing_kwargs" not in row
        and (row["micro_batch"], row["activation_checkpointing"]) in ends
    ]  # fmt: skip
    head = ["method", "micro-batch", "checkpointing", "base", "fast peak", "tokens/s", "trained", "fits 1 GiB"]
    return table(head, rows)


def fields_table(cls: type) -> str:
    """Key, type, default and the field's comment in the source."""
    said, rows = comments(cls), []
    for field in dataclasses.fields(cls):
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
            needed = field.default_factory is dataclasses.MISSING
        else:
            needed = False
        rows.append([f"`{field.name}`", kind_of(field.type), "required" if needed else shown(default),
                     said.get(field.name, "")])  # fmt: skip
    if not any(row[3] for row in rows):
        return table(["key", "type", "default"], [row[:3] for row in rows])
    return table(["key", "type", "default", "meaning"], rows)


def kind_of(annotation: Any) -> str:
    """`Literal["a", "b"] | None` becomes: "a", "b" or null."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    text = re.sub(r"Literal\[(.*?)\]", r"\1", text)
    plain = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "None": "null",
             "FileName": "text", "Count": "integer", "dict[str, str]": "mapping", "dict[Column, str]": "mapping",
             "Annotated[float, Field(gt=0, lt=1)]": "number", "Name": "text",
             **dict.fromkeys(("Keys", "dict[str, Any]"), "mapping"),
             **dict.fromkeys(("list[str]", "list[FileName]", "list[Metric]"), "list of text")}  # fmt: skip
    return " or ".join(plain.get(part.strip(), part.strip()) for part in text.split(" | "))


def shown(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value)}`"


def recipe_keys() -> str:
    parts = ["## Top level\n\n" + table(["key", "type", "default", "meaning"], whole())]
    for name, cls in (("model", ModelSpec), ("data", DataSpec), ("place", recipe.Place),
                      ("engine", recipe.EngineSpec), ("stages", recipe.StageSpec),
                      ("rehearsal", recipe.RehearsalSpec), ("anchor", recipe.AnchorSpec),
                      ("anchor: {ewc: ...}", Ewc)):  # fmt: skip
        parts.append(f"## {name}\n\n{inspect.getdoc(cls)}\n\n{fields_table(cls)}")
    for kind in ("objective", "stepper"):
        for name in methods.names(kind):
            cls = methods.find(name, kind)
            if dataclasses.fields(cls):
                parts.append(f"## {kind}: {{{name}: ...}}\n\n{inspect.getdoc(cls)}\n\n{fields_table(cls)}")
    defaults = [[f"`{key}`", shown(value)] for key, value in recipe.TRAINING_DEFAULTS.items()]
    classes = [
        (name, methods.find(name, kind)) for kind in ("patch", "objective", "stepper") for name in methods.names(kind)
    ]
    of_methods = [
        [f"`{name}`", ", ".join(f"`{key}: {shown(value).strip('`')}`" for key, value in cls.defaults.items())]
        for name, cls in classes if cls.defaults and cls.defaults != Objective.defaults
    ]  # fmt: skip
    parts += [
        "## training",
        "Any field of TRL's `SFTConfig` under its own name; for classification of transformers' `TrainingArguments`,\n"
        "for `grpo`, `s_grpo` and `t_spmo` of TRL's `GRPOConfig`. `gradient_checkpointing` and its new name\n"
        "`activation_checkpointing` are both accepted. These defaults differ from the libraries', to suit small\n"
        "machines:",
        table(["key", "default here"], defaults),
        "`max_minutes: 30` (trimtab's own) stops the run before 30 minutes have passed, with a checkpoint that\n"
        "`resume=true` continues exactly; see [cli.md](cli.md#stopping-and-resuming).",
        "Some methods have other defaults; of several patches, the smallest learning rate applies:",
        table(["method", "defaults"], of_methods),
        "These fields are refused, since they would have no effect here, or another effect than their name says: "
        + ", ".join(f"`{name}`" for name in REFUSED)
        + ".",
    ]
    return "\n\n".join(parts)


def whole() -> list[list[str]]:
    said = {
        "model": ("name or mapping", "the base model, see below"),
        "data": ("file or mapping", "training and test rows, see below"),
        "patches": ("list", "the methods: `- paca: {r: 8}`; each method's page lists its keys"),
        "objective": ("name", "; ".join(methods.names("objective"))),
        "stepper": ("name", "; ".join(methods.names("stepper"))),
        "training": ("mapping", "fields of the libraries' training arguments, see below"),
        "budget": ("mapping", "`{fast: 2GiB, slow: 40GiB}`, also `80%` or `-2GiB`; [planner.md](planner.md)"),
        "place": ("mapping", "which memory is used, see below"),
        "engine": ("mapping", "how steps are computed, see below"),
        "stages": ("list", "several stages of training, one after another, see below"),
        "rehearsal": ("mapping", "rows of earlier stages that later ones repeat, see below"),
        "anchor": ("mapping", "holds weights near those after the stage before, see below"),
        "neutral": ("file", "rows of text whose perplexity is measured after each stage ([stages.md](stages.md))"),
        "output": ("text", "the folder of the run"),
        "resume": ("true or false", "continue from the newest checkpoint in `output`"),
        "overwrite": ("true or false", "replace the run in `output`"),
    }
    rows = []
    for field in dataclasses.fields(recipe.Recipe):
        kind, meaning = said[field.name]
        simple = isinstance(field.default, str | bool)
        default = shown(field.default) if simple else "`smollm2-135m`" if field.name == "model" else ""
        rows.append([f"`{field.name}`", kind, default, meaning])
    return rows


# --- architectures ---------------------------------------------------------------------------------------------------


def architectures(said: dict[str, Any]) -> str:
    outcomes, reasons = said["outcomes"], {}
    patches = list(next(iter(outcomes.values())))
    rows = []
    for name, row in sorted(outcomes.items()):
        for why in row.values():
            if why != "right":
                reasons.setdefault(why, len(reasons) + 1)
        cells = ["right" if why == "right" else f"refused ({reasons[why]})" for why in row.values()]
        rows.append([f"`{name}`", f"`{said['classes'][name]}`", *cells])
    right = sum(why == "right" for row in outcomes.values() for why in row.values())
    parts = [
        "# Architectures",
        "Generated by `docs/build.py` from `docs/architectures.json`, which `tests/test_architectures.py` checks:\n"
        f"each causal language model of transformers {said['transformers']}, built tiny with random weights, with\n"
        "each trained patch.",
        "**Right** means: the patch changes no output at first; the loss and the gradient of each trained parameter,\n"
        "computed as in a run, equal those of a reference (whole weights, plain autograd) to 1e-5 (Gemma 4 and\n"
        "Qwen 3.5's mixture of experts: 5e-5, since rounding alone changes their gradients by 1e-5); and reverting\n"
        "restores the model bit for bit. **Refused** means that an error message says so before training starts. On\n"
        "any other model, the checks before training ([data.md](data.md)) compare the loss and the fused operations.",
        f"{right} of {len(outcomes) * len(patches)} pairs are right; the others are refused.",
        table(["model type", "class", *(f"`{patch}`" for patch in patches)], rows),
        "## Why refused",
        "\n".join(f"{number}. {why}" for why, number in reasons.items()),
        "## Not tested",
        table(["model type", "why"], [[f"`{name}`", why] for name, why in said["left_out"].items()]),
    ]
    return "\n\n".join(parts) + "\n"


# --- results ---------------------------------------------------------------------------------------------------------


def results(files: list[Path]) -> str:
    parts = [
        "# Results",
        "Generated by `docs/build.py` from `benchmarks/results/`. Each file there supports one claim, measured\n"
        "against a peer on the same work. Missed targets are shown as missed. We make no claim without a file.",
    ]
    if not files:
        parts.append("No results have been recorded yet.")
    return "\n\n".join([*parts, *(one_result(path) for path in files)]) + "\n"


def one_result(path: Path) -> str:
    found = json.loads(path.read_text(encoding="utf-8"))
    if missing := [key for key in NAMED if key not in found]:
        raise SystemExit(f"{path}: no {', '.join(missing)} (benchmarks/README.md describes a result's keys)")
    targets = found.get("targets", {})
    if astray := sorted(targets.keys() - found["summary"].keys()):
        raise SystemExit(f"{path}: targets without a figure in the summary: {', '.join(astray)}")
    figures = []
    for key, value in found["summary"].items():
        op, wanted = targets.get(key, (None, None))
        verdict = "" if op is None else "met" if COMPARE[op](value, wanted) else "**missed**"
        figures.append([f"`{key}`", number(value), "" if op is None else f"{op} {number(wanted)}", verdict])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts = [f"## {found['title']}", found["claim"]]
    if any(row.get("side") == CHECKPOINTING for row in found["rows"]):
        parts.append(against_trl(found))
    parts.append(table(["figure", "measured", "target", ""], figures))
    if found["rows"]:
        head = list(dict.fromkeys(key for row in found["rows"] for key in row))
        parts.append(table(head, [[number(row.get(key, "")) for key in head] for row in found["rows"]]))
    if found["name"] == "knowledge":
        parts.append("![Recall against the number of random facts, and against how often each was seen](knowledge.svg)")
    parts += ["\n".join(f"- {note}" for note in found["notes"])] if found.get("notes") else []
    parts.append(f"`benchmarks/{found['name']}.py`, {found['date']}; {machine(found['machine'])}; {versions}.")
    return "\n\n".join(parts)


def machine(found: dict[str, Any]) -> str:
    memory = f", {found['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in found else ""
    gpu = f", {found['gpu']}" if "gpu" in found else ""
    return f"{found.get('cpu', 'processor unknown')}, {found.get('threads', '?')} threads{memory}{gpu}"


def number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main() -> None:
    stale = [path for path, text in build().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        raise SystemExit("".join(f"stale: {path.relative_to(ROOT)}\n" for path in stale) or 0)
    for path in stale:
        path.write_text(build()[path], encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
