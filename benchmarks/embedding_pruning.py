"""Embedding pruning on a GLUE set, XQuAD and chat, for a tied decoder (SmolLM2-135M) and an encoder (MiniLM-L6).

Full fine-tuning in fp32 with and without the patch, in alternating fresh processes on the same batches: live bytes of
the tensors in the second step, seconds of a step, and what the plan promised before the run. The decoder answers
(sentiment, question, reply); the encoder classifies (sentiment, language). A LoRA on a base that is converted to fp32
shows what a frozen table saves. `--data FOLDER` has the three data sets.

    python benchmarks/embedding_pruning.py --data FOLDER [--quick] [--rounds 2] [--json FILE]
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import Clock, alternate, arguments, conclude, follow, itself, options, ratios, say  # noqa: E402

MIB = 2**20
SETS = {"SST-2": "glue_sst2", "XQuAD": "xquad", "OASST1": "oasst1"}
MODELS = {"decoder": "smollm2-135m", "encoder": "minilm-l6"}
SIDES: dict[str, list[dict[str, Any]]] = {
    "plain": [], "exact": [{"embedding_pruning": {}}], "kept": [{"embedding_pruning": {"softmax": "kept"}}],
}  # fmt: skip
ABOVE = {"full": {"full": {}}, "lora": {"lora": {"r": 8}}}
TARGETS = {"max_difference": ["<=", 0.0], "saved_to_promised": [">=", 0.95], "saved_to_components": [">=", 0.95]}
CLAIM = (
    "With embedding pruning, full fine-tuning of SmolLM2-135M and MiniLM-L6 on SST-2, XQuAD and OASST1 saves at least "
    "95 % of the memory that the plan promises, and the fp32 logits of kept ids are bit-equal to those of the whole "
    "model."
)
NOTES = [
    "saved: live bytes of the tensors at the peak of the second step, without the patch less with it, on the same "
    "batch; promised: the same difference of the plans' peaks, made before the runs.",
    "components: weights, gradients and Adam's moments of the dropped rows, less a copy of mapped rows. A peak falls "
    "by less where it moves to a phase in which some of these do not exist, and by more where temporary tensors of the "
    "head shrink too.",
    "max_difference: the largest difference of a logit of a kept id (decoder; from the kept rows and from the whole "
    "table), or of an output of the classifier (encoder), from the whole model's, in fp32 on held-out rows.",
    "step, exact and kept: seconds of a step over those without the patch, the median over rounds. An encoder has no "
    "head over the vocabulary, so both are the same.",
    "held out: share of the tokens of rows that were not counted whose id has no row; they are fetched.",
]


def rows_of(name: str, part: str, data: Path, model: str) -> list[dict[str, Any]]:
    """Rows of a data set in the form that the model's task takes."""
    split = {"glue_sst2": {"test": "validation"}}.get(SETS[name], {}).get(part, part)
    lines = gzip.decompress((data / SETS[name] / f"{split}.jsonl.gz").read_bytes()).decode().splitlines()
    found = []
    for row in map(json.loads, lines):
        if name == "SST-2":
            label = ["negative", "positive"][int(row["label"])]
            found.append({"text": row["sentence"], "label": label})
        elif name == "XQuAD":
            found.append({"text": f"{row['context']}\n{row['question']}", "label": row["lang"], "answer": answer(row)})
        else:
            text = "\n".join(message["content"] for message in row["messages"])
            found.append({"text": text, "label": row["lang"], "messages": row["messages"]})
    if model == "encoder":
        return [{"text": row["text"], "label": row["label"]} for row in found]
    return [
        {"messages": row["messages"]} if "messages" in row
        else {"question": row["text"], "answer": row.get("answer", row["label"])} for row in found
    ]  # fmt: skip


def answer(row: dict[str, Any]) -> str:
    answers = row["answers"]
    return (answers["text"] if isinstance(answers, dict) else answers)[0]


def recipe_of(job: dict[str, Any]) -> Any:
    from trimtab import Recipe

    task = "causal_lm" if job["model"] == "decoder" else "classification"
    return Recipe.from_dict({
        "model": {"name": MODELS[job["model"]], "precision": job["precision"]},
        "data": {"train": job["train"], "too_long": "cut"}, "objective": task,
        "patches": [*SIDES[job["side"]], ABOVE[job["above"]]],
        "training": {"max_steps": job["steps"], "per_device_train_batch_size": 4, "max_length": job["length"],
                     "learning_rate": 1e-5, "save_strategy": "no"},
        "output": job["folder"],
    })  # fmt: skip


# --- in a child ------------------------------------------------------------------------------------------------------


def worker(job: dict[str, Any]) -> None:
    if job["what"] == "compare":
        say("result", compared(job))
        return
    clock = Clock(warm=2 if job["steps"] < 5 else 3)  # the second step is metered
    follow(clock)
    run = recipe_of(job).train()
    say("result", {
        "seconds": clock.median, "live": run["measured"]["live_peak_bytes"],
        "planned": run["predicted"]["live_peak_bytes"],
    })  # fmt: skip


