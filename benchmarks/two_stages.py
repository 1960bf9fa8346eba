"""Two stages of tuning: exact resume from wall-clock limits, the audit, and what the second stage adds.

resume   Two stages of LoRA on the model of small_model.py, the second with the first's optimizer, are stopped by five
         random values of `training.max_minutes` and resumed, and compared with an uninterrupted run: adapters,
         optimizer states, losses and task matrix, bit for bit.
audit    50 faults are planted into 1,000 rows of gsm8k (exact and near duplicates, rows of the test set, malformed
         turns, cut and empty answers, wrongly decoded text, keys), and `data audit` is asked for them, and for the rows
         without any.
adds     The same model, LoRA r 16 (`--model smollm2-135m`: that one): first Dolly and HH-RLHF, then OASST1 (English),
         against one stage of as many steps on the mixture: the held-out loss on both test sets.

`--data FOLDER` has the sets that small_model.py names, gsm8k, dolly_hhrlhf and oasst1.

    python benchmarks/two_stages.py --data FOLDER [--parts resume,audit,adds] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, Kept, arguments, conclude, options  # noqa: E402
from small_model import base_of, load  # noqa: E402

STOPS, STEPS = 5, 24  # limits; steps of a stage in `resume`
PLANTED, CLEAN = 50, 1000
ADDS, ROWS, LENGTH, HELD = 60, 8, 96, 40  # steps of a stage, rows of a step, tokens of a row, rows of a test set
RATE = 2e-3


# --- resume ----------------------------------------------------------------------------------------------------------


def stages(base: Path, output: Path, steps: int, **training: Any) -> dict[str, Any]:
    data = {task: {part: str(base / f"{task}_{file}.jsonl") for part, file in (("train", "train"), ("test", "apart"))}
            for task in ("author", "genre")}  # fmt: skip
    return {
        "model": str(base / "base"), "patches": [{"lora": {"r": 8, "dropout": 0.1}}], "output": str(output),
        "data": {"metrics": [], "too_long": "cut"}, "engine": {"allocator": "none"},
        "stages": [{"name": task, "data": files, "carry": "full" if task == "genre" else "fresh"}
                   for task, files in data.items()],
        "training": {"max_steps": steps, "per_device_train_batch_size": 8, "max_length": 128, "learning_rate": 5e-3,
                     "logging_steps": 1, "save_strategy": "steps", "save_steps": steps, **training},
    }  # fmt: skip


def left(run: Path) -> dict[str, Any]:
    """What must not depend on when a run was stopped."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, Any] = {"matrix": json.loads((run / "run.json").read_text())["tasks"]["matrix"]}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["losses"] = [(line["step"], line["loss"], line["learning_rate"]) for line in lines if "loss" in line]
    for folder in sorted((run / "stages").glob("*-*")):
        adapter = load_file(folder / "adapter/adapter_model.safetensors")
        found |= {f"{folder.name}/{key}": tensor for key, tensor in adapter.items()}
        newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        states = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
        found |= {f"{folder.name}/{i}/{key}": slot[key] for i, slot in states.items() for key in slot}
    return found


def equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    import torch

    same = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b  # noqa: E731
    return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)


