"""Diff pruning at 0.5 % of the parameters against full fine-tuning: accuracy on two GLUE sets, file, memory, switching.

Accuracy (`--data FOLDER`, with glue_sst2 and glue_mrpc, each with train.jsonl.gz and validation.jsonl.gz): MiniLM-L6
with a new head, equal rows and steps, three seeds, scored on GLUE's validation rows: full fine-tuning, diff pruning
with group gates (structured) and without. Each side's learning rate is the one with the best accuracy on training rows
of the first set that were set apart, after as many steps; if the best rate is the first or the last one, the search
goes on. The result contains no rows. Each training's result is kept in results/diff_pruning_trainings.jsonl, and it
is not run again.

Memory: the peak of anonymous memory beyond the loaded model in a run through both phases, against full fine-tuning with
AdamW, each in fresh processes, alternating. File: the tensors of a task, without its head, against the model's file.
Switching: from one task to another in the weights of the base model, in place.

    python benchmarks/diff_pruning.py --data FOLDER [--parts memory,accuracy] [--quick] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    RESULTS,
    Clock,
    Kept,
    alternate,
    arguments,  # noqa: E402
    conclude,
    follow,
    glue_rows,
    in_parts,
    itself,
    options,
    ratios,
    say,
    seek,
    spread,
)

MODEL = "minilm-l6"
APART = 800  # training rows set apart for the learning rates
SETS = {"sst2": 64, "mrpc": 96}  # tokens of the longest row taken; longer ones are cut
STEPS, BATCH, SEEDS = 200, 16, 3
SIDES = {  # patch, its fields, learning rates
    "full": ("full", {}, (1e-4, 2e-4)),
    "structured": ("diff_pruning", {"structured": True}, (5e-4, 1e-3)),
    "unstructured": ("diff_pruning", {"structured": False}, (5e-4, 1e-3)),
}
FURTHER = 2  # from the best rate to the next one that is tried, where the best was at an end
TRIED = 101  # the seed of the search for a learning rate
PAPER_BATCH = 8  # rows of a step, for memory (section 4)
HELD, MIB = "anon_growth_since_train", 2**20


# --- accuracy --------------------------------------------------------------------------------------------------------


def recipe(job: dict[str, Any], paths: dict[str, str], out: Path) -> Any:
    from trimtab import Recipe

    patch, fields, _ = SIDES[job["side"]]
    return Recipe(
        model=MODEL, objective="classification", output=str(out / "run"), patches=[{patch: fields}],
        data={"train": paths["train"], "test": paths[job["on"]], "too_long": "cut"},
        training={"max_steps": job["steps"], "per_device_train_batch_size": job.get("batch", BATCH),
                  "learning_rate": job["rate"], "seed": job["seed"], "max_length": SETS[job["set"]],
                  "warmup_steps": job["steps"] // 16, "lr_scheduler_type": "linear", "save_strategy": "no",
                  "report_to": "none"},
    )  # fmt: skip


def learned(job: dict[str, Any], paths: dict[str, str], out: Path) -> dict[str, Any]:
    """Trains; -> the accuracy on `job["on"]`. Nothing is timed, so no process of its own is needed."""
    made = recipe(job, paths, out)
    made.train()
    few = None if job["steps"] == STEPS else 100  # the short form
    return {"accuracy": made.evaluate(limit=few)["metrics"]["accuracy"]}


def accuracy(args: argparse.Namespace, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    steps, seeds = (6, 1) if args.quick else (STEPS, SEEDS)
    kept = Kept(folder / "kept" if args.quick else RESULTS / "diff_pruning_trainings.jsonl")
    means: dict[str, list[float]] = {side: [] for side in SIDES}
    rows, chosen = [], {}
    for name in ("mrpc",) if args.quick else SETS:
        paths = glue_rows(name, Path(args.data), folder, APART)

        def run(paths: dict[str, str] = paths, **job: Any) -> dict[str, Any]:
            return kept.once(job, lambda out: learned(job, paths, out), folder)

        for side, (_, _, rates) in SIDES.items():
            job = {"set": name, "side": side, "steps": steps}

            def score(rate: float, job: dict[str, Any] = job) -> float:
                return run(**job, on="apart", rate=rate, seed=TRIED)["accuracy"]

            if side not in chosen:
                chosen[side], _ = seek(score, rates[:1] if args.quick else rates, FURTHER)
            rate = chosen[side]
            ends = [run(**job, on="test", rate=rate, seed=seed) for seed in range(1, seeds + 1)]
            means[side].append(100 * statistics.mean(end["accuracy"] for end in ends))
            rows.append({"side": f"{side}, {name}", "learning rate": rate, "runs": seeds,
                         "accuracy": spread([100 * end["accuracy"] for end in ends])})  # fmt: skip
    summary = {}
    for name, of, other in (("glue_minus_full_points", "structured", "full"),
                            ("structured_minus_unstructured_points", "structured", "unstructured")):  # fmt: skip
        summary[name] = statistics.mean(a - b for a, b in zip(means[of], means[other], strict=True))
    return summary, rows


# --- memory and switching --------------------------------------------------------------------------------------------


def worker(job: dict[str, Any]) -> None:
    """In its own process: a short run, or switches between two tasks."""
    if job["side"] == "switching":
        say("result", switching(job["folders"], job["times"]))
        return
    follow(clock := Clock())
    with tempfile.TemporaryDirectory() as out:
        recipe(job, job["paths"], Path(out)).train()
    say("result", {"seconds": clock.median})


def switching(folders: list[str], times: int) -> dict[str, Any]:
    """Milliseconds of a switch between the tasks of two adapter folders, in the weights of the base."""
    import torch

    from trimtab import load_adapter
    from trimtab.model.load import base_hash, load_model
    from trimtab.model.sparse_delta import Tasks

    model, _ = load_model(MODEL, task="classification", labels=2)
    before, hash_of_base, deltas = {key: t.clone() for key, t in model.state_dict().items()}, base_hash(model), {}
    for folder in folders:
        surgeries = load_adapter(model, folder)
        deltas[folder] = surgeries[0].delta(hash_of_base)
        for surgery in reversed(surgeries):
            surgery.revert()
    tasks, taken = Tasks(model, hash_of_base, deltas), []
    for number in range(times):
        began = time.perf_counter()
        tasks.switch(folders[number % len(folders)])
        taken.append(1e3 * (time.perf_counter() - began))
    tasks.switch(None)
    exact = all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    return {"ms": statistics.median(taken[1:]), "exact": exact, "entries": deltas[folders[0]].entries}


def memory(args: argparse.Namespace, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    from trimtab.model.hub import cached_folder

    name = "mrpc"
    paths = glue_rows(name, Path(args.data), folder, APART)
    job = {"set": name, "on": "test", "steps": 6, "rate": 1e-4, "seed": 0, "paths": paths}
    pairs = [(batch, side) for batch in (BATCH, PAPER_BATCH) for side in ("full", "structured")]
    run = lambda batch, side: itself(__file__, {**job, "batch": batch, "side": side})  # noqa: E731
    runs = alternate({pair: (lambda pair=pair: run(*pair)) for pair in pairs}, 1 if args.quick else args.rounds)
    rows = [
        {"side": f"{side}, memory, {batch} rows", "runs": len(found),
         "growth, MiB": spread([one[HELD] / MIB for one in found]),
         "process, MiB": spread([one["anon_peak"] / MIB for one in found])}
        for (batch, side), found in runs.items()
    ]  # fmt: skip
    folders = []
    for seed in (1, 2):
        recipe({**job, "side": "structured", "rate": 2e-3, "seed": seed}, paths, folder / f"task-{seed}").train()
        folders.append(str(folder / f"task-{seed}" / "run" / "adapter"))
    found = itself(__file__, {"side": "switching", "folders": folders, "times": 21})
    if not found["exact"]:
        raise SystemExit("the base is not what it was before the switches")
    size, model = (sum(path.stat().st_size for path in where.glob("*.safetensors"))
                   for where in (Path(folders[0]) / "0-diff_pruning", cached_folder(MODEL)))  # fmt: skip
    rows.append({"side": f"a task of {found['entries']:,} entries", "runs": 20, "file, KiB": round(size / 1024),
                 "switch, ms": found["ms"]})  # fmt: skip
    held = {b: statistics.median(ratios(runs[b, "structured"], runs[b, "full"], HELD)) for b in (BATCH, PAPER_BATCH)}
    least = {"memory_to_full": held[BATCH], "memory_to_full_8_rows": held[PAPER_BATCH]}
    return {**least, "file_to_model": size / model, "switch_ms": found["ms"]}, rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", metavar="FOLDER", help="the folder of the two GLUE sets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default="memory,accuracy", help="the other part's figures stay in the result file")
    if (args := arguments(parser, worker, needs_data=True)) is None:
        return
    summary, rows = in_parts("diff_pruning", args, COLUMNS, {"memory": memory, "accuracy": accuracy})
    title, targets = "Diff pruning against full fine-tuning", {key: TARGETS[key] for key in TARGETS if key in summary}
    notes = NOTES if any(row["accuracy"] for row in rows) else [*NOTES[1:], "The accuracy has not been measured yet."]
    conclude("diff_pruning", args, summary, targets, title=title, claim=CLAIM, rows=rows, notes=notes)


COLUMNS = ("side", "runs", "learning rate", "accuracy", "growth, MiB", "process, MiB", "file, KiB", "switch, ms")
TARGETS = {
    "glue_minus_full_points": [">=", -1.5], "structured_minus_unstructured_points": [">=", 0],
    "file_to_model": ["<=", 0.01], "memory_to_full": ["<=", 0.6],
}  # fmt: skip
CLAIM = (
    "MiniLM-L6 on two GLUE sets: diff pruning that changes 0.5 % of the model's parameters, with and without group "
    "gates, against full fine-tuning at equal steps."
)
NOTES = [
    f"Accuracy: {STEPS} steps of {BATCH} rows, {SEEDS} seeds, on GLUE's validation rows (SST-2 872, MRPC 400; standard "
    f"error of one run: 1 and 2 points). The rates were chosen on {APART} training rows of SST-2 set apart, and serve "
    "both sets. Points are means of the two sets' differences.",
    f"Memory: 6 steps, so that both phases are run, of {BATCH} rows, and of 8 (the paper's batch), of up to 96 tokens. "
    "growth: anonymous "
    "memory beyond the loaded model; process: all of it. Both sides have the same activations. memory_to_full is a "
    "ratio of growths.",
    "The task file has values in fp32 and columns in 16 bits; the head's file is apart. The model's file is fp32.",
]


if __name__ == "__main__":
    main()
