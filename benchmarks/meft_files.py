"""How much memory a process uses to save and to load a large MEFT adapter, for several adapter sizes.

SmolLM2-135M, bf16, tables in files; r = 4,096 to 16,384 pairs per layer (the widest: 2.1 GiB of parameters). Each size
is saved in one fresh process and loaded in another. Anonymous memory is read from outside, and its growth is measured
from when the model is loaded (to save: with its tables). Needs 11 GiB of disk, which is freed.

    python benchmarks/meft_files.py [--quick] [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import conclude, itself, options, say  # noqa: E402

MIB, GIB = 2**20, 2**30
WIDTHS = (4096, 8192, 16384)
TARGETS = {"save_peak_mib": ["<=", 256], "load_peak_mib": ["<=", 256], "widest_adapter_gib": [">=", 2]}


def worker(job: dict[str, Any]) -> None:
    """Save an adapter whose every row has been trained a little, or load it; through trimtab's own functions."""
    from trimtab import Place
    from trimtab.artifacts.adapter import Base, load_adapter, save_adapter
    from trimtab.methods.meft import Meft
    from trimtab.model.load import base_hash, load_model
    from trimtab.tiered.store import VALUES

    model, _ = load_model("smollm2-135m")
    folder, place = Path(job["folder"]) / "adapter", Place(fast="cpu", slow="disk", folder=job["folder"])
    base = Base("smollm2-135m", base_hash(model))
    if job["do"] == "save":
        surgery = Meft(r=job["r"]).apply(model, place)
        for store in surgery.stores:  # the values are zeros at the start
            for row in range(store.rows):
                store.part(VALUES, row).add_(row / store.rows)
            store.changed(range(store.rows))
    say("mark", "ready")
    began = time.perf_counter()
    if job["do"] == "save":
        save_adapter(folder, [surgery], base)
    else:
        (surgery,) = load_adapter(model, folder, place)
    seconds = time.perf_counter() - began
    print_of = [float(store.whole()[row].double().sum()) for store in surgery.stores for row in (0, store.rows - 1)]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    files = len(list(folder.glob("*.safetensors")))
    say("result", {"seconds": seconds, "size": size, "files": files, "print": print_of})


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="where the tables and adapters are written (default: the temporary folder)")
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    rows: list[dict[str, Any]] = []
    held: dict[str, list[float]] = {"save": [], "load": []}
    for r in WIDTHS[:1] if args.quick else WIDTHS:
        found = {}
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for do in held:
                found[do] = itself(__file__, {"do": do, "r": r, "folder": folder})
                held[do].append(found[do]["anon_growth_since_ready"] / MIB)
        if found["save"]["print"] != found["load"]["print"]:
            raise SystemExit(f"r {r}: what was loaded is not what was saved")
        rows.append({
            "pairs a layer": r, "adapter, GiB": found["save"]["size"] / GIB, "files": found["save"]["files"],
            **{f"{do}: growth, MiB": held[do][-1] for do in held},
            **{f"{do}: process, MiB": found[do]["anon_peak"] / MIB for do in held},
            **{f"{do}: s": found[do]["seconds"] for do in held},
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    summary = {
        "save_peak_mib": max(held["save"]), "load_peak_mib": max(held["load"]),
        "widest_adapter_gib": rows[-1]["adapter, GiB"],
    }  # fmt: skip
    conclude(
        "meft_files", args, summary, TARGETS, title="Saving and loading a large adapter", claim=CLAIM, rows=rows,
        notes=NOTES,
    )  # fmt: skip


CLAIM = (
    "Saving and loading a MEFT adapter takes no more than 256 MiB of anonymous memory above the model, whatever the "
    "adapter's size (SmolLM2-135M, tables in files)."
)
NOTES = [
    "Growth of anonymous memory, read from outside, from when the model is loaded; to save: with initialised tables.",
    "Loading makes the tables, initialises them, and copies the file's rows into them while it compares checksums.",
    "Other work ran on the machine: memory does not depend on it, but the seconds do, so they support no claim.",
]


if __name__ == "__main__":
    main()