def resume(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from trimtab import Recipe
    from trimtab.errors import BadInput, Stopped

    base, steps, wanted = base_of(args, folder), 6 if args.quick else STEPS, 1 if args.quick else STOPS
    began = time.monotonic()
    Recipe.from_dict(stages(base, folder / "whole", steps)).train()
    whole, draw, rows = time.monotonic() - began, random.Random(0), []
    for number in range(wanted):
        limit, stopped, same, at = draw.uniform(0.3, 0.9) * whole, 0, False, ""
        while not stopped:  # the machine may be faster or slower than before
            output = folder / f"part-{number}-{limit:.2f}"
            try:
                Recipe.from_dict(stages(base, output, steps, max_minutes=limit / 60)).train()
                limit *= 0.6
            except Stopped as error:
                stopped, at = 1, str(error)
            except BadInput:
                limit *= 1.3
        Recipe.from_dict(stages(base, output, steps) | {"resume": True}).train()
        same = equal(left(folder / "whole"), left(output))
        rows.append({"what": f"stopped after {limit:.1f} of {whole:.1f} s, {at.split(':')[0]}", "equal": same})
        print(json.dumps(rows[-1]), flush=True)
    return {"stops": len(rows), "resumed_equal": sum(row["equal"] for row in rows)}, rows


# --- audit -----------------------------------------------------------------------------------------------------------


def planted(clean: list[dict[str, Any]], test: list[dict[str, Any]], draw: random.Random) -> list[tuple[str, Any]]:
    """50 rows with a fault: (kind that the audit should name, row)."""
    turn = lambda row, at: row["messages"][at]["content"]  # noqa: E731
    made = lambda *turns: {"messages": [{"role": role, "content": text} for role, text in turns]}  # noqa: E731
    long = [row for row in clean if len(turn(row, 0).split()) > 45]
    found: list[tuple[str, Any]] = []
    for row in draw.sample(clean, 10):
        found.append(("exact", made(("user", turn(row, 0).upper()), ("assistant", turn(row, 1) + " "))))
    for row in draw.sample(long, 8):
        words = turn(row, 0).split()
        words[len(words) // 2] = "several"
        found.append(("near", made(("user", " ".join(words)), ("assistant", turn(row, 1)))))
    for number, row in enumerate(draw.sample(test, 12)):
        other = "I do not know." if number % 2 else turn(row, 1)
        found.append(("overlap", made(("user", turn(row, 0)), ("assistant", other))))
    ask = [turn(row, 0) + f" Say so in case {number}." for number, row in enumerate(draw.sample(clean, 20))]
    tell = [turn(row, 1) for row in draw.sample(clean, 20)]
    for number in range(20):
        user, reply = ("user", f"{tell[number - 1].split('.')[0]} {number}? {ask[number]}"), ("assistant", tell[number])
        found.append([
            ("roles", made(user, user, reply)), ("roles", made(reply, user)), ("roles", made(user)),
            ("empty", made(user, ("assistant", " "))), ("roles", made(user, reply, user)),
            ("cut", made(user, ("assistant", "It follows from all that was said before this sentence that the"))),
            ("encoding", made(user, ("assistant", "The cafÃ© sells " + tell[number]))),
            ("secret", made(user, ("assistant", f"Use AKIA{''.join(draw.choices('ABCDEFGHIJKLMNOP234567', k=16))}."))),
            ("encoding", made(user, ("assistant", "A word \ufffd here. " + tell[number]))),
            ("empty", made(("user", ""), reply)),
        ][number % 10])  # fmt: skip
    return found


def audited(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from trimtab.data.audit import audit

    chat = lambda ask, reply: {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]}  # noqa: E731
    every = load(Path(args.data), "gsm8k/train")[: CLEAN + 200]
    rows = [chat(row["question"], row["answer"]) for row in every]
    clean, test, draw = rows[:CLEAN], rows[CLEAN:], random.Random(0)
    faults = planted(clean, test, draw)
    assert len(faults) == PLANTED
    mixed = [("", row) for row in clean] + faults
    tail = mixed[CLEAN // 2 :]  # duplicates come after what they repeat: the later one is the fault
    draw.shuffle(tail)
    order = mixed[: CLEAN // 2] + sorted(tail, key=lambda pair: pair[0] in ("exact", "near"))
    for name, some in (("train", [row for _, row in order]), ("test", test), ("clean", clean)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    began = time.process_time()
    made = audit([str(folder / "train.jsonl")], [str(folder / "test.jsonl")])
    seconds = time.process_time() - began
    told: dict[int, set[str]] = {}
    for finding in made.findings:
        told.setdefault(finding.line, set()).add(finding.kind)
    kinds = dict.fromkeys(kind for kind, _ in faults)
    right = {
        kind: sum(kind in told.get(line, ()) for line, (of, _) in enumerate(order, 1) if of == kind) for kind in kinds
    }
    false = sum(bool(told.get(line)) for line, (kind, _) in enumerate(order, 1) if not kind)
    alone = len(audit([str(folder / "clean.jsonl")]).findings)
    missed = [(kind, row) for line, (kind, row) in enumerate(order, 1) if kind and kind not in told.get(line, ())]
    for kind, row in missed:
        print("missed", kind, json.dumps(row)[:300])
    for finding in made.findings:
        if not order[finding.line - 1][0]:
            print("false alarm", finding)
    shown = [{"what": f"planted: {kind}, {sum(of == kind for of, _ in faults)} rows", "found": many}
             for kind, many in right.items()]  # fmt: skip
    return {
        "found": sum(right.values()), "false_alarms": max(false, alone), "audit_rows_per_second": len(order) / seconds
    }, shown  # fmt: skip


# --- what the second stage adds --------------------------------------------------------------------------------------


def adds(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from trimtab import Recipe

    data, steps, held = Path(args.data), 2 if args.quick else ADDS, 4 if args.quick else HELD
    model = args.model or str(base_of(args, folder) / "base")
    files: dict[str, str] = {}
    for name, part, most in (("dolly", "train", 400), ("dolly", "test", held), ("oasst", "train", 400),
                             ("oasst", "test", held)):  # fmt: skip
        if name == "dolly":
            rows = [
                {"prompt": row["prompt"], "completion": row["response"]} for row in load(data, f"dolly_hhrlhf/{part}")
            ]
        else:
            rows = [{"prompt": row["messages"][0]["content"] + "\n", "completion": row["messages"][1]["content"]}
                    for row in load(data, f"oasst1/{part}") if row["lang"] == "en"]  # fmt: skip
        files[f"{name}_{part}"] = str(folder / f"{name}_{part}.jsonl")
        rows = [row for row in rows if len((row["prompt"] + row["completion"]).split()) < 60] or rows
        Path(files[f"{name}_{part}"]).write_text(
            "".join(json.dumps(row) + "\n" for row in rows[:most]), encoding="utf-8"
        )
    both = folder / "both_train.jsonl"
    both.write_text(Path(files["dolly_train"]).read_text() + Path(files["oasst_train"]).read_text())

    def train(side: str, rate: float, seed: int) -> dict[str, Any]:
        two = [{"name": name, "data": {"train": files[f"{name}_train"], "test": files[f"{name}_test"]}}
               for name in ("dolly", "oasst")]  # fmt: skip
        if side == "mixture":  # the second "stage" only brings its test set: it takes one step without a rate
            two[0]["data"] = {**two[0]["data"], "train": str(both)}
            two[0]["training"], two[1]["training"] = {"max_steps": 2 * steps}, {"max_steps": 1, "learning_rate": 0.0}
        made = Recipe.from_dict({
            "model": model, "patches": [{"lora": {"r": 16, "alpha": 32}}], "stages": two,
            "output": str(folder / f"{side}-{seed}"), "data": {"metrics": [], "too_long": "cut", "chat": False},
            "engine": {"allocator": "none"},
            "training": {"max_steps": steps, "per_device_train_batch_size": ROWS, "max_length": LENGTH,
                         "learning_rate": rate, "seed": seed, "logging_steps": steps},
        }).train()  # fmt: skip
        return {"losses": made["tasks"]["matrix"]["loss"], "steps": made["steps"]}

    kept = Kept(folder / "kept" if args.quick else RESULTS / "two_stages_trainings.jsonl")
    found, shown = {}, []
    for side in ("two stages", "mixture"):
        job = {"side": side, "rate": RATE, "seed": 1, "steps": steps, "rows": ROWS, "length": LENGTH}
        job["model"] = args.model or "small"
        found[side] = kept.once(job, lambda _, side=side: train(side, RATE, 1))
        for label, row in zip(("base", "after stage one", "in the end"), found[side]["losses"], strict=True):
            if side == "two stages" or label == "in the end":
                shown.append({"what": f"{side}, {label}", "loss, Dolly and HH-RLHF": row[0], "loss, OASST1": row[1]})
    ends = {side: one["losses"][-1] for side, one in found.items()}
    return {
        "stage_two_minus_mixture_loss_dolly": ends["two stages"][0] - ends["mixture"][0],
        "stage_two_minus_mixture_loss_oasst": ends["two stages"][1] - ends["mixture"][1],
    }, shown  # fmt: skip


PARTS = {"audit": audited, "resume": resume, "adds": adds}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", metavar="FOLDER", help="the folder of the sets")
    parser.add_argument("--parts", default=",".join(PARTS), help="the other parts' figures stay in the result file")
    parser.add_argument("--model", help="of `adds`, in place of the small one")
    parser.add_argument("--base", metavar="FOLDER", help="where the small base is made, or was (default: temporary)")
    if (args := arguments(parser, lambda job: None, needs_data=True)) is None:
        return
    path = Path(args.json) if args.json else RESULTS / "two_stages.json"
    before = {"summary": {}, "rows": []} if args.quick or not path.is_file() else json.loads(path.read_text())
    summary, rows = before["summary"], before["rows"]
    for part, measure in PARTS.items():
        if part in args.parts.split(","):
            with tempfile.TemporaryDirectory() as folder:
                figures, found = measure(args, Path(folder))
            summary = {**summary, **figures}
            rows = [row for row in rows if row["part"] != part]
            rows += [{key: row.get(key, "") for key in COLUMNS} for row in ({"part": part, **row} for row in found)]
    targets = {key: value for key, value in TARGETS.items() if key in summary}
    conclude("two_stages", args, summary, targets, title="Two stages of tuning", claim=CLAIM, rows=rows, notes=NOTES)


COLUMNS = ("part", "what", "equal", "found", "loss, Dolly and HH-RLHF", "loss, OASST1")
TARGETS = {"resumed_equal": [">=", STOPS], "found": [">=", PLANTED], "false_alarms": ["<=", 0]}
CLAIM = (
    "A run of two stages is stopped by wall-clock limits and resumed exactly; the audit finds what was planted; and "
    "two stages against one on the mixture, at equal steps."
)
NOTES = [
    f"resume: {STEPS} steps of 8 rows for each stage, the second with the first's optimizer (carry: full); limits are "
    "random shares, 0.3 to 0.9, of the uninterrupted run's seconds. Compared bit for bit: adapters, optimizer states, "
    "losses and the task matrix.",
    f"audit: {PLANTED} faults in {CLEAN:,} rows of gsm8k, with 200 others as the test set. false_alarms: the larger of "
    "those in the mixed file and in the 1,000 rows alone.",
    f"adds: the small model, LoRA r 16 alpha 32, rate {RATE:g}, {ADDS} steps of {ROWS} rows of up to {LENGTH} tokens "
    f"for each stage, {2 * ADDS} for the mixture; {HELD} test rows each; one seed, so it shows no more than a "
    "direction.",
]


if __name__ == "__main__":
    main()
