"""Memory and speed of MEFT against the width of its adapter, and against the dense Parallel Adapter with AdamW.

SmolLM2-135M, bf16 base, 4 x 256 tokens per step, the same text, AdamW; r = 1,024 to 32,768 pairs per layer, the table
in a file. Each side runs in a fresh process; its anonymous memory is read from outside.

    python benchmarks/meft_scale.py [--quick] [--rounds 3] [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import (  # noqa: E402
    Clock,
    alternate,
    city_text,
    conclude,
    follow,
    itself,
    options,
    say,
    spread,
    table_arguments,
    told_of_experts,
    training,
)

LAYERS, WIDTH, GIB = 30, 576, 2**30
WIDTHS = (1024, 4096, 16384, 32768)
DENSE = 16384
TARGETS = {
    "fast_widest_to_narrowest": ["<=", 1.25], "fast_to_dense": ["<=", 0.2], "step_to_dense": ["<=", 1.0],
    "moved_to_formula": ["<=", 1.02], "moved_to_all": ["<=", 0.5], "step_widest_to_narrowest_to_root": ["<", 1.0],
}  # fmt: skip

CLAIM = (
    "SmolLM2-135M, bf16 base, 4 x 256 tokens per step, AdamW: MEFT's fast memory hardly grows with its width, and its "
    f"step is no slower than that of the dense Parallel Adapter (r {DENSE})."
)
NOTES = [
    "growth, peak: anonymous memory beyond the loaded model, and of the whole process, read from outside.",
    "moved_to_formula: bytes transferred, as counted, over those of the experts probed and fired; moved_to_all: over "
    "all.",
    f"step_widest_to_narrowest_to_root: how many times longer a step of r {WIDTHS[-1]} takes than one of r "
    f"{WIDTHS[0]}, over the square root of the ratio of the widths.",
]


def worker(job: dict[str, Any]) -> None:
    """Trains with the code of `trimtab train`, and counts the experts that its passes fetch."""
    from trimtab import Recipe

    clock, moves = Clock(warm=1), {"probed": 0, "fired": 0, "all": 0}
    follow(clock)

    def count(probed: Any, store: Any, alive: Any) -> None:
        """Once a forward pass for all that is probed; once in each pass for the experts with a pair that fired. A
        router's rows, which are vectors, are those of experts counted before."""
        if len(store.shape) > 1:
            chosen = probed if alive is None else probed[alive]
            moves["probed" if alive is None else "fired"] += len(chosen.unique())
            moves["all"] += store.rows if alive is None else 0

    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder, told_of_experts(count):
        run = Recipe(
            model="smollm2-135m", data={"train": job["text"]}, patches=[{job["patch"]: job["fields"]}],
            training=training(job["steps"], job["rate"], 0), place={"slow": "disk", "folder": job["folder"]},
            output=folder + "/run",
        ).train()  # fmt: skip
    measured = run["measured"]
    say("result", {
        "seconds": clock.median, "loss": run["final_loss"], "parameters": run["trainable_parameters"],
        "moved": measured.get("store_up_bytes_per_step", 0) + measured.get("store_down_bytes_per_step", 0),
        "slow": measured.get("store_slow_bytes", 0), **moves,
        "predicted": run["predicted"].get("fast_growth_bytes", 0),
    })  # fmt: skip


def formula(run: dict[str, Any], fields: dict[str, Any], steps: int) -> tuple[float, float]:
    """Bytes a step: probed experts up, those that fired up again and their gradients down (the paper's eq. 8 counts one
    way), of a probed expert's router the gradient down and the new row up; and the same of all."""
    from trimtab.methods.meft import Meft

    experts, block = Meft(**fields).layout()
    row, router = block * 2 * WIDTH * 4, WIDTH * 4
    moved = (run["probed"] + run["fired"]) * row + run["probed"] * 2 * router
    return moved / steps, LAYERS * experts * (row * 3 + router * 2)


def shares(run: dict[str, Any]) -> str:
    """Of all experts: those probed in a pass, and those with a pair that fired, of which each pass counts one half."""
    every = max(1, run["all"])
    return f"{run['probed'] / every:.2f}, {run['fired'] / 2 / every:.2f}"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    if (args := table_arguments(parser, worker)) is None:
        return
    steps = 4 if args.quick else 6
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        text = Path(folder) / "cities.jsonl"
        city_text(text)
        base = {"text": str(text), "steps": steps, "rate": 1e-4, "folder": folder}
        more = args.fields
        jobs = {f"MEFT r {r}": {**base, "patch": "meft", "fields": {"r": r, **more}} for r in WIDTHS}
        jobs[f"Parallel Adapter r {DENSE}"] = {**base, "patch": "parallel_adapter", "fields": {"r": DENSE}}
        run = lambda job: itself(__file__, job)  # noqa: E731
        runs = alternate(
            {name: (lambda job=job: run(job)) for name, job in jobs.items()}, 1 if args.quick else args.rounds
        )
    middle = {name: {key: statistics.median(r[key] for r in of) for key in of[0]} for name, of in runs.items()}
    narrow, same, wide = (middle[f"MEFT r {r}"] for r in (WIDTHS[0], DENSE, WIDTHS[-1]))
    dense, held = middle[f"Parallel Adapter r {DENSE}"], "anon_growth_since_train"
    moved, every = formula(same, {"r": DENSE, **more}, steps)
    summary = {
        "fast_widest_to_narrowest": wide["anon_peak"] / narrow["anon_peak"], "fast_to_dense": same[held] / dense[held],
        "step_to_dense": same["seconds"] / dense["seconds"], "moved_to_formula": same["moved"] / moved,
        "moved_to_all": same["moved"] / every,
        "step_widest_to_narrowest_to_root": wide["seconds"] / narrow["seconds"] / (WIDTHS[-1] / WIDTHS[0]) ** 0.5,
    }  # fmt: skip
    rows = [
        {"side": name, "s/step": spread([r["seconds"] for r in of]), "growth, GiB": spread([r[held] / GIB for r in of]),
         "peak, GiB": spread([r["anon_peak"] / GIB for r in of]), "experts probed, fired": shares(middle[name]),
         "moved, GiB a step": spread([r["moved"] / GIB for r in of])}
        for name, of in runs.items()
    ]  # fmt: skip
    for row in rows:
        print(row)
    conclude(
        "meft_scale", args, summary, TARGETS, title="An adapter wider than memory", claim=CLAIM, rows=rows, notes=NOTES
    )


if __name__ == "__main__":
    main()
