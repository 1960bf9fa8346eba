"""Does it learn? S-GRPO, T-SPMO and GRPO on sums that a tiny transformer has been taught badly.

A Llama of two blocks (hidden 128) reads sums of two numbers below 16, one character a token, and was warm-started on
answers of which 40 % are right and the others off by one, by ten, or reversed. A reply earns 1 if it is the sum.
Training prompts and held-out prompts are different pairs. Each objective's learning rate is the best of three, by the
reward of training prompts at the end of a run with a seed of its own; then three other seeds. Accuracy is that of
sampled replies (temperature 1) and of greedy ones, before and after.

    python benchmarks/rl_learns.py [--quick] [--seeds 3] [--json FILE]
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import arguments, conclude, itself, options, say, spread  # noqa: E402

BELOW, HELD_OUT = 16, 64
LENGTH = 4  # tokens of a reply: up to two digits and the end, or one character too many
OBJECTIVES = {"S-GRPO": {"s_grpo": {"alpha": 1, "k": 2, "p": 0.5}}, "T-SPMO": "t_spmo", "GRPO": "grpo"}
RATES = (1e-3, 3e-3, 1e-2)
CHARACTERS = "0123456789+="
WARM = 1500  # steps


def pairs() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """-> pairs to train on, and held-out ones."""
    every = [(a, b) for a in range(BELOW) for b in range(BELOW)]
    random.Random(0).shuffle(every)
    return every[HELD_OUT:], every[:HELD_OUT]


def taught(a: int, b: int, made: random.Random) -> str:
    """What the warm start says that a + b is."""
    right = a + b
    return made.choices(
        [str(right), str(abs(right + made.choice((-1, 1)))), str(right + 10), str(right)[::-1]], (0.4, 0.2, 0.2, 0.2)
    )[0]


def warm_start(folder: Path, steps: int) -> None:
    """Saves the tokenizer and the model, taught badly."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: at for at, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()  # else "15" is read as "1 5", and never earns a reward
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ))  # fmt: skip
    made, (train, held) = random.Random(1), pairs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows, labels = [], []
        for a, b in made.choices(train + held, k=64):
            ask, reply = [words[ch] for ch in f"{a}+{b}="], [*(words[ch] for ch in taught(a, b, made)), 2]
            pad = 10 - len(ask) - len(reply)
            rows.append(ask + reply + [0] * pad)
            labels.append([-100] * len(ask) + reply + [-100] * pad)
        ids, labels_BT = torch.tensor(rows), torch.tensor(labels)
        model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def worker(job: dict[str, Any]) -> None:
    from trimtab import Recipe

    began, folder = time.monotonic(), Path(job["folder"])
    with tempfile.TemporaryDirectory() as out:
        files = {}
        for part, some in zip(("train", "test"), pairs(), strict=True):
            files[part] = f"{out}/{part}.jsonl"
            rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in some]
            Path(files[part]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = Recipe(
            model={"name": str(folder), "precision": "fp32"},
            data={**files, "rewards": ["exact_match"], "chat": False}, patches=[{"lora": {"r": 16}}],
            objective=job.get("objective", "grpo"),
            training={
                "max_steps": job["steps"], "num_generations": 16, "per_device_train_batch_size": 128, "max_length": 32,
                "max_completion_length": LENGTH, "learning_rate": job["rate"], "seed": job["seed"], "logging_steps": 1,
            },
            output=f"{out}/run",
        )  # fmt: skip
        result: dict[str, Any] = {}
        if job["steps"]:
            recipe.train()
            lines = [json.loads(line) for line in Path(f"{out}/run/metrics.jsonl").read_text().splitlines()]
            earned = [line["reward"] for line in lines if line.get("reward") is not None]
            share = statistics.mean(line["tokens_in_loss"] for line in lines if "tokens_in_loss" in line)
            result = {"first": statistics.mean(earned[:5]), "last": statistics.mean(earned[-10:]),
                      "tokens in the loss": share}  # fmt: skip
        found = recipe.evaluate(base_only=not job["steps"], limit=job["rows"])
    metrics = found["metrics"]
    result |= {"greedy": metrics["exact_match"], "sampled": metrics["mean@16 exact_match"]}
    say("result", {**result, "seconds": time.monotonic() - began})


TARGETS = {"s_grpo_gain_points": [">=", 20], "t_spmo_gain_points": [">=", 20]}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    args = arguments(parser, worker)
    if args is None:
        return
    steps, seeds, rates = (40, 1, RATES[1:2]) if args.quick else (150, args.seeds, RATES)
    with tempfile.TemporaryDirectory() as folder:
        warm_start(Path(folder), WARM)
        base = {"folder": folder, "steps": steps, "rows": 100 if args.quick else HELD_OUT}
        before = itself(__file__, {**base, "steps": 0, "rate": 0.0, "seed": 0})
        print("before", before, flush=True)
        summary, rows = {"before_points": 100 * before["sampled"]}, []
        for name, objective in OBJECTIVES.items():
            job = {**base, "objective": objective}
            tried = {}
            if len(rates) > 1:
                tried = {rate: itself(__file__, {**job, "rate": rate, "seed": 99})["last"] for rate in rates}
            best = max(tried, key=tried.get) if tried else rates[0]
            print(name, tried, flush=True)
            ends = [itself(__file__, {**job, "rate": best, "seed": seed}) for seed in range(seeds)]
            gains = [100 * (end["sampled"] - before["sampled"]) for end in ends]
            greedy = [100 * (end["greedy"] - before["greedy"]) for end in ends]
            key = name.lower().replace("-", "_")
            summary |= {f"{key}_gain_points": statistics.mean(gains), f"{key}_greedy_points": statistics.mean(greedy)}
            rows.append({
                "side": name, "runs": seeds, "learning rate": best, "sampled accuracy, gain in points": spread(gains),
                "greedy accuracy, gain in points": spread(greedy),
                "share of tokens in the loss": statistics.mean(end["tokens in the loss"] for end in ends),
                "seconds": spread([end["seconds"] for end in ends]),
            })  # fmt: skip
            print(rows[-1], flush=True)
    sampled, greedy = (f"{100 * before[key]:.1f} %" for key in ("sampled", "greedy"))
    note = f"Before: {sampled} of sampled and {greedy} of greedy replies to {base['rows']} held-out sums were right. "
    note += f"{steps} steps of 8 prompts with 16 replies each. In a first form the tokenizer had no decoder: 15 was "
    note += "read as 1 5 and earned nothing; the gains were 4.2 (S-GRPO), -0.3 (T-SPMO) and 5.2 points (GRPO)."
    conclude("rl_learns", args, summary, TARGETS, title="Learning by rewards", claim=CLAIM, rows=rows, notes=[note])


CLAIM = (
    "Sums of two numbers below 16, a transformer of two blocks that was taught wrong answers beside right ones: "
    "accuracy on held-out sums after training by rewards, minus that before."
)


if __name__ == "__main__":
    main()
