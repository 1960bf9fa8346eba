"""Speed and memory of fine-tuning: trimtab's PaCA, QPaCA and LoRA against TRL's SFTTrainer with a PEFT LoRA.

SmolLM2-135M, bf16 base, rank 8 on all linears, 4 x 256 tokens per step, AdamW, the same text. The peer runs in each
round with activation checkpointing, which is its default, and without. The table marks its best setting: with
checkpointing if that uses less memory and is not slower. It has the same malloc as ours; one run uses the system's
malloc, as TRL's users do. The loss part (`--losses FOLDER`, with train.jsonl.gz and test.jsonl.gz that have a `text`
column) measures the loss on unseen text after equal steps at equal parameter count (PaCA r 16, LoRA r 8; 3 seeds), each
at the learning rate that was better on training rows set apart.

    python benchmarks/sft_speed.py [--quick] [--rounds 5] [--json FILE]
    python benchmarks/sft_speed.py --losses FOLDER [--json FILE]     adds the loss to the result file
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import (  # noqa: E402
    LENGTH,
    RESULTS,
    ROWS,
    Clock,
    alternate,
    city_text,
    conclude,
    follow,
    itself,
    options,
    ratios,
    say,
    spread,
    ticks,
    training,
)

PLAIN = "TRL + PEFT LoRA r 8"
CHECKPOINTING = f"{PLAIN}, checkpointing"
GIB = 2**30


# --- children --------------------------------------------------------------------------------------------------------


def ours(job: dict[str, Any]) -> None:
    """trimtab through its own verb's code."""
    clock = Clock()
    follow(clock)
    with tempfile.TemporaryDirectory() as folder:
        run = recipe(job, folder).train()
    speed = ROWS * LENGTH / clock.median
    say("result", {"tokens_per_second": speed, "loss": run["mean_loss"], "parameters": run["trainable_parameters"]})


def recipe(job: dict[str, Any], folder: str) -> Any:
    from trimtab import Recipe

    return Recipe(
        model={"name": "smollm2-135m", "precision": job.get("precision", "auto")},
        data={"train": job["text"], **({"test": job["test"]} if "test" in job else {})},
        patches=[{job["patch"]: job["fields"]}],
        training=training(job["steps"], job["rate"], job["seed"]),
        engine=job.get("engine", {}),
        output=folder + "/run",
    )


def learned(job: dict[str, Any]) -> dict[str, Any]:
    """Train, then the loss on text that was not trained on. Nothing is timed, so no process of its own is needed."""
    with tempfile.TemporaryDirectory() as folder:
        plan = recipe(job, folder)
        run = plan.train()
        found = plan.evaluate()
    return {"loss": found["metrics"]["loss"], "parameters": run["trainable_parameters"]}


