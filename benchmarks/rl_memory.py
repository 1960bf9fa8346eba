"""Memory and time of a policy-gradient update: trimtab's GRPO, S-GRPO and T-SPMO against TRL's GRPOTrainer.

SmolLM2-135M, bf16 base, LoRA r 8 on all linears, 8 replies of up to 256 tokens to a prompt, AdamW. The replies are
sampled once and are then the same for all sides, with the same rewards, so that the update is what is compared; what
the rollouts cost is measured apart, each side sampling for itself. TRL runs without activation checkpointing, as
trimtab does. On a CPU TRL scores every position, prompts and padding too; the side "compact" scores the completions
only, by chunks of 2,048 positions, which is what TRL does on a GPU.

    python benchmarks/rl_memory.py [--quick] [--rounds 2] [--no-rollouts] [--json FILE]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import alternate, arguments, conclude, itself, options, ratios, say, spread  # noqa: E402

GIB = 2**30
G = 8
QUESTION = "A farmer has 43 hens and buys 19 more. A fox takes 7 of them. How many hens are left? Explain each step."
TRL, COMPACT = "TRL", "TRL, compact, chunks of 2,048"
SIDES = {TRL: {}, COMPACT: {}, "GRPO": "grpo", "S-GRPO": {"s_grpo": {}}, "T-SPMO": "t_spmo"}
REWARD = """
def earned(completions, **columns):
    return [float(at % 3 == 0) + 0.1 * at for at in range(len(completions))]
"""


def fields(job: dict[str, Any]) -> dict[str, Any]:
    """The fields of GRPOConfig that all sides have."""
    return {
        "max_steps": job["steps"], "num_generations": G, "per_device_train_batch_size": G, "learning_rate": 1e-5,
        "max_completion_length": job["length"], "lr_scheduler_type": "constant", "logging_steps": 1, "seed": 0,
        "save_strategy": "no", "report_to": "none", "temperature": 0.8,
    }  # fmt: skip


class Watch:
    """Counts the seconds of rollouts and of whole steps of a trainer's class; replies are `stored` ones if given."""

    def __init__(self, cls: type, stored: list[list[int]] | None):
        self.rollouts: list[float] = []
        self.steps: list[float] = []
        sample, step = cls._generate_single_turn, cls.training_step

        def sampled(trainer: Any, ids: Any, *more: Any, **other: Any) -> Any:
            began = time.perf_counter()
            found = (stored, None) if stored is not None else sample(trainer, ids, *more, **other)
            self.rollouts.append(time.perf_counter() - began)
            self.replies = found[0]
            return found

        def stepped(trainer: Any, *more: Any, **other: Any) -> Any:
            began = time.perf_counter()
            value = step(trainer, *more, **other)
            self.steps.append(time.perf_counter() - began)
            return value

        cls._generate_single_turn, cls.training_step = sampled, stepped

    def result(self) -> dict[str, Any]:
        """Medians without the first step, and of ours without the second, which is metered."""
        later = slice(2, None) if len(self.steps) > 2 else slice(-1, None)
        update = [whole - part for whole, part in zip(self.steps, self.rollouts, strict=True)]
        return {
            "update_seconds": statistics.median(update[later]), "step_seconds": statistics.median(self.steps[later]),
            "rollout_seconds": statistics.median(self.rollouts[later]),
        }  # fmt: skip


# --- children --------------------------------------------------------------------------------------------------------


def worker(job: dict[str, Any]) -> None:
    if job["side"] == "gradients":
        say("result", {"gradient_difference": gradient_difference(job["length"])})
    elif job["side"].startswith("TRL"):
        peer(job)
    else:
        ours(job)


