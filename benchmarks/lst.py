"""LST against LoRA: memory at equal parameters, and accuracy on SST-2 after as many steps.

Memory: MiniLM-L6 and SmolLM2-135M, the peak of anonymous memory beyond the loaded model in a short run of each side, in
fresh processes, alternating. LoRA's rank is the one with the nearest number of trained parameters.

Accuracy (`--data FOLDER`, with glue_sst2/train.jsonl.gz and validation.jsonl.gz): MiniLM-L6 with a new head, 150 steps
of 16 rows, three seeds, scored on GLUE's validation rows. Each side's learning rate is the one with the best accuracy
on training rows set apart, after as many steps. Each training is kept in results/lst_trainings.jsonl, and not run
again. The result contains no rows.

    python benchmarks/lst.py --data FOLDER [--parts memory,accuracy] [--quick] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    RESULTS,
    Kept,
    alternate,
    arguments,
    child,
    city_text,
    conclude,
    follow,
    glue_rows,
    in_parts,
    options,
    ratios,
    say,
    spread,
)

APART, SET, LENGTH = 800, "sst2", 48  # training rows set apart; tokens of the longest row taken
STEPS, BATCH, SEEDS, TRIED = 150, 16, 3, 101
MODELS = {"minilm-l6": "classification", "smollm2-135m": "causal_lm"}
SIDES = {"lst": ({"r": 8}, (3e-3, 1e-2)), "lora": ({}, (1e-3, 3e-3))}  # fields, learning rates
HELD, MIB = "anon_growth_since_train", 2**20


def recipe(job: dict[str, Any], paths: dict[str, str], out: Path) -> Any:
    from trimtab import Recipe

    fields = {**SIDES[job["side"]][0], **({"r": job["r"], "alpha": 2 * job["r"]} if job["side"] == "lora" else {})}
    return Recipe(
        model=job["model"], objective=MODELS[job["model"]], output=str(out / "run"), patches=[{job["side"]: fields}],
        data={"train": paths["train"], "test": paths[job["on"]], "too_long": "cut"},
        training={"max_steps": job["steps"], "per_device_train_batch_size": job["batch"],
                  "learning_rate": job["rate"], "seed": job["seed"], "max_length": job["length"],
                  "warmup_steps": job["steps"] // 16, "lr_scheduler_type": "linear", "save_strategy": "no",
                  "report_to": "none"},
    )  # fmt: skip


def equal_rank(model: str) -> tuple[int, dict[str, int]]:
    """-> the rank of the LoRA whose number of trained parameters is nearest to LST's, and both numbers."""
    from trimtab import methods
    from trimtab.contracts import Place
    from trimtab.model.load import empty_model
    from trimtab.model.spec import ModelSpec

    def trained(patch: Any) -> int:
        empty, _ = empty_model(ModelSpec(model), task="causal-lm" if "smol" in model else "classification", labels=2)
        surgery = patch.apply(empty, Place(fast="cpu"))
        return sum(t.numel() for t in surgery.own_tensors().values() if t.requires_grad)

    wanted, one = trained(methods.find("lst")(**SIDES["lst"][0])), trained(methods.find("lora")(r=1))
    rank = max(1, round(wanted / one))
    return rank, {"lst": wanted, "lora": rank * one}


def worker(job: dict[str, Any]) -> None:
    """In its own process: a short run."""
    from common import Clock

    follow(Clock())
    with tempfile.TemporaryDirectory() as out:
        recipe(job, job["paths"], Path(out)).train()
    say("result", {"steps": job["steps"]})


