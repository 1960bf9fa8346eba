"""SensZOQ with MeZO: memory, speed and loss of training by forward passes only.

SmolLM2-135M in bf16 on SST-2 with the prompt of MeZO's authors (`SENTENCE It was great | terrible`), 16 rows a step,
one direction. The peers: a plain forward pass of as many rows; MeZO as published (in-place perturbation of all
weights, four sweeps a step, the model's own loss); MeZO by our stepper on `full`, for the loss after equal steps.
Each method's rate is chosen on training rows set apart; the loss is that of the rows it then trained on. A model of
LLaMA-7B's shape does steps on a 4-bit base.

    python benchmarks/sparse_zo.py [--quick] [--data FOLDER] [--parts memory,losses,7b] [--json FILE]

FOLDER has glue_sst2/train.jsonl.gz with the keys sentence and label; without it, sentences are made here.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import (  # noqa: E402
    RESULTS,
    Clock,
    Kept,
    alternate,
    arguments,
    conclude,
    follow,
    itself,
    options,
    ratios,
    say,
    seek,
    spread,
)  # fmt: skip
from llama_shape import write_model, write_text  # noqa: E402

GIB, ROWS, LENGTH, DENSITY = 2**30, 16, 64, 0.001
STEPS, TRIED, SEEDS = 80, 80, (1, 2)  # of the comparison of losses; of the search for a rate
TARGETS = {
    "growth_to_inference": ["<=", 1.1], "steps_to_mezo": [">=", 2.0], "loss_minus_mezo": ["<", 0.0],
    "cosine": [">=", 0.95], "seven_b_gib": ["<=", 8.0],
}  # fmt: skip
CLAIM = (
    "Training a thousandth of the weights by forward passes takes the memory of inference, and more steps per second "
    "than MeZO as published."
)
NOTES = [
    "growth_to_inference: anonymous growth during training, over that of forward passes of the same stacked batch plus "
    "12 bytes for each trained weight.",
    "steps_to_mezo: steps per second over those of in-place MeZO on all weights, ratio round by round.",
    "loss_minus_mezo: mean loss on the rows trained on after equal steps, each method at its best rate, less MeZO's; "
    "mean over seeds.",
    "cosine: of the mean estimate over 2,560 directions with the true gradient, in a tiny model.",
    "seven_b_gib: peak anonymous memory of steps on a 4-bit model of LLaMA-7B's shape.",
]


def write_rows(folder: Path, data: str | None) -> tuple[Path, Path]:
    """-> files of rows to train on, and of rows to choose rates with."""
    pairs = []
    if data:
        with gzip.open(Path(data) / "glue_sst2/train.jsonl.gz", "rt", encoding="utf-8") as file:
            pairs = [(row["sentence"].strip(), int(row["label"])) for row in map(json.loads, file)]
    else:
        draw, words = random.Random(0), (("dull", "weak", "tired", "empty"), ("warm", "bright", "funny", "rich"))
        for number in range(2000):
            label = number % 2
            pairs.append((f"a {draw.choice(words[label])} and {draw.choice(words[label])} film number {number}", label))
    pairs = [pair for pair in pairs if len(pair[0].split()) < 30]
    files = []
    for name, part in (("train", pairs[:400]), ("apart", pairs[400:800])):
        rows = [{"prompt": f"{text} It was", "completion": (" terrible", " great")[label]} for text, label in part]
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files[0], files[1]


# --- children --------------------------------------------------------------------------------------------------------


def recipe(job: dict[str, Any], folder: str) -> Any:
    from trimtab import Recipe

    return Recipe(
        model={"name": job.get("model", "smollm2-135m"), "precision": job.get("precision", "auto")},
        data={"train": job["train"], "test": job["train"], "chat": False, "too_long": "drop", "metrics": []},
        patches=[{job["patch"]: job["fields"]}], stepper={"mezo": {"seed": job["seed"], **job.get("stepper", {})}},
        training={
            "max_steps": job["steps"], "per_device_train_batch_size": job.get("rows", ROWS), "max_length": LENGTH,
            "learning_rate": job["rate"], "seed": job["seed"], "report_to": "none",
        },
        output=f"{folder}/run", engine={"stop_if_diverged": False},  # a rate that is too high is a result too
    )  # fmt: skip


def ours(job: dict[str, Any]) -> None:
    clock = Clock()
    follow(clock)
    with tempfile.TemporaryDirectory() as folder:
        plan = recipe(job, folder)
        run = plan.train()
        found = {"seconds": clock.median, "trained": run["trainable_parameters"], "skipped": run["skipped_steps"],
                 "predicted": run["predicted"].get("fast_peak_bytes", 0)}  # fmt: skip
        if job.get("evaluate"):
            found["loss"] = plan.evaluate(limit=200)["metrics"]["loss"]
    say("result", found)


def batches(job: dict[str, Any], rows: int) -> Any:
    """-> model, and a list of batches of the training rows as our collator makes them."""
    import torch

    from trimtab.model.load import load_model

    say("mark", "load")
    model, tokenizer = load_model(spec_of(job), device=torch.device("cpu"))
    say("mark", "train")
    lines = [json.loads(line) for line in Path(job["train"]).read_text().splitlines()]
    made = []
    for start in range(0, rows * (job["steps"] + 1), rows):
        ids, labels = [], []
        for line in (lines[i % len(lines)] for i in range(start, start + rows)):
            prompt = tokenizer(line["prompt"])["input_ids"]
            whole = prompt + tokenizer(line["completion"], add_special_tokens=False)["input_ids"]
            ids.append(whole)
            labels.append([-100] * len(prompt) + whole[len(prompt) :])
        width = -(-max(map(len, ids)) // 16) * 16
        pad = lambda row, value: row + [value] * (width - len(row))  # noqa: E731, B023
        made.append({
            "input_ids": torch.tensor([pad(row, 0) for row in ids]),
            "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in ids]),
            "labels": torch.tensor([pad(row, -100) for row in labels]),
        })  # fmt: skip
    return model, made


def spec_of(job: dict[str, Any]) -> Any:
    from trimtab.model.spec import ModelSpec

    return ModelSpec(job.get("model", "smollm2-135m"), job.get("precision", "auto"))


def inference(job: dict[str, Any]) -> None:
    """Forward passes of the stacked batch: twice the rows, with the loss of our objective."""
    import torch

    from trimtab.engine.prepare import training_forward
    from trimtab.methods.causal_lm import CausalLM
    from trimtab.recipe import Recipe

    model, made = batches(job, ROWS)
    objective = CausalLM()
    with torch.no_grad(), training_forward(model.eval(), objective, Recipe()):
        for batch in made:
            twice = {key: value.repeat(2, 1) for key, value in batch.items()}
            model(objective_batch=twice)
    say("result", {"seconds": 0.0})


def published(job: dict[str, Any]) -> None:
    """MeZO as its authors' code does it: all weights perturbed in place from a seed, and the model's own loss."""
    import numpy
    import torch

    model, made = batches(job, ROWS)
    model.eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    draw, eps = numpy.random.default_rng(job["seed"]), 1e-3
    clock = Clock()

    def perturb(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for p in weights:
            z = torch.normal(mean=0, std=1, size=p.size(), dtype=p.dtype)
            p.data = p.data + scale * z * eps

    with torch.inference_mode():
        for batch in made:
            seed = int(draw.integers(10**9))
            perturb(seed, 1)
            high = float(model(**batch, use_cache=False).loss)
            perturb(seed, -2)
            low = float(model(**batch, use_cache=False).loss)
            perturb(seed, 1)
            slope = (high - low) / (2 * eps)
            torch.manual_seed(seed)
            for p in weights:
                z = torch.normal(mean=0, std=1, size=p.size(), dtype=p.dtype)
                p.data = p.data - job["rate"] * (slope * z)
            clock.mark()
    say("result", {"seconds": clock.median})


def cosine() -> float:
    """Of the mean estimate over many directions with the gradient that autograd computes, in a tiny Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.contracts import Place
    from trimtab.methods.mezo import Mezo
    from trimtab.methods.senszoq import SensZOQ

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    )).eval()  # fmt: skip
    SensZOQ(density=1e-3, score="weight").apply(model, Place("cpu"))
    ids = torch.randint(101, (4, 12))
    trained = [p for p in model.parameters() if p.requires_grad]
    model(input_ids=ids, labels=ids).loss.backward()
    true, total = torch.cat([p.grad for p in trained]), 0.0
    stepper = Mezo(directions=64, eps=1e-2)
    stepper.prepare(model)
    for _ in range(40):
        stepper.backward(lambda: model(input_ids=ids, labels=ids).loss)
        run = stepper.run
        each = [sum(run.slopes[j] * run.z(n, j, p) for j in range(64)) for n, p in enumerate(trained)]
        total = total + torch.cat(each)
        run.stepped()
    return float(torch.cosine_similarity(total, true, 0))


