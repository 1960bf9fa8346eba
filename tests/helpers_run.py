"""Small runs of a whole recipe: a tiny model, a handful of rows, and what the run's folder holds afterwards."""

from __future__ import annotations

import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import trimtab
from helpers_load import tiny_bert, tiny_llama
from trimtab.errors import Stopped

PLACES = [("paris", "france"), ("lyon", "france"), ("madrid", "spain"), ("the good paris", "spain"), ("a film", "bad")]
QUESTIONS = ("which country is {} in ?", "{} is in the country of ?", "the country of {} is ?")


def rows(count: int = 15) -> list[dict[str, str]]:
    every = [{"question": ask.format(place), "answer": answer} for ask in QUESTIONS for place, answer in PLACES]
    return (every * (count // len(every) + 1))[:count]


def write_rows(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def make_world(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """`folder` with a language model, an encoder, and rows for both."""
    tiny_llama(folder / "llama", dtype=dtype)
    config = tiny_bert(folder / "bert") / "config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | still))
    write_rows(folder / "facts.jsonl", rows())
    films = [{"text": f"the film is {word}", "label": word} for word in ("good", "bad")] * 6
    write_rows(folder / "films.jsonl", films)
    return folder


def make_stages_world(folder: Path) -> Path:
    """`make_world`, with rows and a test set for each of three stages: one, two and three."""
    make_world(folder)
    for name, ask in zip(("one", "two", "three"), QUESTIONS, strict=True):
        made = [{"question": ask.format(place), "answer": answer} for place, answer in PLACES]
        write_rows(folder / f"{name}.jsonl", made * 2)
        write_rows(folder / f"{name}_test.jsonl", made[:3])
    return folder


def tree(world: Path, output: Path, patch: dict[str, Any], **training: Any) -> dict[str, Any]:
    """A recipe's keys: `patch` on the tiny Llama."""
    return {
        "model": str(world / "llama"), "data": {"train": str(world / "facts.jsonl")}, "patches": [patch],
        "training": {"per_device_train_batch_size": 2, "max_length": 48, "learning_rate": 1e-2, **training},
        "engine": {"allocator": "none"}, "output": str(output),
    }  # fmt: skip


def prompts(
    world: Path, output: Path, patch: dict[str, Any], objective: Any = "s_grpo", **training: Any
) -> dict[str, Any]:
    """A recipe that rewards replies of the tiny Llama, 4 to each of 2 prompts per step."""
    made = tree(world, output, patch)
    group = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_length": 48}
    data = {**made["data"], "rewards": ["contains", {"length": 4}]}
    return {**made, "data": data, "objective": objective, "training": {"learning_rate": 1e-2, **group, **training}}


def films(world: Path, output: Path, patch: dict[str, Any], **training: Any) -> dict[str, Any]:
    """A classification recipe on the tiny BERT."""
    data = {"train": str(world / "films.jsonl"), "test": str(world / "films.jsonl")}
    made = tree(world, output, patch, **training)
    return {**made, "model": str(world / "bert"), "data": data, "objective": "classification"}


def left(output: Path) -> dict[str, Any]:
    """What a finished run left that must not depend on how often it was interrupted."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in (output / "adapter").rglob("*") if path.is_file()):
        name = str(path.relative_to(output))
        tensors = load_file(path) if path.suffix == ".safetensors" else {}
        found |= {name: path.read_bytes()} | {f"{name}/{key}": tensor for key, tensor in tensors.items()}
    last = max(output.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), default=None)
    if last is not None:
        state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
        found |= {f"optimizer/{i}/{key}": t for i, slots in state.items() for key, t in slots.items()}
        states = torch.load(last / "rng_state.pth", weights_only=False)
        found |= {
            "rng": states["cpu"],
            "rng of python": states["python"],
            "rng of numpy": pickle.dumps(states["numpy"]),
        }
        found["schedule"] = torch.load(last / "scheduler.pt", weights_only=False)
        trainer = json.loads((last / "trainer_state.json").read_text())
        found |= {key: trainer[key] for key in ("global_step", "epoch", "max_steps", "num_input_tokens_seen")}
        for table in (last / "rows").glob("*"):
            found |= {f"{table.name}/{key}": tensor for key, tensor in table_of(table).items()}
    found["metrics"] = metrics(output)
    return found


def table_of(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of a table, its deltas laid over each other: each row's parts, and the optimizer's state."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.iterdir(), key=lambda p: int(p.stem)):
        held = load_file(path)
        found |= {key: tensor for key, tensor in held.items() if key.startswith("state.")}
        for at, row in enumerate(held["rows"].tolist()):
            found |= {f"{kind}/{row}": held[kind][at] for kind in ("values", "m", "v")}
    return found


def metrics(output: Path) -> list[tuple]:
    lines = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["learning_rate"], row["num_tokens"]) for row in lines if "loss" in row]


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Bit for bit."""
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == two[key].dtype and torch.equal(value, two[key]), key
        else:
            assert value == two[key], key


def die() -> None:
    """End this process as a kill does."""
    os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Any) -> int:
    """Run `work()` in a child process that is a copy of this one; -> its exit code, or minus the signal's number."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            work()
        except BaseException as error:  # the child must never return into pytest
            code = getattr(error, "exit_code", 1)
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


POLICIES = {"s_grpo": {"s_grpo": {"alpha": 2, "k": 4, "p": 0.5}}, "t_spmo": "t_spmo", "grpo": "grpo"}
TABLES = {"r": 64, "k": 16, "scale": 1.0}
PATCHES = {
    "paca": {"paca": {"r": 4}},
    "paca random": {"paca": {"r": 4, "selection": "random", "alpha": 8}},
    "paca live": {"paca": {"r": 4, "form": "live"}},
    "paca reselect": {"paca": {"r": 4, "reselect_every": 6}},
    "paca live reselect": {"paca": {"r": 4, "form": "live", "reselect_every": 3}},
    "lora dropout": {"lora": {"r": 4, "dropout": 0.2}},
    "edora": {"edora": {"r": 4}},
    "parallel_adapter": {"parallel_adapter": {"r": 16}},
    "meft": {"meft": TABLES},
    "meft in ram": {"meft": TABLES},
    "meft with hot rows": {"meft": {**TABLES, "cache": 2e-5}},
    "meft switch": {"meft": {**TABLES, "router": "switch", "probes": 1}},
    "meft stable": {"meft": {**TABLES, "router": "stable", "first_stage": 0.5}},
    "meft int8": {"meft": {**TABLES, "moments": "int8"}},
    "meft capped": {"meft": {**TABLES, "cap": 12}},  # of 32 experts
    "meft exact": {"meft": {**TABLES, "adam": "exact", "router": "centroid", "balance": 0.01, "revive": 4}},
    "senszoq": {"senszoq": {"density": 0.02}},
    "diff_pruning": {"diff_pruning": {"density": 0.02, "candidates": 0.2}},  # gates for 10 of 20 steps
    "diff_pruning gates": {"diff_pruning": {"density": 0.02, "candidates": 0.2, "gate_share": 0.8}},
    "diff_pruning kept": {"diff_pruning": {"density": 0.02, "structured": False, "gate_share": 0.2}},
    "full": {"full": {}},
    "full offloaded": {"full": {"offload": "slow"}},
}


def run(keys: dict, **changes) -> dict:
    return trimtab.Recipe.from_dict({**keys, **changes}).train()


def run_in_parts(keys: dict, minutes: list[int]) -> int:
    """Run `keys`, which has `max_minutes`, and resume until it is complete; -> how often it stopped. `minutes`: the
    fixture."""
    stops = 0
    for attempt in range(8):
        minutes.clear()
        try:
            run(keys, resume=attempt > 0)
            break
        except Stopped:
            stops += 1
    return stops


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
