"""What to pick at equal quality: PaCA and QPaCA beside LoRA with checkpointing, LoRA-FA, VeLoRA, GaLore, APOLLO, 8-bit
Adam.

SmolLM2-135M, rank 8 everywhere, AdamW or the side's own optimizer, one thread, all through trimtab. GaLore, APOLLO and
8-bit Adam train all weights, in fp32 with autocast; the others train an adapter on the bf16 (QPaCA: nf4) base. A side
whose library is not installed is left out, and named.

Memory and speed: 5 steps of 4 x 128 tokens of our own text, the peak of anonymous memory beyond the loaded model and
the median step after the first two, in fresh processes, alternating.

Loss (`--data FOLDER`, with train.jsonl.gz that has a `text` column): 16 steps of 4 x 128 tokens, then the loss on text
that was not trained on. The learning rate is the best of three after as many steps, on rows set apart. Each training is
kept in results/choices_trainings.jsonl, and not run again. The result contains no rows.

    python benchmarks/choices.py --data FOLDER [--parts memory,loss] [--quick] [--rounds 2] [--json FILE]
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
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    RESULTS,
    Clock,
    Kept,
    alternate,
    arguments,
    child,
    city_text,
    conclude,
    follow,
    options,
    ratios,
    say,
    spread,
    training,
)

LENGTH, STEPS, TIMED, BATCH = 128, 16, 5, 4
APART, FROM, ON, LONGEST = 4, 40, 4, 3000  # rows of text: set apart, to train on, to score; characters of each
SPEED, HELD, MIB = "tokens_per_second", "anon_growth_since_train", 2**20
R8, BLOCKS = {"r": 8, "alpha": 16}, {"optim_target_modules": ["attn", "mlp"]}
ADAPTER = (1e-3, 3e-3, 1e-2)
SIDES: dict[str, dict[str, Any]] = {  # patch, fields of training:, precision, learning rates, a library
    "PaCA r 8": {"patch": {"paca": R8}, "rates": ADAPTER},
    "QPaCA r 8 (nf4)": {"patch": {"paca": R8}, "precision": "nf4", "rates": ADAPTER},
    "LoRA r 8": {"patch": {"lora": R8}, "rates": ADAPTER},
    "LoRA r 8, checkpointing": {"patch": {"lora": R8}, "rates": ADAPTER,
                                "training": {"activation_checkpointing": True}},
    "LoRA-FA r 8": {"patch": {"lora": {**R8, "fa": True}}, "rates": ADAPTER},
    "VeLoRA r 8": {"patch": {"lora": {**R8, "velora": True}}, "rates": ADAPTER},
    "GaLore r 8, all weights": {"patch": {"full": {}}, "rates": (1e-4, 3e-4, 1e-3), "needs": "galore_torch",
                                "training": {"optim": "galore_adamw", "optim_args": "rank=8", **BLOCKS}},
    "APOLLO r 8, all weights": {"patch": {"full": {}}, "rates": (1e-4, 3e-4, 1e-3), "needs": "apollo_torch",
                                "training": {"optim": "apollo_adamw", "optim_args": "rank=8", **BLOCKS}},
    "8-bit Adam, all weights": {"patch": {"full": {}}, "rates": (3e-5, 1e-4, 3e-4), "needs": "bitsandbytes",
                                "training": {"optim": "adamw_bnb_8bit"}},
}  # fmt: skip
SAME = {"LoRA r 8, checkpointing": "LoRA r 8"}  # the same steps as another side


def recipe(job: dict[str, Any], paths: dict[str, str], out: Path) -> Any:
    from trimtab import Recipe

    side = SIDES[job["side"]]
    fields = training(job["steps"], job["rate"], job["seed"]) | {"max_length": LENGTH, **side.get("training", {})}
    return Recipe(
        model={"name": "smollm2-135m", "precision": side.get("precision", "auto")}, patches=[side["patch"]],
        data={"train": paths["train"], **({"test": paths[job["on"]]} if "on" in job else {})},
        training={**fields, "per_device_train_batch_size": BATCH}, output=str(out / "run"),
    )  # fmt: skip


def worker(job: dict[str, Any]) -> None:
    """In its own process: a short run."""
    clock = Clock()
    follow(clock)
    with tempfile.TemporaryDirectory() as out:
        run = recipe(job, job["paths"], Path(out)).train()
    say("result", {SPEED: BATCH * LENGTH / clock.median, "trained": run["trainable_parameters"]})


def present() -> tuple[list[str], list[str]]:
    """-> the sides that can run here, and those whose library is missing, with its name."""
    missing = {name for name, side in SIDES.items() if "needs" in side and not importlib.util.find_spec(side["needs"])}
    return [name for name in SIDES if name not in missing], [f"{name} ({SIDES[name]['needs']})" for name in missing]


def memory(args: argparse.Namespace, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    city_text(folder / "cities.jsonl")
    job = {
        "steps": 4 if args.quick else TIMED,
        "rate": 1e-4,
        "seed": 0,
        "paths": {"train": str(folder / "cities.jsonl")},
    }
    runs = alternate({
        side: (lambda side=side: child(
            [__file__, "--worker", json.dumps({**job, "side": side})], threads=1, timeout=1200
        ))
        for side in chosen(args)
    }, 1 if args.quick else args.rounds)  # fmt: skip
    rows = [
        {"side": side, "runs": len(found), "trained": found[0]["trained"],
         "growth, MiB": spread([one[HELD] / MIB for one in found]), "tokens/s": spread([one[SPEED] for one in found])}
        for side, found in runs.items()
    ]  # fmt: skip
    summary = {}
    for side, key in KEYS.items():
        if side in runs:
            summary[f"paca_growth_to_{key}"] = statistics.median(ratios(runs["PaCA r 8"], runs[side], HELD))
            summary[f"paca_speed_to_{key}"] = statistics.median(ratios(runs["PaCA r 8"], runs[side], SPEED))
    return summary, rows


def texts(data: Path, folder: Path) -> dict[str, str]:
    """Writes the rows; -> the paths of those to train on, of those set apart, and of the test."""
    with gzip.open(data / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        found = [json.loads(line)["text"][:LONGEST] for line in file]
    parts = {"apart": found[:APART], "train": found[APART:-ON][:FROM], "test": found[-ON:]}
    for part, rows in parts.items():
        lines = [json.dumps({"text": text}) + "\n" for text in rows]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {part: str(folder / f"{part}.jsonl") for part in parts}


def loss(args: argparse.Namespace, folder: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    kept = Kept(folder / "kept" if args.quick else RESULTS / "choices_trainings.jsonl")
    paths, steps, ends, rows = texts(Path(args.data), folder), 2 if args.quick else STEPS, {}, []

    def learned(job: dict[str, Any], out: Path) -> dict[str, Any]:
        made = recipe(job, paths, out)
        made.train()
        return {"loss": made.evaluate(limit=2 if args.quick else None)["metrics"]["loss"]}

    for side in chosen(args):
        if side in SAME:
            continue
        job, rates = {"side": side, "steps": steps, "data": Path(args.data).name}, SIDES[side]["rates"]
        tried = {
            rate: kept.once(one, lambda out, one=one: learned(one, out), folder)["loss"]
            for rate in (rates[:1] if args.quick else rates)
            for one in [{**job, "on": "apart", "rate": rate, "seed": 101}]
        }
        rate = min(tried, key=tried.get)
        end = {**job, "on": "test", "rate": rate, "seed": 1}
        ends[side] = kept.once(end, lambda out, end=end: learned(end, out), folder)["loss"]
        rows.append({"side": side, "runs": 1, "learning rate": rate, "loss": round(ends[side], 4)})
    return {f"paca_loss_to_{KEYS[side]}": ends["PaCA r 8"] / ends[side] for side in ends if side in KEYS}, rows


def chosen(args: argparse.Namespace) -> list[str]:
    names = present()[0]
    return [name for name in names if name in QUICK] if args.quick else names


KEYS = {
    "QPaCA r 8 (nf4)": "qpaca", "LoRA r 8": "lora", "LoRA r 8, checkpointing": "lora_checkpointing",
    "LoRA-FA r 8": "lora_fa", "VeLoRA r 8": "velora", "GaLore r 8, all weights": "galore",
    "APOLLO r 8, all weights": "apollo", "8-bit Adam, all weights": "adam_8bit",
}  # fmt: skip
QUICK = ("PaCA r 8", "LoRA-FA r 8")
TARGETS: dict[str, list[Any]] = {}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", metavar="FOLDER", help="a folder with train.jsonl.gz, whose rows have a text")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parts", default="memory,loss", help="the other part's figures stay in the result file")
    if (args := arguments(parser, worker, needs_data=True)) is None:
        return
    path = Path(args.json) if args.json else RESULTS / "choices.json"
    before = {"summary": {}, "rows": []} if args.quick or not path.is_file() else json.loads(path.read_text())
    summary, rows = before["summary"], {row["side"]: row for row in before["rows"]}
    for part in (part for part in (memory, loss) if part.__name__ in args.parts.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            figures, found = part(args, Path(folder))
        summary = {**summary, **figures}
        for row in found:
            rows[row["side"]] = {**rows.get(row["side"], {}), **row, "runs": 1 if args.quick else args.rounds}
    for side, other in SAME.items():
        if side in rows and "loss" in rows.get(other, {}):
            rows[side] |= {key: rows[other][key] for key in ("learning rate", "loss")}
    left_out = present()[1]
    notes = [*NOTES, *([f"Left out, since a library is missing: {', '.join(left_out)}."] if left_out else [])]
    table = [{key: row.get(key, "") for key in COLUMNS} for row in rows.values()]
    for row in table:
        print("  ".join(f"{key}: {value}" for key, value in row.items() if value != ""))
    conclude("choices", args, summary, TARGETS, title="What to pick instead", claim=CLAIM, rows=table, notes=notes)


COLUMNS = ("side", "runs", "trained", "growth, MiB", "tokens/s", "learning rate", "loss")
CLAIM = (
    "SmolLM2-135M, rank 8: PaCA and QPaCA beside what a user would pick instead: memory beyond the loaded model, "
    "speed, and the loss on unseen text after as many steps."
)
NOTES = [
    f"growth: anonymous memory beyond the loaded model; tokens/s of the median step after the first two of {TIMED} "
    f"steps of {BATCH} x {LENGTH} tokens, one thread; ratios are taken per round.",
    "QPaCA's base is anonymous memory itself and counts as loaded; the sides that train all weights hold them in fp32.",
    f"loss: on {ON} texts that were not trained on, after {STEPS} steps of {BATCH} x {LENGTH} tokens, one seed, at the "
    f"best of three rates on {APART} rows set apart. LoRA with checkpointing takes the steps of LoRA.",
]


if __name__ == "__main__":
    main()
