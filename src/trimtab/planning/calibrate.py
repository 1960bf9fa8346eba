"""Train a small model of random weights, each time in a fresh process: what does it hold beside its tensors?

`trimtab doctor` calls it once for a machine (cost/overhead.py says what is kept). The runs are whole ones, through
the same verb as a user's, under the malloc that this process runs under.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cost.overhead import CHURN, Overhead
from ..subprocess_call import apart

TOKENS, STEPS = 256, 5


@dataclass(frozen=True)
class Training:
    """One of those that are measured, by what trains: a patch, rows of a batch, activations kept or recomputed."""

    patch: str
    rows: int
    checkpointing: bool = False

    @property
    def cast(self) -> bool:
        return self.patch == "full"  # fp32 copies of a bf16 base: under autocast


SOME = (Training("lora", 1), Training("lora", 4, True), Training("paca", 4), Training("lora", 10))
ALL = (*SOME, *SOME, Training("full", 4), *SOME, *SOME)  # what the same one holds scatters by up to a third
QUICK = SOME[2]
PACED = 4  # rows from which a training says how fast steps are


def measure(thorough: bool = True, say: Callable[[str], None] = lambda line: None) -> Overhead:
    """Less than five minutes, in processes one after the other; where one fails, what is not measured.

    Not `thorough`: from one training, in some ten seconds. `say` gets a line before each.
    """
    points: dict[Training, list[tuple[int, int]]] = {}
    processes, paces = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, training in enumerate(every := ALL if thorough else (QUICK,)):
            say(f"a small training, {number + 1} of {len(every)} ...")
            told = asdict(training), f"{folder}/{number}"
            try:
                found = apart(_run_here, *told, TRIMTAB_ALLOCATOR="none", HF_HUB_OFFLINE="1")
            except RuntimeError:
                return Overhead()
            points.setdefault(training, []).append((round(found["tensors"]), round(found["held"])))
            processes.append(round(found["process"]))
            if training.rows >= PACED and found["expected"]:
                paces.append(found["speed"] / found["expected"])
    pace = statistics.median(paces) if paces else Overhead.pace
    if not thorough:
        return Overhead.by_one(processes[0], *points[QUICK][0], pace)
    plain, under_cast = ([_least(of) for t, of in points.items() if t.cast is cast] for cast in (False, True))
    return Overhead.through(max(processes), plain, under_cast, pace)


def _least(points: list[tuple[int, int]]) -> tuple[int, int]:
    """Of the same training, that which held least: one in four held a third more, by when its malloc gave back what."""
    return min(points, key=lambda point: point[1])


def _run_here(training: dict[str, Any], folder: str) -> dict[str, float]:
    return run(Training(**training), Path(folder))


def run(training: Training, folder: Path) -> dict[str, float]:
    """One training; -> bytes: `process` when it begins, growth of its `tensors`, growth that was `held` without the
    CHURN in it; and its tokens/s (`speed`) beside what the rates of single operations let expect."""
    from ..recipe import Recipe

    folder.mkdir(parents=True, exist_ok=True)
    _make(folder)
    made = Recipe(
        model=str(folder / "model"),
        data={"train": str(folder / "text.jsonl")},
        patches=[{training.patch: {} if training.cast else {"r": 8}}],
        training={
            "max_steps": STEPS, "per_device_train_batch_size": training.rows, "max_length": TOKENS, "packing": True,
            "packing_strategy": "wrapped", "save_strategy": "no", "activation_checkpointing": training.checkpointing,
        },
        output=str(folder / "run"),
    ).train()  # fmt: skip
    predicted, measured = made["predicted"], made["measured"]
    return {"process": predicted["process_bytes"], "tensors": predicted["live_growth_bytes"],
            "held": measured["fast_growth_bytes"] - CHURN * predicted["churn_bytes"],
            "speed": measured["tokens_per_second"],
            "expected": (predicted["tokens_per_second"] or 0) / predicted["pace"]}  # fmt: skip


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
