"""A model of LLaMA-7B's shape with a MEFT adapter of 10 % trains on a machine without a GPU, inside a budget of 6 GiB.

Weights are random bf16, mapped from safetensors files; the text has one word per token id, so that hidden states differ
as words do. The adapter's table is in a file. One process trains with the code of `trimtab train` under
`budget: {fast: 6GiB}`; its anonymous memory is read from outside. Some 28 GiB of disk are used and freed.

    python benchmarks/seven_b.py [--quick] [--folder FOLDER] [--steps 4] [--json FILE]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import Clock, conclude, follow, itself, options, say, table_arguments  # noqa: E402
from llama_shape import TOKENS, write_model, write_text  # noqa: E402

GIB, BUDGET, PAIRS = 2**30, "6GiB", 3200
TARGETS = {"anon_peak_gib": ["<=", 6.0]}
CLAIM = (
    "A model of LLaMA-7B's shape (bf16, mapped from its files) with a MEFT adapter of 3,200 pairs per layer trains on "
    "rows of 256 tokens with less than 6 GiB of anonymous memory, without a GPU."
)
NOTES = [
    "anon_peak_gib: the process's peak anonymous memory, read from outside; predicted: by the plan made before the "
    "run.",
    "read, written: disk traffic of the process, as counted by the kernel, including start and loading, and without "
    "reads from the page cache.",
]


def worker(job: dict[str, Any]) -> None:
    from trimtab import Recipe

    clock = Clock(warm=1)
    follow(clock)
    run = Recipe(
        model=job["model"], data={"train": job["text"]}, patches=[{"meft": {"r": job["r"], **job["fields"]}}],
        place={"slow": "disk", "folder": job["folder"]}, budget={"fast": BUDGET},
        training={
            "max_steps": job["steps"], "per_device_train_batch_size": 1, "max_length": TOKENS, "packing": True,
            "packing_strategy": "wrapped", "learning_rate": 1e-4, "logging_steps": 1, "save_strategy": "no",
        },
        output=f"{job['folder']}/run",
    ).train()  # fmt: skip
    done = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    say("result", {
        "predicted": run["predicted"], "measured": run["measured"], "seconds": clock.median,
        "parameters": run["trainable_parameters"], "read": int(done["read_bytes"]),
        "written": int(done["write_bytes"]),
    })  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=4)
    if (args := table_arguments(parser, worker)) is None:
        return
    blocks = 4 if args.quick else 32
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_model(Path(folder) / "model", blocks)
        write_text(Path(folder) / "text.jsonl", 4 * args.steps)
        job = {"model": f"{folder}/model", "text": f"{folder}/text.jsonl", "folder": folder, "r": PAIRS,
               "steps": args.steps, "fields": args.fields}  # fmt: skip
        run = itself(__file__, job, timeout=5400)
    predicted, measured = run["predicted"], run["measured"]
    summary = {
        "anon_peak_gib": run["anon_peak"] / GIB, "predicted_anon_peak_gib": predicted["fast_peak_bytes"] / GIB,
        "tokens_per_second": TOKENS / run["seconds"],
    }  # fmt: skip
    moved = measured["store_up_bytes_per_step"] + measured["store_down_bytes_per_step"]
    row = {
        "blocks": blocks, "adapter, parameters": f"{run['parameters']:,}", "steps": args.steps,
        "s/step": f"{run['seconds']:.1f}", "anonymous, GiB": f"{summary['anon_peak_gib']:.2f}",
        "planned, GiB": f"{summary['predicted_anon_peak_gib']:.2f}",
        "table, GiB": f"{measured['store_slow_bytes'] / GIB:.1f}",
        "table moved, GiB a step": f"{moved / GIB:.2f}",
        "resident, GiB": f"{run['rss_peak'] / GIB:.1f}", "read, GiB": f"{run['read'] / GIB:.1f}",
        "written, GiB": f"{run['written'] / GIB:.1f}",
    }  # fmt: skip
    print(row)
    conclude("seven_b", args, summary, TARGETS, title="LLaMA-7B's shape in 6 GiB", claim=CLAIM, rows=[row], notes=NOTES)


if __name__ == "__main__":
    main()
