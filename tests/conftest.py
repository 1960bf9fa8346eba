"""Tiny random models, built in memory: one per family, hidden 64, two blocks, 128 words, fp32."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from trimtab import cli

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
GQA = {**SMALL, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ENCODER = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}


def _builder(family: str, head: str, **config: Any) -> Callable[[int], PreTrainedModel]:
    def build(seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = getattr(transformers, family + head)(getattr(transformers, family + "Config")(**config))
        return model.eval()

    return build


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _builder("Llama", "ForCausalLM", **GQA, tie_word_embeddings=True),
    "qwen2": _builder("Qwen2", "ForCausalLM", **GQA),  # biases on q, k and v
    "gemma2": _builder("Gemma2", "ForCausalLM", **GQA, head_dim=16, sliding_window=8),
    "mistral": _builder("Mistral", "ForCausalLM", **GQA, sliding_window=8),
    "bert": _builder("Bert", "ForSequenceClassification", **ENCODER),
    "mpnet": _builder("MPNet", "ForSequenceClassification", **ENCODER),
}

# mixtures of experts: gate and up in one tensor, in three files' forms; interleaved and transposed, with biases
MIXTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "mixtral": _builder("Mixtral", "ForCausalLM", **GQA, num_local_experts=4),
    "qwen3_moe": _builder("Qwen3Moe", "ForCausalLM", **GQA, num_experts=6, num_experts_per_tok=2,
                          moe_intermediate_size=32, head_dim=16),
    "olmoe": _builder("Olmoe", "ForCausalLM", **GQA, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": _builder("GptOss", "ForCausalLM", **GQA, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
}  # fmt: skip


def tiny_batch(model: PreTrainedModel, rows: int = 3, tokens: int = 10, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random ids (rows, tokens) with labels of the model's task; the last row is padded."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, tokens), generator=random)
    mask = torch.ones_like(ids)
    mask[-1, tokens - 3 :] = 0
    if "SequenceClassification" in type(model).__name__:
        labels = torch.randint(0, model.config.num_labels, (rows,), generator=random)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's outputs at the positions that count, without gradients."""
    with torch.no_grad():
        out = model(**batch).logits
    return out[batch["attention_mask"] == 1] if out.dim() == 3 else out


def quantise(model: PreTrainedModel, kind: str = "nf4", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The linears of the blocks in bitsandbytes' 4- or 8-bit form, on the CPU."""
    import bitsandbytes as bnb

    from trimtab.model import anatomy

    for name, linear in anatomy.target_linears(model, "all-linear").items():
        path, _, leaf = name.rpartition(".")
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        if kind == "nf4":
            new = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        new.load_state_dict(linear.state_dict())
        new.requires_grad_(False)
        setattr(model.get_submodule(path), leaf, new.to("cpu"))
    for module in model.modules():  # bitsandbytes re-packs in eval mode, and rounds: no way back would be exact
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def pytest_collection_finish() -> None:
    """Leave what the libraries made at import out of garbage collection: each run ends with a whole collection
    (accelerate's), which took 0.3 s of the 0.6 s that a tiny run takes."""
    gc.collect()
    gc.freeze()


USERS_CACHE = os.environ.get("TRIMTAB_CACHE")  # as it was before any test


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """An empty cache folder for these tests and the processes they start: what the user's machine was measured to do,
    and what lies in its cache, changes no test."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def users_cache(monkeypatch) -> None:
    """The user's own cache folder, for a test that needs a real model: fetched once, then shared by all workers."""
    if USERS_CACHE is None:
        monkeypatch.delenv("TRIMTAB_CACHE")
    else:
        monkeypatch.setenv("TRIMTAB_CACHE", USERS_CACHE)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Callable[[str, torch.dtype], str]:
    """(family, dtype) -> a tiny model's folder."""
    from tiny import tiny_folder

    root, made = tmp_path_factory.mktemp("models"), {}

    def get(family: str, dtype: torch.dtype) -> str:
        if (family, dtype) not in made:
            made[family, dtype] = tiny_folder(root / f"{family}-{dtype}", family, dtype)
        return made[family, dtype]

    return get


@pytest.fixture(autouse=True)
def _interrupts():
    """Ctrl-C as a terminal gives it: a shell starts what it puts into the background with it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def call(monkeypatch, capfd):
    """trimtab's main with these arguments: -> (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trimtab", *map(str, arguments)])
        monkeypatch.setenv("TRIMTAB_ALLOCATOR", "none")
        capfd.readouterr()
        code, handler = 0, signal.getsignal(signal.SIGINT)
        try:
            cli.main()
        except SystemExit as done:
            code = int(done.code or 0)
        finally:
            signal.signal(signal.SIGINT, handler)  # once interrupted, a program that ends takes no more of them
        return (code, *capfd.readouterr())

    return run


@pytest.fixture
def minutes(monkeypatch) -> list[int]:
    """A minute passes each time that a run looks at its clock; one item per look, to be cleared."""
    from trimtab.training import time_limit

    looks: list[int] = []
    monkeypatch.setattr(time_limit, "clock", lambda: looks.append(0) or time.monotonic() + 60 * len(looks))
    return looks
