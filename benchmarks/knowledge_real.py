"""SmolLM2-135M and real facts, for benchmarks/knowledge.py: in which country a city is (trimtab's demo).

Cities are from GeoNames. Learning rates are chosen on other cities, asked in one of the training wordings, which is
then not trained on; the reported figures use the demo's own unseen wording.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from fast_memory import Rows, fast_bytes, kept
from trimtab import Recipe, methods
from trimtab.contracts import Place
from trimtab.data.demo import TEST_TEMPLATE, TRAIN_TEMPLATES, choose_cities
from trimtab.model.load import load_model
from trimtab.model.spec import ModelSpec

MODEL = "smollm2-135m"
RANKS, LESSER = range(1_000, 25_000), range(25_000, 31_000)  # cities by population: asked, and for the learning rates
BATCH, LENGTH = 16, 64


def rows(facts: int, seed: int, apart: bool) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """-> rows to train on, rows to ask: of `facts` facts."""
    chosen = choose_cities(facts, seed, LESSER if apart else RANKS)
    wordings, asked = (TRAIN_TEMPLATES[:-1], TRAIN_TEMPLATES[-1]) if apart else (TRAIN_TEMPLATES, TEST_TEMPLATE)
    told = [{"question": w.format(city=city), "answer": country} for city, country in chosen for w in wordings]
    return told, [{"question": asked.format(city=city), "answer": country} for city, country in chosen]


def recipe(job: dict[str, Any], folder: str) -> Recipe:
    paths = [f"{folder}/train.jsonl.gz", f"{folder}/test.jsonl.gz"]
    for path, part in zip(paths, rows(job["facts"], job["seed"], job["apart"]), strict=True):
        Path(path).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in part).encode()))
    return Recipe(
        model=MODEL, data={"train": paths[0], "test": paths[1], "chat": False}, output=f"{folder}/run",
        patches=[{job["patch"]: job["fields"]}], place={"slow": "disk", "folder": folder},
        training={"max_steps": job["steps"], "per_device_train_batch_size": BATCH, "max_length": LENGTH,
                  "learning_rate": job["rate"], "warmup_steps": 10, "seed": job["seed"],
                  "bf16": job["patch"] == "full"},
    )  # fmt: skip


def activations(model: Any, ids: torch.Tensor) -> int:
    return kept(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def counted(patch: str, fields: dict[str, Any], at_work: int = 0) -> dict[str, int]:
    """Fast memory of one training by kind; a micro-batch is BATCH rows of 20 tokens."""
    model, _ = load_model(ModelSpec(MODEL), task="causal-lm")
    ids = torch.randint(1000, (BATCH, 20), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    model.enable_input_require_grads()
    frozen = activations(model, ids)
    model.disable_input_require_grads()
    surgery = methods.find(patch)(**fields).apply(model, Place(fast="cpu", slow="disk"))
    return fast_bytes(surgery, at_work, activations(model, ids) - frozen)


def fit(job: dict[str, Any]) -> dict[str, Any]:
    """The least r of which the fast memory is the budget's or more, by that of two ranks."""
    one, two = (sum(counted(job["patch"], {**job["fields"], "r": r}).values()) for r in (4, 8))
    r = max(1, -(-(job["budget"] - one) * 4 // (two - one)) + 4)
    return {"r": r, "fast": sum(counted(job["patch"], {**job["fields"], "r": r}).values())}


def learn(job: dict[str, Any]) -> dict[str, Any]:
    """Train by trimtab's own verb, then ask."""
    with tempfile.TemporaryDirectory(dir=job["work"]) as folder:
        told = recipe(job, folder)
        before = told.evaluate(base_only=True, limit=job["asked"])["metrics"] if job.get("base") else {}
        with Rows() as at_work:
            run = told.train()
        after = told.evaluate(limit=job["asked"])["metrics"]
    held = counted(job["patch"], job["fields"], at_work.most)
    return {
        "recall": after["exact_match"], "contains": after["contains"], "loss": after["loss"],
        **{f"base_{key}": value for key, value in before.items()}, "bytes": held, "fast": sum(held.values()),
        "growth": run["measured"]["fast_growth_bytes"], "slow": run["measured"].get("store_slow_bytes", 0),
        "parameters": run["trainable_parameters"], "seconds": run["measured"]["seconds"],
        "moved": sum(run["measured"].get(f"store_{way}_bytes_per_step", 0) for way in ("up", "down")),
    }  # fmt: skip
