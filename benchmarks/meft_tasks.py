"""The data sets of MEFT's paper on SmolLM2-135M: the base before training, LoRA, the dense Parallel Adapter and MEFT.

Natural Questions and SQuAD without a context (exact match after SQuAD's normalisation, and whether the answer occurs),
ToolBench (names of APIs as sets: shared over all) and GSM8K (the final number). Rows, steps and prompts are the same
for each method. Its learning rate is the one with the lowest loss on training rows set apart, after as many steps (a
shorter training needs a higher rate); if the best rate is the first or last one, the search goes on. The Parallel
Adapter has MEFT's scale, with which it learns more than with its own (benchmarks/knowledge.py). `--data FOLDER` has
nq_open, squad, toolbench and gsm8k, each with train.jsonl.gz and test.jsonl.gz in the format of the recipes in
examples/meft (ToolBench in its original format). The result contains no rows. Each training's result is kept in
results/meft_tasks_trainings.jsonl, and it is not run again.

    python benchmarks/meft_tasks.py --data FOLDER [--quick] [--sets nq,gsm8k] [--seeds 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from common import HERE, RESULTS, Kept, arguments, itself, options, say, seek, write_result  # noqa: E402

EXAMPLES = HERE.parent / "examples" / "meft"
MODEL = "smollm2-135m"
APART = 64  # training rows set apart for the learning rates


class Set(NamedTuple):
    folder: str  # of the rows
    asked: int  # questions
    length: int  # tokens of the longest row taken
    steps: int
    batch: int  # rows


SETS = {  # by recipe
    "nq": Set("nq_open", 200, 128, 120, 8), "squad": Set("squad", 200, 128, 120, 8),
    "toolbench": Set("toolbench", 99, 384, 40, 4), "gsm8k": Set("gsm8k", 48, 320, 40, 4),
}  # fmt: skip
SIDES = {  # patch, its fields, learning rates
    "LoRA r 16": ("lora", {"r": 16}, (1e-3, 2e-3)),
    "Parallel Adapter r 1600": ("parallel_adapter", {"r": 1600, "scale": 64.0}, (3.2e-5, 6.5e-5)),
    "MEFT r 1600": ("meft", {"r": 1600}, (2.5e-4, 5e-4)),
}
FURTHER = 2  # from the best rate to the next one that is tried, where the best was at an end
GIB = 2**30


# --- a child ---------------------------------------------------------------------------------------------------------


def worker(job: dict[str, Any]) -> None:
    """One training by trimtab's own verbs, or none for the base, and what `eval` says of it."""
    from trimtab import Recipe

    recipe = Recipe.load(EXAMPLES / f"{job['set']}.yaml", [])
    tree = recipe.to_dict()
    tree["data"] |= {"train": job["train"], "test": job["test"], "too_long": "drop"}
    tree["data"]["metrics"] = tree["data"]["metrics"] if job["replies"] else []
    tree["output"] = job["folder"]
    tree["patches"] = [{job["patch"] or "lora": job["fields"]}]
    for key in ("num_train_epochs", "gradient_accumulation_steps"):
        tree["training"].pop(key)
    tree["training"] |= {"max_steps": job["steps"], "per_device_train_batch_size": job["batch"],
                         "learning_rate": job["rate"], "max_length": job["length"], "seed": job["seed"]}  # fmt: skip
    recipe = Recipe.from_dict(tree)
    run = recipe.train() if job["patch"] else {"measured": {}, "trainable_parameters": 0}
    found = recipe.evaluate(base_only=not job["patch"], limit=job["asked"])
    say("result", {
        **found["metrics"], "rows": found["rows"], "parameters": run["trainable_parameters"],
        "growth": run["measured"].get("fast_growth_bytes", 0), "slow": run["measured"].get("store_slow_bytes", 0),
    })  # fmt: skip


# --- the parent ------------------------------------------------------------------------------------------------------


