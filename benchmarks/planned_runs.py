"""Runs whose plan is compared with what they use: configurations, their models and data, and one run in a process."""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import child, say

GIB, STEPS = 2**30, 4
SMOL, QWEN, ENCODER = "smollm2-135m", "qwen2", "minilm-l6"
PACA, LORA, FULL, ADAPTER = {"paca": {"r": 8}}, {"lora": {"r": 8}}, {"full": {}}, {"parallel_adapter": {"r": 1024}}
DORA, MEFT = {"lora": {"r": 8, "dora": True}}, {"meft": {"r": 4096}}
AGAIN = {"activation_checkpointing": True}
OF = {"live": "live", "growth": "process", "peak": "peak", "speed": "speed"}  # what is measured -> whose error it is


def case(model: str, patch: dict, rows: int, tokens: int, precision: str = "auto", **training: Any) -> dict[str, Any]:
    return {"model": model, "patch": patch, "rows": rows, "tokens": tokens, "precision": precision,
            "training": training}  # fmt: skip


def name_of(job: dict[str, Any]) -> str:
    ((patch, fields),) = job["patch"].items()
    patch = "dora" if fields.get("dora") else patch
    more = ["checkpointing"] if job["training"].get("activation_checkpointing") else []
    if (times := job["training"].get("gradient_accumulation_steps", 1)) > 1:
        more.append(f"accumulation {times}")
    precision = [] if job["precision"] == "auto" else [job["precision"]]
    return ", ".join([f"{job['model']} {patch}", f"{job['rows']} x {job['tokens']}", *precision, *more])


def second_family(folder: Path, blocks: int) -> None:
    """Qwen2 of 640 x `blocks` with random weights and SmolLM2's tokenizer: memory and speed do not see the values."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from trimtab.model.load import cached_folder

    config = Qwen2Config(
        vocab_size=49152, hidden_size=640, intermediate_size=2560, num_hidden_layers=blocks, num_attention_heads=10,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(cached_folder(SMOL)).save_pretrained(folder)


def write_data(folder: Path) -> None:
    words = "river stone winter market garden letter silver window harbour forest engine winding".split()
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=1500)) for _ in range(60)]
    rows = [{"text": text} for text in texts]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"text": text[:2400], "label": ("good", "bad")[i % 2]} for i, text in enumerate(texts * 8)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_of(job: dict[str, Any], output: str) -> dict[str, Any]:
    """A recipe's keys."""
    encoder, folder = job["model"] == ENCODER, Path(job["folder"])
    training = {"max_steps": STEPS, "per_device_train_batch_size": job["rows"], "max_length": job["tokens"],
                "learning_rate": 1e-4, "save_strategy": "no", "logging_steps": 1, **job["training"]}  # fmt: skip
    if not encoder:
        training = {"packing": True, "packing_strategy": "wrapped", **training}
    model = str(folder / job["model"]) if (folder / job["model"]).is_dir() else job["model"]
    text = "labels.jsonl" if encoder else job.get("text", "text.jsonl")
    return {
        "model": {"name": model, "precision": job["precision"]},
        "data": {"train": str(folder / text), "too_long": "cut"},
        "patches": [job["patch"]], "objective": "classification" if encoder else "causal_lm", "training": training,
        "output": output,
    }  # fmt: skip


def worker(job: dict[str, Any]) -> None:
    from transformers import Trainer

    from trimtab import Recipe

    train = Trainer.train

    def marked(self, *args, **kwargs):
        say("mark", "train")
        return train(self, *args, **kwargs)

    Trainer.train = marked
    with tempfile.TemporaryDirectory() as out:
        run = Recipe(**recipe_of(job, out + "/run")).train()
    say("result", {"predicted": run["predicted"], "measured": run["measured"]})


def run(job: dict[str, Any]) -> dict[str, list[float]]:
    """-> predicted and measured, by what they are of."""
    found = child([__file__, json.dumps(job)])
    plan, real = found["predicted"], found["measured"]
    return {
        "live": [plan["live_peak_bytes"] / GIB, real["live_peak_bytes"] / GIB],
        "growth": [plan["fast_growth_bytes"] / GIB, found["anon_growth_since_train"] / GIB],
        "peak": [plan["fast_peak_bytes"] / GIB, found["anon_peak"] / GIB],
        "speed": [plan.get("tokens_per_second") or 1.0, real["tokens_per_second"]],
    }


def row_of(name: str, runs: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Medians of the runs, and where there are several how far the growth of the process scatters."""
    middle = {of: [statistics.median(side) for side in zip(*(run[of] for run in runs), strict=True)] for of in OF}
    grown = [run["growth"][1] for run in runs]
    errors = {kind: middle[of][0] / middle[of][1] - 1 for of, kind in OF.items()}
    sizes = {f"{of} GiB": "{:.3f} / {:.3f}".format(*middle[of]) for of in OF if of != "speed"}
    return {
        "configuration": name, **sizes,
        **({"growth, least to most": f"{min(grown):.3f} to {max(grown):.3f}"} if len(runs) > 1 else {}),
        "tokens/s": "{:,.0f} / {:,.0f}".format(*middle["speed"]),
        **{f"{kind} error": f"{value:+.1%}" for kind, value in errors.items()}, "errors": errors,
    }  # fmt: skip


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
