"""EDoRA against PEFT's LoRA and DoRA: trained parameters, time and memory of a step, and accuracy on two GLUE sets.

The step: RoBERTa-base's shape with random weights, fp32, rank 16 on the paper's four linears of each block (query,
value, both output projections), 8 x 128 tokens, AdamW. EDoRA runs through trimtab's own verb; LoRA and DoRA through
transformers' Trainer with a PEFT adapter. Sides alternate in fresh processes under the same malloc.

The accuracy (`--data FOLDER`, with glue_sst2 and glue_mrpc, each with train.jsonl.gz and validation.jsonl.gz):
MiniLM-L6 with a new head, the same linears and rank, equal steps, three seeds, scored on GLUE's validation rows. Each
method's learning rate is the one with the best accuracy on training rows set apart, after as many steps; if the best
rate is the first or the last one, the search goes on. Both methods run in trimtab (LoRA's layers are PEFT's). The
result contains no rows. Each training's result is kept in results/edora_trainings.jsonl, and it is not run again.

    python benchmarks/edora.py [--quick] [--rounds 3] [--json FILE]
    python benchmarks/edora.py --data FOLDER [--quick] [--json FILE]     adds the accuracy to the result file
"""

from __future__ import annotations

import argparse
import json
import random
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
    arguments,  # noqa: E402
    conclude,
    follow,
    glue_rows,
    itself,
    options,
    ratios,
    say,
    seek,
    spread,
    ticks,
)

TARGETS_OF = "query,value,output.dense"  # the last one is two linears of a block: attention's and the FFN's
RANK, ALPHA, LENGTH = 16, 16, 128
GIB = 2**30

# --- the step: children ----------------------------------------------------------------------------------------------


def make_model(folder: Path) -> None:
    """RoBERTa-base with random weights, and a tokenizer of made-up words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    RobertaForSequenceClassification(RobertaConfig(max_position_embeddings=514)).save_pretrained(folder)
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(1000))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


def make_rows(path: Path, rows: int) -> None:
    """Rows of LENGTH words that mean nothing: the step's cost does not depend on them."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            text = " ".join(f"w{draw.randrange(1000)}" for _ in range(LENGTH))
            file.write(json.dumps({"sentence": text, "label": index % 2}) + "\n")


def fields(job: dict[str, Any]) -> dict[str, Any]:
    """Of transformers' TrainingArguments, for all sides."""
    return {
        "max_steps": job["steps"], "per_device_train_batch_size": job["batch"], "learning_rate": 1e-5, "seed": 0,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    }  # fmt: skip


def ours(job: dict[str, Any]) -> None:
    from trimtab import Recipe

    clock = Clock()
    follow(clock)
    with tempfile.TemporaryDirectory() as out:
        recipe = Recipe(
            model=job["model"], objective="classification", data={"train": job["rows"], "too_long": "cut"},
            patches=[{job["side"]: {"r": RANK, "alpha": ALPHA, "targets": TARGETS_OF}}], output=out + "/run",
            training={**fields(job), "max_length": LENGTH},
        )  # fmt: skip
        recipe.train()
    say("result", {"seconds": clock.median})


def peer(job: dict[str, Any]) -> None:
    """transformers and PEFT as their documentation uses them."""
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = load_dataset("json", data_files=job["rows"], split="train")
    rows = rows.map(lambda row: tokenizer(row["sentence"], truncation=True, max_length=LENGTH), batched=True)
    say("mark", "load")
    model = AutoModelForSequenceClassification.from_pretrained(job["model"])
    say("mark", "train")
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS_OF.split(","), use_dora=job["side"] == "PEFT DoRA",
        task_type="SEQ_CLS",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(out, use_cpu=True, disable_tqdm=True, **fields(job))
        trainer = Trainer(
            get_peft_model(model, config), args, train_dataset=rows, callbacks=[ticks(clock)],
            data_collator=DataCollatorWithPadding(tokenizer),
        )  # fmt: skip
        trainer.train()
    say("result", {"seconds": clock.median})


# --- the step: the parent --------------------------------------------------------------------------------------------