def prepare(name: str, data: Path, out: Path) -> dict[str, str]:
    """-> paths of the rows to train on, of those set apart, and of the test."""
    folder = data / SETS[name].folder
    if name == "toolbench":
        spec = importlib.util.spec_from_file_location("make_toolbench", EXAMPLES / "make_toolbench.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        script.make(folder, out / "toolbench")
        folder = out / "toolbench"
    lines = gzip.decompress((folder / "train.jsonl.gz").read_bytes()).decode().splitlines(keepends=True)
    paths = {"test": str(folder / "test.jsonl.gz")}
    for part, of in (("train", lines[APART:]), ("apart", lines[:APART])):
        paths[part] = str(out / f"{name}_{part}.jsonl")
        Path(paths[part]).write_text("".join(of), encoding="utf-8")
    return paths


def one_set(name: str, paths: dict[str, str], out: Path, kept: Kept, args: argparse.Namespace) -> list[dict[str, Any]]:
    """-> a row of the table for the base and each side."""
    of = SETS[name]
    steps, asked = (3, 6) if args.quick else (of.steps, of.asked)
    base = {"set": name, "length": of.length, "fields": {}, "patch": None, "rate": 0.0, "seed": 0, "steps": steps,
            "batch": of.batch, "questions": "test", "replies": True, "asked": asked}  # fmt: skip

    def run(**more: Any) -> dict[str, Any]:
        job = base | more
        if (found := kept.get(job)) is not None:
            return found
        with tempfile.TemporaryDirectory(dir=out) as folder:
            where = {"train": paths["train"], "test": paths[job["questions"]], "folder": folder + "/run"}
            found = itself(__file__, job | where, timeout=3600)
        return kept.add(job, found)

    rows = [shown(name, "base", None, [run()])]
    for side, (patch, fields, rates) in SIDES.items():
        job = {"patch": patch, "fields": fields}
        apart = {**job, "questions": "apart", "replies": False, "asked": APART}
        rate, _ = seek(lambda rate, apart=apart: -run(**apart, rate=rate)["loss"], rates, FURTHER)
        rows.append(shown(name, side, rate, [run(**job, rate=rate, seed=seed) for seed in range(args.seeds)]))
    return rows


def shown(name: str, side: str, rate: float | None, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table: means over the seeds."""
    mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    row = {"set": name, "side": side, "learning rate": rate or "", "parameters": round(mean["parameters"]),
           "growth, GiB": mean["growth"] / GIB, "table in a file, GiB": mean["slow"] / GIB,
           "questions": round(mean["rows"]), "loss": mean["loss"]}  # fmt: skip
    row |= {key: mean[key] for key in ("exact_match", "contains", "set_iou", "final_number") if key in mean}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", help="the folder with the four data sets")
    parser.add_argument("--sets", default=",".join(SETS), help="only these, by commas")
    parser.add_argument("--seeds", type=int, default=1)
    if (args := arguments(parser, worker, needs_data=True)) is None:
        return
    path = Path(args.json) if args.json else RESULTS / "meft_tasks.json"
    for name in args.sets.split(","):
        with tempfile.TemporaryDirectory() as folder:
            kept = Kept(Path(folder) / "kept" if args.quick else path.with_name("meft_tasks_trainings.jsonl"))
            rows = one_set(name, prepare(name, Path(args.data), Path(folder)), Path(folder), kept, args)
        if args.quick and not args.json:
            continue
        before = json.loads(path.read_text())["rows"] if path.is_file() else []
        before = sorted([row for row in before if row["set"] != name] + rows, key=lambda row: [*SETS].index(row["set"]))
        write_result(
            "meft_tasks", args.json, title="MEFT's own data sets", claim=CLAIM, summary=summary(before), rows=before,
            notes=NOTES,
        )  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Points by which MEFT's score is above the others', by set."""
    found = {}
    for name in dict.fromkeys(row["set"] for row in rows):
        metric = {"nq": "contains", "squad": "contains", "toolbench": "set_iou", "gsm8k": "final_number"}[name]
        score = {row["side"].split(" r ")[0]: row[metric] for row in rows if row["set"] == name}
        for other in ("base", "LoRA", "Parallel Adapter"):
            key = f"{name}_meft_minus_{other.lower().replace(' ', '_')}_points"
            found[key] = 100 * (score["MEFT"] - score[other])
    return found


CLAIM = (
    "SmolLM2-135M: the base, LoRA on all linears, the dense Parallel Adapter and MEFT of the same width on the four "
    "data sets of MEFT's paper."
)
NOTES = [
    "Each set is a part of the original one, and steps are few: the figures compare methods, not papers. "
    + " ".join(f"{name}: {of.steps} steps of {of.batch} rows." for name, of in SETS.items()),
    "Standard error of a share p of n questions: sqrt(p (1 - p) / n), 7 points at most for 48 questions, 4 for 200.",
    "contains: the base writes long replies, so an answer occurs in them more often than it is the reply "
    "(exact_match).",
    "summary: points of `contains` (nq, squad), `set_iou` (toolbench) and `final_number` (gsm8k).",
    "growth: anonymous memory of the process beyond the loaded model, by trimtab's meter.",
]


if __name__ == "__main__":
    main()
