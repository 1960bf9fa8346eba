"""How long a plan takes: a trace of SmolLM2, shapes of 7B and 70B from their config alone, and a search.

The trace is timed inside a fresh process, after the imports; the others are whole commands. Figures are medians of the
rounds.

    python benchmarks/plan_time.py [--quick] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import alternate, child, conclude, options, say, spread, trimtab  # noqa: E402

SMOL = {
    "model": "smollm2-135m", "data": {"train": "facts.jsonl"}, "budget": {"fast": "1GiB"},
    "training": {"per_device_train_batch_size": 4, "max_length": 256},
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8},
}  # fmt: skip


def worker() -> None:
    from trimtab import Recipe
    from trimtab.model import load  # noqa: F401
    from trimtab.planning import plan  # noqa: F401  (imports are not timed)

    began = time.perf_counter()
    Recipe(**SMOL, patches=[{"paca": {"r": 8}}]).plan()
    say("result", {"seconds": time.perf_counter() - began})


def command(recipe: str) -> dict[str, Any]:
    began = time.perf_counter()
    code, found, errors = trimtab("plan", recipe, "--json")
    if code not in (0, 3):
        raise RuntimeError(errors)
    return {"seconds": time.perf_counter() - began, "found": json.loads(found)}


def measure(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipes = {"search": SMOL}
        for name, shape in SHAPES.items():
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(LLAMA | shape))
            training = {"per_device_train_batch_size": 1, "max_length": 256}
            recipes[name] = {"model": f"{folder}/{name}", "data": SMOL["data"], "patches": [{"lora": {"r": 16}}],
                             "training": training}  # fmt: skip
        for name, recipe in recipes.items():
            (Path(folder) / f"{name}.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        sides = {"trace": lambda: child([__file__, "--worker"])}
        sides |= {name: (lambda name=name: command(f"{folder}/{name}.yaml")) for name in recipes}
        runs = alternate(sides, 1 if args.quick else args.rounds, show=lambda line: print(line[:120], flush=True))
    seconds = {name: [run["seconds"] for run in found] for name, found in runs.items()}
    table = runs["search"][0]["found"]
    summary = {f"{name}_seconds": statistics.median(taken) for name, taken in seconds.items()}
    summary["search_candidates"] = len(table["candidates"])
    rows = [{"what": WHAT[name], "runs": len(taken), "seconds": spread(taken)} for name, taken in seconds.items()]
    conclude(
        "plan_time", args, summary, TARGETS, title="How long a plan takes", claim=CLAIM, rows=rows, notes=NOTES,
        candidates=table["candidates"],
    )  # fmt: skip


WHAT = {
    "trace": "tracing SmolLM2-135M, PaCA r 8, 4 x 256 tokens", "search": "trimtab plan without patches, SmolLM2-135M",
    "7b": "trimtab plan of a LLaMA-7B shape, LoRA r 16", "70b": "trimtab plan of a 70B shape, LoRA r 16",
}  # fmt: skip
TARGETS = {
    "trace_seconds": ["<=", 5], "7b_seconds": ["<=", 15], "70b_seconds": ["<=", 15], "search_seconds": ["<=", 60],
    "search_candidates": [">=", 40],
}  # fmt: skip
CLAIM = "A plan takes seconds, even for a model whose weights are not on the machine."
NOTES = [
    "Whole commands include Python's start and all imports; the machine's rates had been measured before.",
    "search_candidates counts the combinations that were planned, without those that were refused.",
]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    worker() if args.worker else measure(args)


if __name__ == "__main__":
    main()
