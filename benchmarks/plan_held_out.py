"""Predicted beside measured on configurations that no constant of the planner was chosen on.

These are model families that plan_accuracy does not have, at shapes whose growth exceeds 200 MiB, and SmolLM2 on texts
of many lengths, packed and not. They are measured as in plan_accuracy.

    python benchmarks/plan_held_out.py [--quick] [--rounds 1] [--only WORD] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import alternate, conclude, options  # noqa: E402
from planned_runs import AGAIN, LORA, PACA, SMOL, case, name_of, row_of, run, write_data  # noqa: E402

SIZES = {"vocab_size": 49152, "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 8,
         "num_attention_heads": 10, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 2}  # fmt: skip
GROUPS = {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma2": {**GROUPS, "head_dim": 64}, "GPTNeoX": {}, "Phi": GROUPS, "Olmo2": GROUPS, "StableLm": GROUPS,
    "Mixtral": {**GROUPS, "num_local_experts": 4, "num_hidden_layers": 4, "tie_word_embeddings": True},
    "Bloom": {"n_head": 10, "n_layer": 8}, "Falcon": {"new_decoder_architecture": False, "multi_query": True},
}  # fmt: skip
LENGTHS = {"text": "lengths.jsonl"}
BFD = {"packing_strategy": "bfd"}
CASES = [
    case("Gemma2", PACA, 4, 256), case("GPTNeoX", LORA, 4, 256), case("Phi", PACA, 8, 512, **AGAIN),
    case("Olmo2", LORA, 8, 128), case("Bloom", LORA, 4, 256), case("Falcon", PACA, 4, 256),
    case("StableLm", PACA, 4, 512), case("Mixtral", PACA, 8, 256), case("Mixtral", LORA, 8, 512, **AGAIN),
    {**case(SMOL, PACA, 2, 256, gradient_accumulation_steps=3, **BFD), **LENGTHS},
    {**case(SMOL, LORA, 1, 700, **AGAIN, **BFD), **LENGTHS},
    {**case(SMOL, PACA, 4, 256, packing=False), **LENGTHS},
]  # fmt: skip
QUICK = (0, 7)


def titled(job: dict[str, Any]) -> str:
    if "text" not in job:
        return name_of(job)
    return name_of(job) + ", many lengths" + (", packed" if job["training"].get("packing", True) else "")


def write_lengths(folder: Path) -> None:
    """Texts of 30 to 240 words, about as many tokens."""
    draw = random.Random(1)
    words = "river stone winter market garden letter silver window harbour forest engine winding".split()
    rows = [{"text": " ".join(draw.choices(words, k=draw.randint(30, 240)))} for _ in range(200)]
    (folder / "lengths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_models(folder: Path, names: set[str]) -> None:
    """Random weights in bf16 with SmolLM2's tokenizer: memory does not see the values."""
    import torch
    import transformers

    from trimtab.model.load import cached_folder

    tokenizer = transformers.AutoTokenizer.from_pretrained(cached_folder(SMOL))
    for name in sorted(names & FAMILIES.keys()):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[name]})
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def measure(args: argparse.Namespace) -> None:
    jobs = [CASES[i] for i in QUICK] if args.quick else [job for job in CASES if args.only in titled(job)]
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        write_lengths(Path(folder))
        write_models(Path(folder), {job["model"] for job in jobs})
        turns = {titled(job): (lambda job=job: run({**job, "folder": folder})) for job in jobs}
        runs = alternate(turns, 1 if args.quick else args.rounds, show=lambda line: print(line, flush=True))
    rows = [row_of(name, of) for name, of in runs.items()]
    summary: dict[str, float] = {"held_out_rows": len(rows)}
    for kind, title in (("live", "live"), ("process", "process"), ("peak", "peak")):
        sizes = [abs(row["errors"][kind]) for row in rows]
        summary |= {f"held_out_{title}_median_error": statistics.median(sizes),
                    f"held_out_{title}_worst_error": max(sizes)}  # fmt: skip
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items() if key != "errors"), flush=True)
        del row["errors"]
    args.quick = args.quick or bool(args.only)
    conclude(
        "plan_held_out", args, summary, TARGETS, title="The plan on configurations used for none of its constants",
        claim=CLAIM, rows=rows, notes=NOTES,
    )  # fmt: skip


TARGETS = {
    "held_out_rows": [">=", 12], "held_out_process_median_error": ["<=", 0.05],
    "held_out_process_worst_error": ["<=", 0.10],
}  # fmt: skip
CLAIM = "The plan is right for models and rows on which no constant was chosen. Each pair is predicted / measured."
NOTES = [
    "live, growth, process error, peak: as in plan_accuracy.",
    "Many lengths: texts of 30 to 240 words; batches are padded to multiples of 16 tokens.",
    "The speed of the same runs is shown, but no claim is made about it.",
]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=1)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