def compared(job: dict[str, Any]) -> dict[str, Any]:
    """What the plan promises, and the outputs of the pruned model beside those of the whole one."""
    import torch

    from trimtab.contracts import Place
    from trimtab.engine.arguments import training_arguments
    from trimtab.engine.inputs import calibration_batches, foresee, read_inputs
    from trimtab.engine.objectives import arguments_class
    from trimtab.model.load import load_model
    from trimtab.planning.step import PlannedStep

    recipe = recipe_of(job)
    args = training_arguments(recipe, arguments_class(recipe.load_objective()), Path(job["folder"]), True)
    seen = foresee(recipe)
    components = PlannedStep(seen.recipe, args, None).surgeries[0].saves()
    task, inputs = recipe.load_objective().head, read_inputs(recipe, recipe.load_objective(), args, lambda line: None)
    spec = dataclasses.replace(recipe.model, precision="fp32")
    whole, tokenizer = load_model(spec, task=task, labels=inputs.labels)
    texts = [json.loads(line)["text"] for line in Path(job["held"]).read_text().splitlines()]
    made = {}
    for softmax in ("exact", "kept"):
        torch.manual_seed(0)
        model, _ = load_model(spec, task=task, labels=inputs.labels)
        model.load_state_dict(whole.state_dict())
        patch = dataclasses.replace(seen.recipe.load_patches()[0], rows=None, softmax=softmax)
        made[softmax] = patch.apply(model, Place(fast="cpu"))
        made[softmax].calibrate(calibration_batches(recipe, inputs, args, "cpu")(patch))
    rows, difference = made["exact"].tables[0], 0.0
    strange = total = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=job["length"])["input_ids"]
        strange, total = strange + int((rows.row_of[ids] < 0).sum()), total + ids.numel()
    for text in texts[: job["texts"]]:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=job["length"])["input_ids"]
        theirs = whole(ids).logits.detach()
        for each in made.values():
            ours = each.model(ids).logits.detach()  # with gradients: `kept` uses the kept rows
            where = rows.ids if task == "causal-lm" else slice(None)
            difference = max(difference, float((ours[..., where] - theirs[..., where]).abs().max()))
    used = int(seen.notes[0].split(" ")[1].replace(",", ""))
    return {
        "components": sum(components.values()), "rows": len(rows.ids), "size": rows.size, "used": used,
        "difference": difference, "strange": strange / total,
    }  # fmt: skip


# --- the parent ------------------------------------------------------------------------------------------------------


def one(model: str, name: str, above: str, args: Any, folder: Path) -> dict[str, Any]:
    """A row of the table."""
    train, held = folder / f"{model}_{SETS[name]}.jsonl", folder / f"{SETS[name]}_held.jsonl"
    for path, rows in ((train, rows_of(name, "train", args.data, model)),
                       (held, rows_of(name, "test", args.data, "encoder")[:300])):  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    job = {"model": model, "train": str(train), "held": str(held), "above": above, "steps": 4 if args.quick else 7,
           "length": 64 if args.quick else 128, "precision": "fp32" if above == "lora" else "auto",
           "folder": str(folder / "run"), "texts": 3 if args.quick else 16}  # fmt: skip

    def run(side: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as output:
            return itself(__file__, {**job, "what": "train", "side": side, "folder": f"{output}/run"}, timeout=900)

    facts = itself(__file__, {**job, "what": "compare", "side": "exact"}, timeout=900)
    sides = [side for side in SIDES if side != "kept" or model == "decoder"]
    runs = alternate({side: lambda side=side: run(side) for side in sides}, args.rounds)
    saved, promised = (runs["plain"][0][key] - runs["exact"][0][key] for key in ("live", "planned"))
    row = {
        "model": MODELS[model], "data": name, "trained": above, "ids used": facts["used"],
        "of the vocabulary": f"{facts['used'] / facts['size']:.1%}", "rows kept": facts["rows"],
        "held out": f"{facts['strange']:.2%}", "live, MiB": round(runs["plain"][0]["live"] / MIB),
        "components, MiB": round(facts["components"] / MIB, 1), "promised, MiB": round(promised / MIB, 1),
        "saved, MiB": round(saved / MIB, 1), "saved / promised": round(saved / promised, 4),
        "saved / components": round(saved / facts["components"], 4) if facts["components"] > 0 else "",
        "planned / measured": round(runs["exact"][0]["planned"] / runs["exact"][0]["live"], 4),
        "s/step": round(statistics.median(each["seconds"] for each in runs["plain"]), 3),
    }  # fmt: skip
    for side in sides[1:]:
        row[f"step, {side}"] = round(statistics.median(ratios(runs[side], runs["plain"], "seconds")), 3)
    row.setdefault("step, kept", "")
    print(json.dumps(row), flush=True)
    return row | {"difference": facts["difference"]}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, help="the folder with the three data sets")
    parser.add_argument("--rounds", type=int, default=2)
    if (args := arguments(parser, worker, needs_data=True)) is None:
        return
    if args.quick:
        args.rounds = 1
    names = ["SST-2"] if args.quick else list(SETS)
    cases = [(model, name, "full") for model in MODELS for name in names]
    cases += [] if args.quick else [("decoder", "OASST1", "lora")]
    with tempfile.TemporaryDirectory() as folder:
        rows = [one(*case, args, Path(folder)) for case in cases]
    summary = {
        "max_difference": max(row.pop("difference") for row in rows),
        "saved_to_promised": min(row["saved / promised"] for row in rows),
        "saved_to_components": min(row["saved / components"] for row in rows if row["saved / components"] != ""),
    }
    conclude(
        "embedding_pruning", args, summary, TARGETS, title="Embedding pruning", claim=CLAIM, rows=rows, notes=NOTES
    )


if __name__ == "__main__":
    main()