def peer(job: dict[str, Any]) -> None:
    """TRL + PEFT as their documentation uses them."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from trimtab.model.load import cached_folder

    clock = Clock()
    folder = cached_folder("smollm2-135m")
    dataset = load_dataset("json", data_files=job["text"], split="train")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    say("mark", "load")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    say("mark", "train")
    with tempfile.TemporaryDirectory() as out:
        fields = training(job["steps"], job["rate"], job["seed"])
        fields |= {"gradient_checkpointing": job.get("checkpointing", False), "bf16": job.get("bf16", True)}
        args = SFTConfig(out, use_cpu=True, disable_tqdm=True, **fields)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=config, callbacks=[ticks(clock)]
        )
        trainer.train()
    say("result", {"tokens_per_second": ROWS * LENGTH / clock.median})


# --- the benchmark ---------------------------------------------------------------------------------------------------


def run(job: dict[str, Any], malloc: str = "auto") -> dict[str, Any]:
    return itself(__file__, job, malloc=malloc)


def sides(text: str, steps: int) -> dict[str, tuple[dict[str, Any], str]]:
    """What runs in each round: name -> (job, malloc)."""
    base = {"text": text, "steps": steps, "rate": 1e-3, "seed": 0}
    paca = {**base, "side": "ours", "patch": "paca"}
    r8 = {"r": 8, "alpha": 16}
    return {
        PLAIN: ({**base, "side": "peer"}, "auto"),
        CHECKPOINTING: ({**base, "side": "peer", "checkpointing": True}, "auto"),
        "PaCA r 8": ({**paca, "fields": r8}, "auto"),
        "LoRA r 8": ({**base, "side": "ours", "patch": "lora", "fields": {"r": 8}}, "auto"),
        "QPaCA r 8 (nf4)": ({**paca, "fields": r8, "precision": "nf4"}, "auto"),
        "QPaCA r 8 (nf4), no recomputing": (
            {**paca, "fields": r8, "precision": "nf4", "engine": {"recompute": "none"}},
            "auto",
        ),
        "PaCA r 8, FFN recomputed": ({**paca, "fields": r8, "engine": {"recompute": "ffn"}}, "auto"),
        "PaCA r 8, live form": ({**paca, "fields": {**r8, "form": "live"}}, "auto"),
        f"{PLAIN}, system malloc": ({**base, "side": "peer"}, "none"),
        f"{PLAIN}, no autocast": ({**base, "side": "peer", "bf16": False}, "auto"),
    }


TARGETS = {
    "paca_speed_ratio_checkpointing": [">=", 1.6], "paca_memory_ratio_checkpointing": ["<=", 0.5],
    "lora_speed_ratio_checkpointing": [">=", 1.15], "lora_memory_ratio_checkpointing": ["<=", 0.7],
    "paca_speed_ratio": [">=", 1.6], "paca_memory_ratio": ["<=", 0.5], "lora_speed_ratio": [">=", 1.15],
    "lora_memory_ratio": ["<=", 0.7], "qpaca_memory_ratio": ["<=", 0.75], "qpaca_speed_ratio": [">=", 0.7],
    "paca_loss_ratio": ["<=", 1.02],
}  # fmt: skip
SPEED, ANON, RSS = "tokens_per_second", "anon_growth_since_train", "rss_growth_since_load"
ONCE = 5  # sides from here on are context, not part of a ratio: they run once


def checkpointing_wins(plain: list[dict[str, Any]], strict: list[dict[str, Any]]) -> bool:
    """Does the peer use less memory with activation checkpointing, without being slower (medians)?"""

    def median(found: list[dict[str, Any]], key: str) -> float:
        return statistics.median(one[key] for one in found)

    return median(strict, ANON) < median(plain, ANON) and median(strict, SPEED) >= median(plain, SPEED)


def speed(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "cities.jsonl"
        city_text(text)
        all_sides = sides(str(text), 5 if args.quick else 9)
        names = list(all_sides)
        main_sides = {n: (lambda n=n: run(*all_sides[n])) for n in names[:ONCE]}
        extra = {n: (lambda n=n: run(*all_sides[n])) for n in names[ONCE:]}
        runs = alternate(main_sides, 1 if args.quick else args.rounds)
        runs |= alternate(extra, 1)
    peer, strict, paca, lora, qpaca = (runs[n] for n in names[:ONCE])
    best = CHECKPOINTING if checkpointing_wins(peer, strict) else PLAIN
    pairs = {
        "paca_speed_ratio_checkpointing": ratios(paca, strict, SPEED),
        "paca_memory_ratio_checkpointing": ratios(paca, strict, ANON),
        "lora_speed_ratio_checkpointing": ratios(lora, strict, SPEED),
        "lora_memory_ratio_checkpointing": ratios(lora, strict, ANON),
        "paca_speed_ratio": ratios(paca, peer, SPEED), "paca_memory_ratio": ratios(paca, peer, ANON),
        "lora_speed_ratio": ratios(lora, peer, SPEED), "lora_memory_ratio": ratios(lora, peer, ANON),
        "qpaca_speed_ratio": ratios(qpaca, paca, SPEED), "qpaca_memory_ratio": ratios(qpaca, paca, RSS),
    }  # fmt: skip
    summary = {name: statistics.median(values) for name, values in pairs.items()}
    held, resident = "growth of anonymous memory, GiB", "growth of resident memory since before loading, GiB"
    rows = [
        {
            "side": name,
            "runs": len(found),
            **({"peer's setting": "its best"} if name == best else {}),
            "tokens/s": spread([r[SPEED] for r in found]),
            held: spread([r[ANON] / GIB for r in found]),
            resident: spread([r[RSS] / GIB for r in found]),
        }
        for name, found in runs.items()
    ]
    for name, values in pairs.items():
        column = "tokens/s" if "speed" in name else resident if name.startswith("qpaca") else held
        rows.append({"side": name, "runs": len(values), column: spread(values)})
    finish(args, summary, rows)


def losses(args: argparse.Namespace) -> None:
    """Rates by half the steps on training rows set apart, then three seeds on the test rows (the first 4 of each)."""
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    fields = {"paca": {"r": 16}, "lora": {"r": 8}}
    rows = [json.loads(line) for line in gzip.open(Path(args.losses) / "train.jsonl.gz", "rt", encoding="utf-8")]
    test = [json.loads(line) for line in gzip.open(Path(args.losses) / "test.jsonl.gz", "rt", encoding="utf-8")]
    apart = len(rows) // 5
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, part in (("train", rows[apart:]), ("apart", rows[:apart]), ("test", test)):
            paths[name] = f"{folder}/{name}.jsonl"
            lines = [json.dumps({"text": row["text"]}) + "\n" for row in part[: 4 if name != "train" else None]]
            Path(paths[name]).write_text("".join(lines), encoding="utf-8")
        base = {"text": paths["train"], "steps": 5 if args.quick else 30}
        found: dict[str, list[float]] = {}
        table = []
        for patch in fields:
            job = {**base, "patch": patch, "fields": fields[patch]}
            short = {**job, "steps": base["steps"] // 2, "test": paths["apart"], "seed": 0}
            tried = {rate: learned({**short, "rate": rate})["loss"] for rate in rates}
            best = min(tried, key=tried.get)
            print(patch, tried, flush=True)
            ends = [learned({**job, "test": paths["test"], "rate": best, "seed": seed}) for seed in range(1, 4)]
            found[patch] = [end["loss"] for end in ends]
            print(patch, best, found[patch], flush=True)
            row = {
                "side": f"{patch} r {fields[patch]['r']}: loss on unseen text after {base['steps']} steps",
                "runs": 3,
            }
            row |= {"learning rate": best, "parameters": ends[0]["parameters"], "loss": spread(found[patch])}
            table.append(row)
    ratio = statistics.mean(found["paca"]) / statistics.mean(found["lora"])
    finish(args, {"paca_loss_ratio": ratio}, table)


def finish(args: argparse.Namespace, summary: dict[str, float], rows: list[dict[str, Any]]) -> None:
    """Put this part's figures into the result file beside those of the other part."""
    path = Path(args.json) if args.json else RESULTS / "sft_speed.json"
    before = json.loads(path.read_text()) if path.is_file() else {"summary": {}, "rows": []}
    kept = [row for row in before["rows"] if ("loss" in row) != ("loss" in rows[0])]
    summary = {**before["summary"], **summary}
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items() if value != ""))
    targets = {name: target for name, target in TARGETS.items() if name in summary}
    conclude(
        "sft_speed", args, summary, targets, title="Fine-tuning speed and memory against TRL + PEFT", claim=CLAIM,
        rows=kept + rows, notes=NOTES,
    )  # fmt: skip


