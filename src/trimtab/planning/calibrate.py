"""What plans know of this machine: its rates and a process's overhead, read from the cache or measured and kept.

The overhead is measured with small models of random weights, each trained in a fresh process through the same verb as a
user's, under the malloc that this process runs under.
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
from ..process.call import apart
from ..quiet import hushed

TOKENS, STEPS = 256, 5


@dataclass(frozen=True)
class Training:
    """One of those that are measured, by what trains: a patch, rows of a batch, activations kept or recomputed."""

    patch: str
    rows: int
    checkpointing: bool = False

    @property
    def autocast(self) -> bool:
        return self.patch == "full"  # fp32 copies of a bf16 base


SOME = (Training("lora", 1), Training("lora", 4, True), Training("paca", 4), Training("lora", 10))
ALL = (*SOME, *SOME, Training("full", 4), *SOME, *SOME)  # repeated, for the same training scatters by up to a third
QUICK = SOME[2]
TIMED = 4  # rows from which on the speed of a training counts


def calibrate(
    fresh: bool = False, thorough: bool = False, say: Callable[[str], None] = lambda line: None
) -> tuple[Rates, Overhead, bool]:
    """The rates of this machine, the overhead of a process on it, and whether the rates were kept from before.

    Measures what is not kept yet: in about 20 seconds, or `thorough`: in about five minutes, with more trainings, which
    replaces a quick measurement and is never replaced by one. `fresh`: measures again, as thoroughly as before. `say`
    receives a line for each part.
    """
    kept, beside = known_rates(), known_overhead()
    thorough = thorough or (fresh and beside.measured and not beside.quick)
    train = fresh or not beside.measured or (thorough and beside.quick)
    if fresh or kept is None or train:
        say(f"Measuring this machine, once: about {'five minutes' if thorough else '20 seconds'} if nothing else runs")
    if fresh or kept is None:
        say("  products, memory, disk ...")
    found = measured_rates(fresh=fresh)
    if train:
        beside = measure_overhead(thorough, lambda line: say(f"  {line}"))
        if beside.measured:
            overhead.save(beside, _key("cpu"), cache_root())
    return found, beside, kept is not None and not fresh


def known_rates(device: str = "auto") -> Rates | None:
    """The rates of "cpu" or "cuda" under the allocator and threads of this process, if they were measured before."""
    return rates.load(_key(device), cache_root())


def known_overhead() -> Overhead:
    """What a training process uses beside its tensors on this machine's CPU, or the default where it is not known."""
    return overhead.load(_key("cpu"), cache_root())


def measured_rates(device: str = "auto", fresh: bool = False) -> Rates:
    """The rates that are kept, or those measured now and kept. The disk is that of the cache folder."""
    if not fresh and (known := known_rates(device)) is not None:
        return known
    found = Rates(**apart(_measure_rates, _key(device)))
    rates.save(found, cache_root())
    return found


def _measure_rates(machine: dict[str, Any]) -> dict[str, Any]:
    """In its own process: what products leave in an allocator would count against the budget of the caller's run."""
    import torch

    from ..cost.microbench import measure

    torch.set_num_threads(machine["threads"])
    with hushed():
        return asdict(measure(machine, cache_root()))


def _key(device: str) -> dict[str, Any]:
    import torch

    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return rates.key(machine(), version("torch"), auto if device == "auto" else device)


def measure_overhead(thorough: bool = True, say: Callable[[str], None] = lambda line: None) -> Overhead:
    """Takes less than five minutes, in one process after the other; returns the default where a training fails.

    Not `thorough`: from one training, in some ten seconds. `say` receives a line before each.
    """
    points: dict[Training, list[tuple[int, int]]] = {}
    processes, efficiencies = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, training in enumerate(every := ALL if thorough else (QUICK,)):
            say(f"a small training, {number + 1} of {len(every)} ...")
            try:
                found = apart(
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
    """The smallest of repeated runs: one in four used a third more, depending on when malloc returned memory."""
    return min(points, key=lambda point: point[1])


def _run_here(training: dict[str, Any], folder: str) -> dict[str, float]:
    return run(Training(**training), Path(folder))


def run(training: Training, folder: Path) -> dict[str, float]:
    """One training. Returns bytes: `process` when it begins, growth of its `tensors`, `growth` of the process without
    the share of the backward transient; and tokens/s: `speed`, and `expected` from the rates of single operations."""
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
