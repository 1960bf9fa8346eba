"""Predicted beside measured: the memory and speed that `trimtab plan` predicts, and those of the run.

Each configuration is trained for real, a few steps in a fresh process under the chosen allocator. The prediction is
what the planner wrote before the first step (run.json). Measured are the live tensors of a step (by the meter), the
growth of the process's anonymous memory since training began (read from outside, from the kernel) and tokens/s. Each
configuration runs once per round; the figures are medians of the rounds.

    python benchmarks/plan_accuracy.py [--quick] [--rounds 3] [--only WORD] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import alternate, conclude, options  # noqa: E402
from planned_runs import (  # noqa: E402
    ADAPTER,
    AGAIN,
    DORA,
    ENCODER,
    FULL,
    LORA,
    MEFT,
    PACA,
    QWEN,
    SMOL,
    case,
    name_of,
    row_of,
    run,
    second_family,
    write_data,
)

CASES = [
    case(SMOL, PACA, 4, 256), case(SMOL, PACA, 4, 256, **AGAIN), case(SMOL, PACA, 1, 512), case(SMOL, PACA, 8, 128),
    case(SMOL, PACA, 4, 256, "fp32"), case(SMOL, PACA, 4, 256, "nf4"), case(SMOL, PACA, 2, 256, "int8"),
    case(SMOL, PACA, 2, 256, gradient_accumulation_steps=2), case(SMOL, PACA, 1, 512, **AGAIN),
    case(SMOL, LORA, 4, 256), case(SMOL, LORA, 4, 256, **AGAIN), case(SMOL, LORA, 2, 512), case(SMOL, LORA, 1, 128),
    case(SMOL, LORA, 2, 256, "fp32"), case(SMOL, LORA, 4, 256, "nf4"), case(SMOL, DORA, 2, 256),
    case(SMOL, FULL, 2, 256), case(SMOL, FULL, 2, 256, **AGAIN), case(SMOL, FULL, 1, 256, "fp32"),
    case(SMOL, ADAPTER, 4, 256), case(SMOL, ADAPTER, 2, 256, **AGAIN), case(SMOL, ADAPTER, 2, 128, "fp32"),
    case(QWEN, PACA, 4, 256), case(QWEN, PACA, 4, 256, **AGAIN), case(QWEN, PACA, 2, 512), case(QWEN, LORA, 4, 256),
    case(QWEN, LORA, 2, 512, "fp32"), case(QWEN, LORA, 4, 256, "nf4"), case(QWEN, FULL, 4, 256),
    case(QWEN, FULL, 2, 256, **AGAIN), case(QWEN, ADAPTER, 4, 256), case(QWEN + "-deep", PACA, 4, 256),
    case(QWEN + "-deep", LORA, 4, 256, **AGAIN), case(QWEN + "-deep", FULL, 2, 256),
    case(ENCODER, PACA, 32, 128), case(ENCODER, LORA, 32, 128), case(ENCODER, FULL, 32, 128),
    case(ENCODER, ADAPTER, 16, 256), case(ENCODER, LORA, 16, 256, **AGAIN), case(ENCODER, FULL, 8, 64),
    case(SMOL, MEFT, 4, 256), case(SMOL, MEFT, 8, 64), case(SMOL, MEFT, 4, 256, **AGAIN),
]  # fmt: skip
QUICK = (0, 9, 16, 34)


def measure(args: argparse.Namespace) -> None:
    jobs = [CASES[i] for i in QUICK] if args.quick else [job for job in CASES if args.only in name_of(job)]
    rounds = 1 if args.quick else args.rounds
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        second_family(Path(folder) / QWEN, 6)
        second_family(Path(folder) / (QWEN + "-deep"), 18)
        turns = {name_of(job): (lambda job=job: run({**job, "folder": folder})) for job in jobs}
        runs = alternate(turns, rounds, show=lambda line: print(line, flush=True))
    rows = [row_of(name, of) for name, of in runs.items()]
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items() if key != "errors"), flush=True)
    summary: dict[str, float] = {"rows": len(rows)}
    for kind in ("live", "process", "speed"):
        sizes = [abs(row["errors"][kind]) for row in rows]
        summary[f"{kind}_median_error"] = statistics.median(sizes)
        summary[f"{kind}_worst_error"] = max(sizes)
    summary["peak_median_error"] = statistics.median(abs(row["errors"]["peak"]) for row in rows)
    for row in rows:
        del row["errors"]
    args.quick = args.quick or bool(args.only)
    conclude(
        "plan_accuracy", args, summary, TARGETS, title="What the plan predicts beside what the run uses", claim=CLAIM,
        rows=rows, notes=[*NOTES, f"Rounds: {rounds}."],
    )  # fmt: skip


TARGETS = {
    "rows": [">=", 36], "live_median_error": ["<=", 0.02], "live_worst_error": ["<=", 0.05],
    "process_median_error": ["<=", 0.05], "process_worst_error": ["<=", 0.10], "speed_median_error": ["<=", 0.20],
}  # fmt: skip
CLAIM = "A run uses what its plan predicted before it began. Each pair in the table is predicted / measured."
NOTES = [
    "live: bytes of live tensors at the peak of a step, by the planner's trace and by the meter.",
    "growth, process error: growth of the process's anonymous memory from the first step on, read from outside.",
    "peak: anonymous memory of the whole process at its peak.",
    "Constants of the plan were chosen on these configurations; plan_held_out has configurations used for none of "
    "them.",
    "speed: tokens/s from the rates that `trimtab doctor` measured on this machine once.",
    "Process: beside the tensors, what the doctor's small trainings used on this machine once, and 15 % of what the "
    "backward pass of a block allocates and frees. malloc returns freed memory after a delay, so repeated runs differ.",
    "Speed: the rates are measured once, and this machine's speed changes by a third within hours.",
]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=3)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