CLAIM = (
    "SmolLM2-135M, bf16 base, rank 8 on all linears, 4 x 256 tokens per step, AdamW, CPU: trimtab against TRL's "
    "SFTTrainer with a PEFT LoRA, with activation checkpointing (its default) and without, under the same malloc; "
    "trimtab runs without."
)
NOTES = [
    "tokens/s is that of the median step after the first two; ratios are taken per round, the summary has their "
    "median.",
    "*_checkpointing: against TRL with activation checkpointing; the other ratios to TRL are without. Its best "
    "setting is with checkpointing if that uses less memory and is not slower.",
    "Memory ratios of PaCA and LoRA: growth of peak anonymous memory beyond the loaded model, read from outside.",
    "qpaca_*: QPaCA against bf16 PaCA. Its memory is resident memory (anonymous and mapped) beyond the process "
    "before it loads a model, since a bf16 base stays mapped from its file and an nf4 base is anonymous. On a 4-bit "
    "base trimtab recomputes the gated FFNs in backward by default; the table has both bases with and without it.",
    "paca_loss_ratio: PaCA r 16 over LoRA r 8 (about equal parameters), mean of three seeds.",
]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--losses", metavar="FOLDER")
    args = parser.parse_args()
    if args.worker:
        job = json.loads(args.worker)
        {"ours": ours, "peer": peer}[job["side"]](job)
    elif args.losses:
        losses(args)
    else:
        speed(args)


if __name__ == "__main__":
    main()
