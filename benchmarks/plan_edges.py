"""Runs at the edge of their budget: 5 % above the plan's peak (they must finish, under --hard), and 15 % below.

Each configuration is planned by `trimtab plan`, then trained by `trimtab train --hard` with a budget of 1.05 times the
predicted peak, then started with 0.85 times the peak (which must end with exit code 3). All runs use the command line,
in fresh processes.

    python benchmarks/plan_edges.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import conclude, options, trimtab  # noqa: E402
from planned_runs import (  # noqa: E402
    ADAPTER,
    AGAIN,
    DORA,
    ENCODER,
    FULL,
    GIB,
    LORA,
    PACA,
    QWEN,
    SMOL,
    case,
    name_of,
    recipe_of,
    second_family,
    write_data,
)

STEPS = 5
CASES = [
    case(SMOL, PACA, 2, 256), case(SMOL, PACA, 4, 256, **AGAIN), case(SMOL, PACA, 2, 128, "fp32"),
    case(SMOL, PACA, 2, 256, "nf4"), case(SMOL, LORA, 2, 256), case(SMOL, LORA, 1, 512),
    case(SMOL, LORA, 2, 256, "nf4"),
    case(SMOL, DORA, 1, 128), case(SMOL, FULL, 1, 128), case(SMOL, ADAPTER, 2, 128), case(QWEN, PACA, 4, 256),
    case(QWEN, PACA, 2, 128), case(QWEN, LORA, 4, 256), case(QWEN, LORA, 2, 256, **AGAIN), case(QWEN, FULL, 2, 128),
    case(QWEN, ADAPTER, 2, 256), case(ENCODER, PACA, 16, 128), case(ENCODER, LORA, 16, 128),
    case(ENCODER, FULL, 16, 128), case(ENCODER, ADAPTER, 8, 128),
]  # fmt: skip
QUICK = (0, 10, 16)


def measure(args: argparse.Namespace) -> None:
    jobs = [CASES[i] for i in QUICK] if args.quick else CASES
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        second_family(Path(folder) / QWEN, 6)
        for index, job in enumerate(jobs):
            path = Path(folder) / f"recipe-{index}.json"
            keys = recipe_of({**job, "folder": folder}, f"{folder}/run-{index}")
            keys["training"]["max_steps"] = STEPS
            path.write_text(json.dumps(keys))  # JSON is YAML
            peak = json.loads(trimtab("plan", str(path), "--json")[1])["fast_peak_bytes"]
            code, _, errors = trimtab("train", str(path), "--hard", f"budget.fast={int(peak * 1.05)}B")
            run = Path(folder) / f"run-{index}" / "run.json"
            used = json.loads(run.read_text())["measured"]["fast_peak_bytes"] if run.is_file() else None
            refused, _, _ = trimtab("train", str(path), "overwrite=true", f"budget.fast={int(peak * 0.85)}B")
            rows.append({
                "configuration": name_of(job), "planned GiB": f"{peak / GIB:.3f}",
                "used GiB": f"{used / GIB:.3f}" if used else "", "exit at +5 %": code, "exit at -15 %": refused,
                "error": "" if code == 0 else errors.strip().splitlines()[-1][:200],
            })  # fmt: skip
            print("  ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
    summary = {
        "plans": len(rows),
        "finished_at_plus_5": sum(row["exit at +5 %"] == 0 for row in rows),
        "refused_at_minus_15": sum(row["exit at -15 %"] == 3 for row in rows),
    }
    conclude(
        "plan_edges", args, summary, TARGETS, title="Runs at the edge of their budget", claim=CLAIM, rows=rows,
        notes=NOTES,
    )  # fmt: skip


TARGETS = {"plans": [">=", 20], "finished_at_plus_5": [">=", 19], "refused_at_minus_15": [">=", 20]}
CLAIM = "A run whose budget is 5 % above its plan finishes within it; one whose budget is 15 % below does not start."
NOTES = [
    "The budget is a limit of the process (`--hard`). Exit 0: finished, 3: refused before the start, 4: stopped.",
    "used: anonymous memory of the whole process at its peak, by the run's own meter.",
]


def main() -> None:
    parser = options(__doc__)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
