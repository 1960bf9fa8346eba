"""Four text tasks one after another on a small model: what is forgotten, and what prevents it within some bytes.

`--data FOLDER` has the sets that small_model.py names, each with its files PART.jsonl.gz. Two orders of the tasks and
two seeds, STEPS steps of BATCH rows for each task, LoRA r 8:

    sequential    one adapter for all tasks, nothing else
    text          and rehearsal of rows within BUDGET bytes
    logits        and rehearsal of the rows' probabilities, within as many bytes
    loss_diverse  as text, rows from easy to hard (the first order only)
    ewc           and anchoring; its bytes are those of theta* and the Fisher information (the first order only)
    diffs         a diff per task (diff_pruning); three of them take about twice BUDGET bytes

Learning rates, the share of rehearsed rows and the anchor's strength are the best on training rows set apart: the mean
exact match after all tasks, in both orders; logits and loss_diverse take those of text. Seconds are those of the
process's CPU in training, with what a stage keeps for later ones; other work on the machine does not count. Each
training's result is kept in results/continual_trainings.jsonl, and it is not run again.

    python benchmarks/continual.py --data FOLDER [--sides text,logits] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, Kept, arguments, conclude, options, seek, spread  # noqa: E402
from small_model import TASKS, base_of  # noqa: E402

STEPS, BATCH, SEEDS = 50, 16, (1, 2)
BUDGET = 48 * 1024
LORA = {"lora": {"r": 8}}
DIFF = {"diff_pruning": {"density": 0.0018, "gate_share": 0.5}}
SIDES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {  # patch, keys of the recipe, orders
    "sequential": (LORA, {}, 2),
    "text": (LORA, {"rehearsal": {"budget": BUDGET}}, 2),
    "logits": (LORA, {"rehearsal": {"budget": BUDGET, "keep": "logits"}}, 2),
    "diffs": (DIFF, {}, 2),
    "ewc": (LORA, {"anchor": {"ewc": {"strength": 1.0}}}, 1),
    "loss_diverse": (LORA, {"rehearsal": {"budget": BUDGET, "policy": "loss_diverse"}}, 1),
}
RATES, OF_DIFFS, MIXES, STRENGTHS = (1e-3, 2.5e-3, 5e-3), (5e-3, 1e-2), (0.25, 0.5), (300.0, 3000.0)
TRIED = 101  # the seed of the search


@contextmanager
def counted(seconds: list[float]) -> Iterator[None]:
    """Within it, the CPU seconds of training and of what a stage keeps are appended to `seconds`."""
    from transformers import Trainer

    from trimtab.training.session import Session

    def timed(call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                seconds.append(time.process_time() - began)

        return run

    train, keep = Trainer.train, Session.keep
    Trainer.train, Session.keep = timed(train), timed(keep)
    try:
        yield
    finally:
        Trainer.train, Session.keep = train, keep


def learned(job: dict[str, Any], base: Path, out: Path) -> dict[str, Any]:
    """Trains the stages; -> the task matrix, figures, seconds and bytes."""
    from trimtab import Recipe
    from trimtab.inference.evaluate import scores

    patch, more, _ = SIDES[job["side"]]
    if "strength" in job:
        more = {"anchor": {"ewc": {"strength": job["strength"]}}}
    if "mix" in job:
        more = {"rehearsal": {**more["rehearsal"], "mix": job["mix"]}}
    stages = [
        {"name": task, "carry": "fresh" if job["side"] == "diffs" else "adapter",
         "data": {"train": str(base / f"{task}_train.jsonl"), "test": str(base / f"{task}_{job['on']}.jsonl")}}
        for task in job["tasks"]
    ]  # fmt: skip
    recipe = Recipe.from_dict({
        "model": str(base / "base"), "patches": [patch], "stages": stages, "output": str(out / "run"), **more,
        "data": {"metrics": ["exact_match"], "reply_tokens": 4, "too_long": "cut"},
        "training": {"max_steps": job["steps"], "per_device_train_batch_size": BATCH, "learning_rate": job["rate"],
                     "max_length": 128, "seed": job["seed"], "logging_steps": job["steps"]},
        "engine": {"allocator": "none", "stop_if_diverged": False},
        **({"neutral": str(base / "neutral.jsonl")} if job["on"] == "test" else {}),
    })  # fmt: skip
    seconds: list[float] = []
    with counted(seconds):
        found = recipe.train()
    tasks, folder = found["tasks"], out / "run/stages"
    matrix = tasks["matrix"]["exact_match"]
    kept = {"kept.safetensors": 1, "anchor.safetensors": 1}
    result = {
        "matrix": matrix, "losses": tasks["matrix"]["loss"], "seconds": sum(seconds),
        "acc": tasks["figures"]["exact_match"]["acc"],
        "forgetting": tasks["figures"]["exact_match"].get("forgetting", 0),
        "bytes": max((path.stat().st_size for name in kept for path in folder.glob(f"*/{name}")), default=0),
        "perplexity": (tasks.get("general") or {}).get("perplexity"),
    }  # fmt: skip
    if job["side"] == "diffs" and len(stages) > 1:  # each task again, with its own diff, after all stages
        again = []
        for number, (task, stage) in enumerate(zip(job["tasks"], recipe.stage_recipes(), strict=True), 1):
            adapter = folder / f"{number}-{task}" / "adapter"
            again.append(scores(recipe.final, [stage], adapter=adapter)[0]["metrics"]["exact_match"])
        own = [matrix[number + 1][number] for number in range(len(again))]
        sizes = [sum(p.stat().st_size for p in (folder / f"{n}-{task}/adapter").rglob("*.safetensors"))
                 for n, task in enumerate(job["tasks"][:-1], 1)]  # fmt: skip
        lost = [before - after for before, after in zip(own[:-1], again[:-1], strict=True)]
        result |= {"acc": statistics.mean(again), "forgetting": statistics.mean(lost), "bytes": sum(sizes),
                   "most_lost": max(map(abs, lost))}  # fmt: skip
    return result


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", metavar="FOLDER", help="the folder of the sets")
    parser.add_argument("--sides", default=",".join(SIDES), help="the others' figures come from the kept results")
    parser.add_argument("--base", metavar="FOLDER", help="where the base is made, or was (default: temporary)")
    if (args := arguments(parser, lambda job: None, needs_data=True)) is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    base = base_of(args, folder)
    steps, seeds = (4, SEEDS[:1]) if args.quick else (STEPS, SEEDS)
    orders = [TASKS[:2]] if args.quick else [TASKS, TASKS[::-1]]
    kept = Kept(folder / "kept" if args.quick else RESULTS / "continual_trainings.jsonl")

    def run(**job: Any) -> dict[str, Any]:
        job = {"steps": steps, **job}
        return kept.once(job, lambda out: learned(job, base, out), folder)

    def chain(**job: Any) -> float:
        """The mean accuracy after all tasks, in both orders, on training rows set apart."""
        found = [run(tasks=order, on="apart", seed=TRIED, **job)["acc"] for order in orders]
        return statistics.mean(found)

    def chosen(side: str) -> dict[str, float]:
        rates = OF_DIFFS if side == "diffs" else RATES
        rates = rates[-1:] if args.quick else rates
        if side in ("sequential", "diffs"):
            return {"rate": seek(lambda rate: chain(side=side, rate=rate), rates)[0]}
        field, of, tried = ("strength", side, STRENGTHS) if side == "ewc" else ("mix", "text", MIXES)
        value = tried[-1]
        rate = seek(lambda rate: chain(side=of, rate=rate, **{field: value}), rates)[0]
        value = seek(lambda value: chain(side=of, rate=rate, **{field: value}), tried[:1] if args.quick else tried)[0]
        return {"rate": rate, field: value}

    wanted, results = args.sides.split(","), {}
    fields = {side: chosen(side) for side in SIDES if side in wanted}
    for number, order in enumerate(orders):
        for seed in seeds:
            for side, (*_, times) in SIDES.items():
                if side in wanted and number < times:
                    job = {"side": side, "tasks": order, "on": "test", "seed": seed, **fields[side]}
                    results[side, number, seed] = run(**job)
    conclude("continual", args, *figures(results, fields), title=TITLE, claim=CLAIM, rows=rows(results, fields),
             notes=NOTES)  # fmt: skip


Results = dict[tuple[str, int, int], dict[str, Any]]


def of(results: Results, side: str, key: str, pairs: Any = None) -> list[float]:
    return [found[key] for (name, *at), found in results.items() if name == side and (pairs is None or at in pairs)]


def figures(results: Results, fields: dict[str, Any]) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Each side's forgetting against that of sequential tuning in the same orders and seeds, and its seconds."""
    summary: dict[str, float] = {}
    for side in fields:
        pairs = [at for name, *at in results if name == side]
        if side == "sequential" or "sequential" not in fields:
            continue
        one, other = (statistics.mean(of(results, name, "forgetting", pairs)) for name in (side, "sequential"))
        times = [results[side, *at]["seconds"] / results["sequential", *at]["seconds"] for at in pairs]
        name = {"text": ""}.get(side, f"_{side}")
        if other > 0:
            summary[f"forgetting_cut{name}"] = 1 - one / other
        summary[f"time_to_sequential{name}"] = statistics.median(times)
    if "diffs" in fields:
        summary["diff_forgetting"] = max(of(results, "diffs", "most_lost"))
    if {"text", "logits"} <= fields.keys():
        pairs = [at for name, *at in results if name == "logits"]
        accs = [results["logits", *at]["acc"] - results["text", *at]["acc"] for at in pairs]
        summary["logits_minus_text_points"] = 100 * statistics.mean(accs)
    targets = {"forgetting_cut": [">=", 0.7], "time_to_sequential": ["<=", 1.3], "diff_forgetting": ["<=", 0]}
    return summary, {key: value for key, value in targets.items() if key in summary}