def memory(args: argparse.Namespace, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    summary, rows = {}, []
    city_text(folder / "cities.jsonl")
    text = dict.fromkeys(("train", "test"), str(folder / "cities.jsonl"))
    for model in list(MODELS)[:1] if args.quick else MODELS:
        paths = text if "smol" in model else glue_rows("mrpc", Path(args.data), folder, APART)
        rank, counts = equal_rank(model)
        job = {"model": model, "on": "test", "steps": 4, "rate": 1e-4, "seed": 0, "paths": paths, "r": rank,
               "batch": 4 if "smol" in model else 32, "length": 256 if "smol" in model else 96}  # fmt: skip
        run = lambda side, job=job: child(  # noqa: E731
            [__file__, "--worker", json.dumps({**job, "side": side})], threads=1, timeout=3000
        )
        runs = alternate(
            {side: (lambda side=side, run=run: run(side)) for side in SIDES}, 1 if args.quick else args.rounds
        )
        for side, found in runs.items():
            rows.append({"side": f"{side}, {model}", "runs": len(found), "trained": counts[side],
                         "growth, MiB": spread([one[HELD] / MIB for one in found])})  # fmt: skip
        key = "growth_to_lora" if "smol" in model else "growth_to_lora_encoder"
        summary[key] = statistics.median(ratios(runs["lst"], runs["lora"], HELD))
    return summary, rows


def accuracy(args: argparse.Namespace, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    steps, seeds = (6, 1) if args.quick else (STEPS, SEEDS)
    kept = Kept(folder / "kept" if args.quick else RESULTS / "lst_trainings.jsonl")
    paths, (rank, counts) = glue_rows(SET, Path(args.data), folder, APART), equal_rank("minilm-l6")
    means, rows = {}, []

    def learned(job: dict[str, Any], out: Path) -> dict[str, Any]:
        made = recipe(job, paths, out)
        made.train()
        return {"accuracy": made.evaluate(limit=100 if args.quick else None)["metrics"]["accuracy"]}

    def run(**job: Any) -> float:
        return kept.once(job, lambda out: learned(job, out), folder)["accuracy"]

    for side, (_, rates) in SIDES.items():
        job = {"model": "minilm-l6", "side": side, "steps": steps, "batch": BATCH, "length": LENGTH,
               "r": rank if side == "lora" else 0}  # fmt: skip
        tried = {rate: run(**job, on="apart", rate=rate, seed=TRIED) for rate in (rates[:1] if args.quick else rates)}
        rate = max(tried, key=tried.get)
        ends = [100 * run(**job, on="test", rate=rate, seed=seed) for seed in range(1, seeds + 1)]
        means[side] = statistics.mean(ends)
        rows.append({"side": f"{side}, {SET}", "runs": seeds, "trained": counts[side], "learning rate": rate,
                     "accuracy": spread(ends)})  # fmt: skip
    return {"glue_minus_lora_points": means["lst"] - means["lora"]}, rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", metavar="FOLDER", help="the folder of the GLUE sets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default="memory,accuracy", help="the other part's figures stay in the result file")
    if (args := arguments(parser, worker, needs_data=True)) is None:
        return
    summary, rows = in_parts("lst", args, COLUMNS, {"memory": memory, "accuracy": accuracy})
    targets = {key: TARGETS[key] for key in TARGETS if key in summary}
    conclude("lst", args, summary, targets, title="LST against LoRA", claim=CLAIM, rows=rows, notes=NOTES)


COLUMNS = ("side", "runs", "trained", "learning rate", "accuracy", "growth, MiB")
TARGETS = {"growth_to_lora": ["<=", 0.5], "growth_to_lora_encoder": ["<=", 0.5], "glue_minus_lora_points": [">=", -3]}
CLAIM = (
    "A ladder side network of an eighth of the model's width against a LoRA with as many trained parameters: memory "
    "beyond the loaded model, and accuracy on SST-2 with MiniLM-L6 after as many steps."
)
NOTES = [
    "growth: anonymous memory beyond the loaded model; 4 steps, of 4 rows of 256 tokens (SmolLM2-135M) and of 32 rows "
    "of up to 96 tokens (MiniLM-L6), without activation checkpointing.",
    f"Accuracy: {STEPS} steps of {BATCH} rows of up to {LENGTH} tokens, {SEEDS} seeds, on GLUE's 872 validation rows "
    f"(standard error of one run: 1 point). The rates were chosen on {APART} training rows set apart.",
]


if __name__ == "__main__":
    main()