def ours(job: dict[str, Any]) -> None:
    from trimtab import Recipe
    from trimtab.engine.rl_trainer import PolicyTrainer
    from trimtab.training.session import Session

    watch, load = Watch(PolicyTrainer, job.get("stored")), Session._model

    def marked(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        say("mark", "train")
        return model

    Session._model = marked
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rewarding.py").write_text(REWARD, encoding="utf-8")
        (Path(folder) / "rows.jsonl").write_text(json.dumps({"question": QUESTION, "answer": "55"}) + "\n")
        run = Recipe(
            model={"name": "smollm2-135m", "precision": "bf16"},
            data={"train": f"{folder}/rows.jsonl", "rewards": [f"{folder}/rewarding.py:earned"]},
            patches=[{"lora": {"r": 8}}], objective=job["objective"],
            training={**fields(job), "max_length": 512}, output=f"{folder}/run",
        ).train()  # fmt: skip
    lengths = sum(map(len, watch.replies))
    say("result", {**watch.result(), "tokens": lengths, "predicted": run["predicted"].get("live_peak_bytes", 0),
                   **({"replies": watch.replies} if job.get("keep") else {})})  # fmt: skip


def peer(job: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils

    from trimtab.model.load import cached_folder

    GRPOTrainer._send_telemetry = lambda self: None
    if job["side"] == COMPACT:
        utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE = (lambda device: True), 2048
    watch, space = Watch(GRPOTrainer, job.get("stored")), {}
    exec(REWARD, space)
    folder = cached_folder("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    say("mark", "train")
    with tempfile.TemporaryDirectory() as out:
        args = GRPOConfig(out, use_cpu=True, disable_tqdm=True, bf16=True, gradient_checkpointing=False, **fields(job))
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        rows = Dataset.from_list([{"prompt": [{"role": "user", "content": QUESTION}]}])
        GRPOTrainer(
            model, reward_funcs=space["earned"], args=args, train_dataset=rows, processing_class=tokenizer,
            peft_config=config,
        ).train()  # fmt: skip
    say("result", {**watch.result(), "tokens": sum(map(len, watch.replies))})


def gradient_difference(length: int) -> float:
    """The largest difference between our gradient and TRL's over all weights, relative to TRL's largest, in fp32, with
    all tokens of 4 random completions."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from trimtab.model.load import cached_folder
    from trimtab.model.logprobs import score_tokens

    model = AutoModelForCausalLM.from_pretrained(cached_folder("smollm2-135m"), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "down_proj" in name)
    ids = torch.randint(0, 49152, (4, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :16] = -100
    slope = torch.randn(4, length - 1, generator=torch.Generator().manual_seed(1)) * (labels[:, 1:] != -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = score_tokens(model, inputs, labels)
    (found.logp * slope[found.rows, found.columns - 1]).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    (model(**inputs, labels=labels, fused_lm_head=True).log_probs * slope).sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return max(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()) for k in theirs)


# --- the benchmark ---------------------------------------------------------------------------------------------------

GROWTH, UPDATE = "anon_growth_since_train", "update_seconds"
TARGETS = {
    "growth_to_trl": ["<=", 0.6], "s_grpo_step_to_trl": ["<=", 0.8], "t_spmo_step_to_trl": ["<=", 0.5],
    "gradient_difference": ["<=", 1e-4],
}  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-rollouts", action="store_true", help="leave out the runs that sample for themselves")
    args = arguments(parser, worker)
    if args is None:
        return
    length, steps = (48, 3) if args.quick else (256, 4)
    base = {"length": length, "steps": steps}
    stored = itself(__file__, {**base, "steps": 1, "side": "sampler", "objective": "grpo", "keep": True})["replies"]
    jobs = {name: {**base, "side": name, "objective": of, "stored": stored} for name, of in SIDES.items()}
    how = {name: (lambda job=job: itself(__file__, job, timeout=1800)) for name, job in jobs.items()}
    runs = alternate(how, 1 if args.quick else args.rounds)
    apart = {}
    if not args.no_rollouts and not args.quick:
        free = {n: {k: v for k, v in jobs[n].items() if k != "stored"} for n in (TRL, "S-GRPO", "T-SPMO")}
        apart = {n: itself(__file__, {**job, "steps": 3}, timeout=1800) for n, job in free.items()}
    exact = itself(__file__, {"side": "gradients", "length": 64})["gradient_difference"]
    median = lambda of, to, key: statistics.median(ratios(runs[of], runs[to], key))  # noqa: E731
    summary = {
        "growth_to_trl": median("S-GRPO", TRL, GROWTH),
        "growth_to_trl_compact": median("S-GRPO", COMPACT, GROWTH),
    }
    for name in ("GRPO", "S-GRPO", "T-SPMO"):
        key = name.lower().replace("-", "_")
        summary[f"{key}_growth_to_trl"] = median(name, TRL, GROWTH)
        summary[f"{key}_growth_to_trl_compact"] = median(name, COMPACT, GROWTH)
        summary[f"{key}_step_to_trl"] = median(name, TRL, UPDATE)
        summary[f"{key}_step_to_trl_compact"] = median(name, COMPACT, UPDATE)
    summary["gradient_difference"] = exact
    rows = [
        {"side": name, "runs": len(found), "growth of anonymous memory, GiB": spread([r[GROWTH] / GIB for r in found]),
         "update, s": spread([r[UPDATE] for r in found])}
        for name, found in runs.items()
    ]  # fmt: skip
    rows += [
        {"side": f"{name}, sampling for itself", "runs": 1, "rollouts, s": f"{found['rollout_seconds']:.3g}",
         "update, s": f"{found[UPDATE]:.3g}", "step, s": f"{found['step_seconds']:.3g}",
         "growth of anonymous memory, GiB": f"{found[GROWTH] / GIB:.3g}", "tokens": found["tokens"]}
        for name, found in apart.items()
    ]  # fmt: skip
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items()))
    counts = f"{len(stored)} replies, {sum(map(len, stored)):,} tokens"
    conclude(
        "rl_memory", args, summary, TARGETS, title="Memory and time of an update by rewards, against TRL", claim=CLAIM,
        rows=rows, notes=[f"The stored replies: {counts}, sampled at temperature 0.8.", *NOTES],
    )  # fmt: skip


CLAIM = (
    "SmolLM2-135M, bf16 base, LoRA r 8 on all linears, 8 replies of up to 256 tokens to a prompt, AdamW, CPU: updates "
    "of trimtab's objectives against TRL's GRPOTrainer, with the same replies and rewards."
)
NOTES = [
    "growth_to_trl, *_step_to_trl: against TRL as it runs on a CPU, where it scores every position. *_compact: "
    "against TRL that scores the completions only, by chunks of 2,048 positions, as it does on a GPU.",
    "A step's update is its time without the rollout; the first step, and ours that is metered, are left out.",
]


if __name__ == "__main__":
    main()
