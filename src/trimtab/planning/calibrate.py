"""Rates of this machine and the overhead of a process, measured once and cached for plans.

The overhead is measured with small models of random weights, each trained in a new process by `Recipe.train`, under the
malloc of this process.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..cost import overhead, rates
from ..cost.machine import machine
from ..cost.overhead import TRANSIENT_SHARE, Overhead
from ..cost.rates import Rates
from ..model.hub import cache_root
from ..process.call import subprocess_call
from ..quiet import silence_libraries

TOKENS, STEPS = 256, 5


@dataclass(frozen=True)
class Training:
    """One measured training: its patch, the rows of a batch, and whether activations are recomputed."""

    patch: str
    rows: int
    checkpointing: bool = False

    @property
    def autocast(self) -> bool:
        return self.patch == "full"  # fp32 copies of a bf16 base


SOME = (Training("lora", 1), Training("lora", 4, True), Training("paca", 4), Training("lora", 10))
ALL = (*SOME, *SOME, Training("full", 4), *SOME, *SOME)  # repeated, since repeats differ by up to a third
QUICK = SOME[2]
TIMED = 4  # the speed counts for trainings with at least so many rows


def calibrate(
    fresh: bool = False, thorough: bool = False, say: Callable[[str], None] = lambda line: None
) -> tuple[Rates, Overhead, bool]:
    """-> (the rates of this machine, the overhead of a process on it, whether the rates were cached).

    Measures what is not cached: in about 20 seconds, or if `thorough` in about five minutes, with more trainings. A
    thorough measurement replaces a quick one, and is never replaced by one. `fresh`: measures again, as thoroughly as
    before. `say` receives a line for each part.
    """
    cached, known = known_rates(), known_overhead()
    thorough = thorough or (fresh and known.measured and not known.quick)
    train = fresh or not known.measured or (thorough and known.quick)
    if fresh or cached is None or train:
        say(f"Measuring this machine, once: about {'five minutes' if thorough else '20 seconds'} if nothing else runs")
    if fresh or cached is None:
        say("  matrix products, memory, disk ...")
    found = measured_rates(fresh=fresh)
    if train:
        known = measure_overhead(thorough, lambda line: say(f"  {line}"))
        if known.measured:
            overhead.save(known, _key("cpu"), cache_root())
    return found, known, cached is not None and not fresh


def known_rates(device: str = "auto") -> Rates | None:
    """The rates of "cpu" or "cuda" under the allocator and threads of this process, if they were measured before."""
    return rates.load(_key(device), cache_root())


def known_overhead() -> Overhead:
    """The memory that a training process uses beside its tensors on this machine's CPU; a default if not measured."""
    return overhead.load(_key("cpu"), cache_root())


def measured_rates(device: str = "auto", fresh: bool = False) -> Rates:
    """The cached rates, or those measured (and cached) now. The disk is that of the cache folder."""
    if not fresh and (known := known_rates(device)) is not None:
        return known
    found = Rates(**subprocess_call(_measure_rates, _key(device)))
    rates.save(found, cache_root())
    return found


def _measure_rates(machine: dict[str, Any]) -> dict[str, Any]:
    """Runs in a subprocess: memory that its allocator keeps would count against the budget of the caller's run."""
    import torch

    from ..cost.microbench import measure

    torch.set_num_threads(machine["threads"])
    with silence_libraries():
        return asdict(measure(machine, cache_root()))


def _key(device: str) -> dict[str, Any]:
    import torch

    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return rates.key(machine(), version("torch"), auto if device == "auto" else device)


def measure_overhead(thorough: bool = True, say: Callable[[str], None] = lambda line: None) -> Overhead:
    """Measures the overhead in less than five minutes, one process at a time; -> the default if a training fails.

    Not `thorough`: from one training, in about ten seconds. `say` receives a line before each training.
    """
    points: dict[Training, list[tuple[int, int]]] = {}
    processes, efficiencies = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, training in enumerate(every := ALL if thorough else (QUICK,)):
            say(f"a small training, {number + 1} of {len(every)} ...")
            try:
                found = subprocess_call(
                    _run_here, asdict(training), f"{folder}/{number}", TRIMTAB_ALLOCATOR="none", HF_HUB_OFFLINE="1"
                )
            except RuntimeError:
                return Overhead()
            points.setdefault(training, []).append((round(found["tensors"]), round(found["growth"])))
            processes.append(round(found["process"]))
            if training.rows >= TIMED and found["expected"]:
                efficiencies.append(found["speed"] / found["expected"])
    efficiency = statistics.median(efficiencies) if efficiencies else Overhead.efficiency
    if not thorough:
        return Overhead.by_one(processes[0], *points[QUICK][0], efficiency)
    plain, autocast = ([_least(of) for t, of in points.items() if t.autocast is on] for on in (False, True))
    return Overhead.through(max(processes), plain, autocast, efficiency)


def _least(points: list[tuple[int, int]]) -> tuple[int, int]:
    """The repeat with the smallest growth: one in four used a third more, depending on when malloc returned memory."""
    return min(points, key=lambda point: point[1])


def _run_here(training: dict[str, Any], folder: str) -> dict[str, float]:
    return run(Training(**training), Path(folder))


def run(training: Training, folder: Path) -> dict[str, float]:
    """Runs one training; -> bytes: `process` at its start, growth of its `tensors`, `growth` of the process without the
    share of the backward transient; and tokens/s: `speed`, and `expected` from the rates of single operations."""
    from ..recipe import Recipe

    folder.mkdir(parents=True, exist_ok=True)
    _make(folder)
    made = Recipe(
        model=str(folder / "model"),
        data={"train": str(folder / "text.jsonl")},
        patches=[{training.patch: {} if training.autocast else {"r": 8}}],
        training={
            "max_steps": STEPS, "per_device_train_batch_size": training.rows, "max_length": TOKENS, "packing": True,
            "packing_strategy": "wrapped", "save_strategy": "no", "activation_checkpointing": training.checkpointing,
        },
        output=str(folder / "run"),
    ).train()  # fmt: skip
    predicted, measured = made["predicted"], made["measured"]
    return {"process": predicted["process_bytes"], "tensors": predicted["live_growth_bytes"],
            "growth": measured["fast_growth_bytes"] - TRANSIENT_SHARE * predicted["backward_transient_bytes"],
            "speed": measured["tokens_per_second"],
            "expected": (predicted["tokens_per_second"] or 0) / predicted["efficiency"]}  # fmt: skip


def _make(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "tree", "lake", "hill"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    row: dict[str, Any] = {"text": "tree lake hill " * (TOKENS // 3)}
    (folder / "text.jsonl").write_text(
        (json.dumps(row) + "\n") * max(t.rows for t in ALL) * (STEPS + 2), encoding="utf-8"
    )
