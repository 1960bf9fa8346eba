"""A model of LLaMA-7B's shape with a MEFT adapter of 10 % trains on a machine without a GPU, inside a budget of 6 GiB.

Weights are random bf16, mapped from safetensors files; the text has one word per token id, so that hidden states differ
as words do. The adapter's table is in a file. One process trains with the code of `trimtab train` under
`budget: {fast: 6GiB}`; its anonymous memory is read from outside. Some 28 GiB of disk are used and freed.

    python benchmarks/seven_b.py [--quick] [--folder FOLDER] [--steps 4] [--json FILE]
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import Clock, conclude, follow, itself, options, say, table_arguments  # noqa: E402

GIB, BUDGET, TOKENS, PAIRS = 2**30, "6GiB", 256, 3200
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


def shape(blocks: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip


def write_model(folder: Path, blocks: int) -> None:
    """A shard for each block, made one after the other: nothing of the whole is ever in memory."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    config = shape(blocks)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    draw, index = torch.Generator().manual_seed(0), {}
    kinds = sorted({name.rpartition(".layers.")[2].partition(".")[0] if ".layers." in name else "" for name in shapes})
    for number, kind in enumerate(kinds):
        names = [n for n in shapes if (f".layers.{kind}." in n if kind else ".layers." not in n)]
        file = f"model-{number + 1:05}-of-{len(kinds):05}.safetensors"
        drawn = lambda n: torch.empty(shapes[n], dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)  # noqa: E731
        tensors = {n: torch.ones(shapes[n], dtype=torch.bfloat16) if "norm" in n else drawn(n) for n in names}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    size = sum(2 * s.numel() for s in shapes.values())
    told = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 32000))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<unk>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_text(path: Path, rows: int) -> None:
    """Rows longer than a block, words drawn as words are: the n-th most frequent one with a weight of 1 / n."""
    draw = random.Random(0)
    words, weights = [f"w{i}" for i in range(3, 32000)], [1 / (i + 1) for i in range(31997)]
    texts = (" ".join(draw.choices(words, weights, k=TOKENS)) for _ in range(rows))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


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