CONTEXT = "LoRA in trimtab"  # runs once
SIDES = {"EDoRA": "edora", "PEFT LoRA": "PEFT LoRA", "PEFT DoRA": "PEFT DoRA", CONTEXT: "lora"}
HELD = "anon_growth_since_train"


def trained() -> dict[str, int]:
    """Trained parameters of each method on RoBERTa-base, without the head, of a model without values."""
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from trimtab import methods
    from trimtab.contracts import Place

    found = {}
    for name, more in (("edora", {}), ("lora", {}), ("dora", {"dora": True})):
        with torch.device("meta"):
            model = RobertaForSequenceClassification(RobertaConfig())
        patch = methods.find("lora" if name == "dora" else name)(r=RANK, alpha=ALPHA, targets=TARGETS_OF, **more)
        surgery = patch.apply(model, Place())
        found[name] = sum(t.numel() for t in surgery.own_tensors().values() if t.requires_grad)
    return found


def speed(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        make_rows(Path(folder) / "rows.jsonl", 128)
        job = {"model": folder + "/model", "rows": folder + "/rows.jsonl", "batch": 2 if args.quick else 8,
               "steps": 4 if args.quick else 5}  # fmt: skip
        run = {name: (lambda side=side: itself(__file__, {**job, "side": side})) for name, side in SIDES.items()}
        last = {CONTEXT: run.pop(CONTEXT)}
        runs = alternate(run, 1 if args.quick else args.rounds) | alternate(last, 1)
    counts = trained()
    pairs = {
        f"{what}_to_{other.lower()}": ratios(runs["EDoRA"], runs[f"PEFT {other}"], key)
        for what, key in (("step", "seconds"), ("memory", HELD)) for other in ("DoRA", "LoRA")
    }  # fmt: skip
    summary = {"params_lora_to_edora": counts["lora"] / counts["edora"]}
    summary |= {name: statistics.median(values) for name, values in pairs.items()}
    params = dict(zip(SIDES, (counts["edora"], counts["lora"], counts["dora"], counts["lora"]), strict=True))
    rows = [
        {"side": name, "runs": len(found), "trained parameters": params[name],
         "seconds per step": spread([one["seconds"] for one in found]),
         "growth of anonymous memory, GiB": spread([one[HELD] / GIB for one in found])}
        for name, found in runs.items()
    ]  # fmt: skip
    finish(args, summary, rows)


# --- the accuracy ----------------------------------------------------------------------------------------------------

APART = 600  # training rows set apart for the learning rates
SETS = {"sst2": 64, "mrpc": 128}  # tokens of the longest row taken; longer ones are cut
STEPS, BATCH, SEEDS = 250, 16, 3  # in 100 steps nothing learned more of MRPC than the more frequent answer
RATES = {"edora": (4e-3, 8e-3), "lora": (1e-3, 2e-3)}
FURTHER = 2  # from the best rate to the next one that is tried, where the best was at an end


def learned(job: dict[str, Any], paths: dict[str, str], out: str) -> dict[str, Any]:
    """Train, then the accuracy on `job["on"]`. Nothing is timed, so no process of its own is needed."""
    from trimtab import Recipe

    recipe = Recipe(
        model="minilm-l6", objective="classification", output=out + "/run",
        data={"train": paths["train"], "test": paths[job["on"]], "too_long": "cut"},
        patches=[{job["patch"]: {"r": RANK, "alpha": ALPHA, "targets": TARGETS_OF}}],
        training={"max_steps": job["steps"], "per_device_train_batch_size": BATCH, "learning_rate": job["rate"],
                  "seed": job["seed"], "max_length": SETS[job["set"]], "warmup_steps": job["steps"] // 16,
                  "lr_scheduler_type": "linear", "save_strategy": "no", "report_to": "none"},
    )  # fmt: skip
    run = recipe.train()
    return {"accuracy": recipe.evaluate()["metrics"]["accuracy"], "parameters": run["trainable_parameters"]}


def accuracy(args: argparse.Namespace) -> None:
    steps, seeds = (10, 1) if args.quick else (STEPS, SEEDS)
    means: dict[str, list[float]] = {"edora": [], "lora": []}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kept" if args.quick else RESULTS / "edora_trainings.jsonl"
        kept = Kept(path)
        for name in SETS:
            paths = glue_rows(name, Path(args.data), Path(folder), APART)

            def run(paths: dict[str, str] = paths, **job: Any) -> float:
                return kept.once(job, lambda out: learned(job, paths, str(out)), folder)["accuracy"]

            for patch, rates in RATES.items():
                job = {"set": name, "patch": patch, "steps": steps}

                def score(rate: float, job: dict[str, Any] = job) -> float:
                    return run(**job, on="apart", rate=rate, seed=0)

                rate, _ = seek(score, rates, 0 if args.quick else FURTHER)
                ends = [run(**job, on="test", rate=rate, seed=seed) for seed in range(1, seeds + 1)]
                means[patch].append(statistics.mean(ends))
                title = {"edora": "EDoRA", "lora": "LoRA"}[patch]
                row = {"side": f"{title}, {name}, {steps} steps", "runs": seeds, "learning rate": rate}
                rows.append({**row, "accuracy": spread([100 * end for end in ends])})
    minus = [100 * (one - other) for one, other in zip(means["edora"], means["lora"], strict=True)]
    summary = {f"{name}_minus_lora_points": points for name, points in zip(SETS, minus, strict=True)}
    finish(args, {**summary, "glue_minus_lora_points": statistics.mean(minus)}, rows)


# --- both ------------------------------------------------------------------------------------------------------------

TARGETS = {
    "params_lora_to_edora": [">=", 30], "step_to_dora": ["<=", 0.6], "memory_to_dora": ["<=", 0.6],
    "step_to_lora": ["<=", 1.0], "memory_to_lora": ["<=", 1.0], "glue_minus_lora_points": [">=", -1.5],
}  # fmt: skip


def finish(args: argparse.Namespace, summary: dict[str, float], rows: list[dict[str, Any]]) -> None:
    """Put this part's figures into the result file beside those of the other part."""
    path = Path(args.json) if args.json else RESULTS / "edora.json"
    before = json.loads(path.read_text()) if path.is_file() else {"summary": {}, "rows": []}
    kept = [row for row in before["rows"] if ("accuracy" in row) != ("accuracy" in rows[0])]
    summary = {**before["summary"], **summary}
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items()))
    rows = rows + kept if "accuracy" not in rows[0] else kept + rows
    targets = {name: target for name, target in TARGETS.items() if name in summary}
    notes = NOTES if "glue_minus_lora_points" in summary else [*NOTES[:-1], "The accuracy is not published yet."]
    conclude("edora", args, summary, targets, title="EDoRA against LoRA and DoRA", claim=CLAIM, rows=rows, notes=notes)


CLAIM = (
    "Rank 16 on query, value and both output projections of each block: EDoRA in trimtab against PEFT's LoRA and DoRA "
    "on RoBERTa-base's shape (fp32, 8 x 128 tokens, AdamW, CPU), and against LoRA on two GLUE sets with MiniLM-L6."
)
NOTES = [
    "A step is the median after the first two; ratios are taken per round, the summary has their median. Memory is "
    "the peak of anonymous memory beyond the loaded model.",
    "LoRA in trimtab is context: it runs once, and no ratio uses it.",
    f"Accuracy: {STEPS} steps of {BATCH} rows, {SEEDS} seeds, on GLUE's validation rows (SST-2 872, MRPC 400; standard "
    "error of one run: 1 and 2 points). The rates were chosen on 600 training rows set apart. glue_minus_lora_points "
    "is the mean of the two sets' differences.",
]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", metavar="FOLDER", help="the folder of the two GLUE sets: measure the accuracy")
    worker = lambda job: (peer if job["side"].startswith("PEFT") else ours)(job)  # noqa: E731
    if (args := arguments(parser, worker)) is None:
        return
    if args.data:
        accuracy(args)
    else:
        speed(args)


if __name__ == "__main__":
    main()