def rows(results: Results, fields: dict[str, Any]) -> list[dict[str, Any]]:
    made = []
    base = [sum(found["matrix"][0]) / len(found["matrix"][0]) for found in results.values()]
    made.append({"side": "base", "runs": 1, "exact match, mean": spread([100 * base[0]])})
    for side in fields:
        neutral = [found[-1] / found[0] for found in of(results, side, "perplexity") if found]
        made.append({
            "side": side, "runs": len(of(results, side, "acc")),
            "fields": ", ".join(f"{key} {value:g}" for key, value in fields[side].items()),
            "exact match, mean": spread([100 * value for value in of(results, side, "acc")]),
            "forgetting, points": spread([100 * value for value in of(results, side, "forgetting")]),
            "CPU seconds": spread(of(results, side, "seconds")), "bytes": round(max(of(results, side, "bytes"))),
            "perplexity of neutral text, to the base": spread(neutral) if neutral else "",
        })  # fmt: skip
    return [{key: row.get(key, "") for key in COLUMNS} for row in made]


COLUMNS = ("side", "runs", "fields", "exact match, mean", "forgetting, points", "CPU seconds", "bytes",
           "perplexity of neutral text, to the base")  # fmt: skip
TITLE = "Four tasks one after another"
CLAIM = (
    "A small Llama learns four text tasks one after another: sequential tuning, rehearsal within 48 KiB of text or of "
    "probabilities, and a diff per task."
)
NOTES = [
    f"{STEPS} steps of {BATCH} rows for each task, up to 440 training rows and 40 test rows each; two orders and two "
    "seeds (ewc and loss_diverse: one order). A side's figures are the median (least .. most) of its runs; "
    "forgetting_cut compares means. Forgetting: the mean over tasks of the best exact match so far minus the last.",
    "bytes: what the side stores of earlier tasks, as files. A diff has its own task's model, so what it has forgotten "
    "is its score after all stages, loaded again, minus that right after its stage. The perplexity of neutral text is "
    "that of the last stage's model.",
    "Three diffs take 94 KB, about twice the 48 KiB of the buffers, so bytes are not equal for them.",
    "A first form chose LoRA's rate on one task alone, 1e-2, which ruins a chain of four: text cut forgetting by 41 %, "
    "logits by 56 %. Rates are now those that are best after the whole chain.",
    "The fields (learning rate; share of rehearsed rows; the anchor's strength) were chosen on 50 training rows set "
    "apart, with a seed of their own.",
]


if __name__ == "__main__":
    main()
