"""Full fine-tuning with weights, gradients and Adam's moments in a file (`offload: slow`), against AdamW in memory.

SmolLM2-135M, weights in fp32, products in bf16, 2 x 256 tokens a step, AdamW with clipping, text of random words. The
sides alternate in fresh processes; memory is anonymous memory beyond the loaded model, read from outside.

    python benchmarks/offload.py [--quick] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import Clock, alternate, arguments, conclude, follow, itself, options, ratios, say, spread  # noqa: E402

GIB, GROWTH = 2**30, "anon_growth_since_train"
SIDES = {"in memory": {}, "offload: slow": {"offload": "slow"}}
TARGETS = {"growth_to_adamw": ["<=", 0.35], "step_to_adamw": ["<=", 2.5], "max_difference": ["<=", 0.0]}
CLAIM = (
    "Full fine-tuning of SmolLM2-135M with weights, gradients and Adam's moments in a file: at most 0.35 of the memory "
    "of AdamW in memory, at most 2.5 times the time of a step, and the same losses bit for bit."
)
NOTES = [
    "growth_to_adamw: of the growth of anonymous memory from the loaded model to the peak of training, round by round; "
    "the summary has medians. step: the median after the first two.",
    "max_difference: of the losses of all steps, in nats.",
    "The file's pages are the kernel's to keep or to write back; here there was room for all of them in RAM. A machine "
    "without it waits for its disk.",
]


def worker(job: dict[str, Any]) -> None:
    from trimtab import Recipe

    clock = Clock()
    follow(clock)
    with tempfile.TemporaryDirectory() as folder:
        words = [str(number) for number in range(1000)]
        draw = random.Random(0)
        rows = [{"text": " ".join(draw.choices(words, k=400))} for _ in range(64)]
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = Recipe(
            model="smollm2-135m", data={"train": f"{folder}/rows.jsonl"}, patches=[{"full": SIDES[job["side"]]}],
            training={"max_steps": job["steps"], "per_device_train_batch_size": 2, "max_length": 256, "bf16": True,
                      "packing": True, "packing_strategy": "wrapped", "learning_rate": 2e-5, "logging_steps": 1,
                      "save_strategy": "no"},
            output=f"{folder}/run",
        ).train()  # fmt: skip
        lines = (json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if "loss" in line]
    live = run["measured"].get("live_peak_bytes", 0)
    say("result", {"seconds": clock.median, "losses": losses, "live": live})


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    if (args := arguments(parser, worker)) is None:
        return
    steps = 5 if args.quick else 10
    how = {side: (lambda side=side: itself(__file__, {"side": side, "steps": steps})) for side in SIDES}
    runs = alternate(how, 1 if args.quick else args.rounds)
    memory, file = runs.values()
    summary = {
        "growth_to_adamw": statistics.median(ratios(file, memory, GROWTH)),
        "step_to_adamw": statistics.median(ratios(file, memory, "seconds")),
        "max_difference": max(abs(a - b) for one, two in zip(memory, file, strict=True)
                              for a, b in zip(one["losses"], two["losses"], strict=True)),
    }  # fmt: skip
    rows = [
        {"side": side, "runs": len(of), "growth of anonymous memory, GiB": spread([r[GROWTH] / GIB for r in of]),
         "tensors at the peak, GiB": spread([r["live"] / GIB for r in of]),
         "step, s": spread([r["seconds"] for r in of])}
        for side, of in runs.items()
    ]  # fmt: skip
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items()))
    conclude(
        "offload", args, summary, TARGETS, title="Full fine-tuning with its state in a file", claim=CLAIM, rows=rows,
        notes=NOTES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