WORKERS = {"ours": ours, "inference": inference, "published": published}


# --- the parts -------------------------------------------------------------------------------------------------------


def memory_and_speed(base: dict[str, Any], rounds: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    fields = {"density": DENSITY, "rows": 16}
    jobs = {
        "SensZOQ with MeZO": {"kind": "ours", "patch": "senszoq", "fields": fields, "rate": 1e-5},
        "forward passes": {"kind": "inference"},
        "MeZO as published": {"kind": "published", "rate": 1e-7},
    }
    run = lambda job: itself(__file__, {**base, "seed": 1, **job})  # noqa: E731
    runs = alternate({name: (lambda job=job: run(job)) for name, job in jobs.items()}, rounds)
    sparse, forward, mezo = runs.values()
    held = "anon_growth_since_train"
    growth = [s[held] / (f[held] + 12 * s["trained"]) for s, f in zip(sparse, forward, strict=True)]
    summary = {
        "growth_to_inference": statistics.median(growth),
        "steps_to_mezo": statistics.median(ratios(mezo, sparse, "seconds")),
        "growth_to_mezo": statistics.median(ratios(sparse, mezo, held)),
    }
    rows = [
        {"side": name, "steps/s": "" if not of[0]["seconds"] else spread([1 / r["seconds"] for r in of]),
         "growth, MiB": spread([r[held] / 2**20 for r in of]), "loss": ""}
        for name, of in runs.items()
    ]  # fmt: skip
    return summary, rows


def losses(train: Path, apart: Path, quick: bool) -> tuple[float, list[dict[str, Any]]]:
    """-> our loss less MeZO's after equal steps, and a row for each method."""
    steps, tried, seeds = (12, 6, (1,)) if quick else (STEPS, TRIED, SEEDS)
    sides = {
        "SensZOQ with MeZO": ({"patch": "senszoq", "fields": {"density": DENSITY, "rows": 16}}, (1e-5, 1e-4, 1e-3)),
        "MeZO (full, our stepper)": ({"patch": "full", "fields": {}}, (1e-7, 1e-6, 1e-5)),
    }
    found, rows = {}, []
    kept = Kept(train.parent / "kept" if quick else RESULTS / "sparse_zo_trainings.jsonl")

    def run(file: Path, job: dict[str, Any]) -> dict[str, Any]:
        return kept.once(job, lambda _: itself(__file__, {**job, "train": str(file)}))

    for name, (side, rates) in sides.items():
        job = {"kind": "ours", "evaluate": True, **side}

        def score(rate: float, job: dict[str, Any] = job, run: Any = run) -> float:
            loss = run(apart, {**job, "steps": tried, "rate": rate, "seed": 0})["loss"]
            return -loss if loss == loss else -1e9

        rate, _ = seek(score, rates[1:] if quick else rates, further=0 if quick else 10)
        made = [run(train, {**job, "steps": steps, "rate": rate, "seed": seed}) for seed in seeds]
        found[name] = [run["loss"] for run in made]
        speed = spread([1 / r["seconds"] for r in made])
        rows.append({"side": f"{name}, {steps} steps, rate {rate:g}", "steps/s": speed, "growth, MiB": "",
                     "loss": spread(found[name])})  # fmt: skip
        print(rows[-1])
    one, other = (statistics.mean(values) for values in found.values())
    return one - other, rows


def seven_b(blocks: int) -> tuple[float, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model", blocks)
        write_text(Path(folder) / "text.jsonl", 8)
        short = Path(folder) / "short.jsonl"
        lines = (json.loads(line)["text"].split() for line in (Path(folder) / "text.jsonl").open())
        short.write_text("".join(json.dumps({"prompt": " ".join(w[:24]), "completion": w[24]}) + "\n" for w in lines))
        run = itself(__file__, {
            "kind": "ours", "model": f"{folder}/model", "precision": "nf4", "train": str(short), "patch": "senszoq",
            "fields": {"density": DENSITY, "rows": 1}, "rate": 1e-6, "steps": 3, "seed": 0, "rows": 1,
        }, timeout=2400)  # fmt: skip
    row = {"side": f"LLaMA-7B's shape, {blocks} blocks, nf4, 1 row", "steps/s": f"{1 / run['seconds']:.3g}",
           "growth, MiB": f"{run['anon_peak'] / 2**20:,.0f} (peak)", "loss": ""}  # fmt: skip
    return run["anon_peak"] / GIB, row


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", metavar="FOLDER")
    parser.add_argument("--parts", default="memory,losses,7b", help="the other parts' figures stay in the result file")
    if (args := arguments(parser, lambda job: WORKERS[job["kind"]](job))) is None:
        return
    parts = [part for part in args.parts.split(",") if part != "7b" or not args.quick]
    before = json.loads((RESULTS / "sparse_zo.json").read_text()) if (RESULTS / "sparse_zo.json").is_file() else {}
    summary = dict(before.get("summary", {}))
    known = before.get("rows", [])
    rows = {part: [row for row in known if part_of(row) == part] for part in ("memory", "losses", "7b")}
    with tempfile.TemporaryDirectory() as folder:
        train, apart = write_rows(Path(folder), args.data)
        if "memory" in parts:
            found, rows["memory"] = memory_and_speed({"train": str(train), "steps": 4 if args.quick else 8},
                                                     1 if args.quick else 3)  # fmt: skip
            summary |= found
        if "losses" in parts:
            summary["loss_minus_mezo"], rows["losses"] = losses(train, apart, args.quick)
            summary["cosine"] = cosine()
    if "7b" in parts:
        summary["seven_b_gib"], row = seven_b(32)
        rows["7b"] = [row]
    conclude(
        "sparse_zo", args, summary, TARGETS, title="Training by forward passes", claim=CLAIM,
        rows=sum(rows.values(), []), notes=NOTES,
    )  # fmt: skip


def part_of(row: dict[str, Any]) -> str:
    return "7b" if "7B" in row["side"] else "losses" if " steps, " in row["side"] else "memory"


if __name__ == "__main__":
    main()
