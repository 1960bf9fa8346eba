"""The small transformer of benchmarks/knowledge.py and its random facts.

A fact is a key of two tokens and one of 1,024 values: 10 bits, which cannot be guessed. The base has learned facts of
its own, and none of those that the methods then learn.

A step takes BATCH facts, in micro-batches of MICRO. Gradients of micro-batches add up to those of the batch, so the
batch is computed at once, while fast memory is counted for one micro-batch (`check` trains both ways).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fast_memory import Rows, fast_bytes, kept
from trimtab import methods
from trimtab.contracts import Place, Surgery

VOCABULARY, WIDTH, LAYERS = 1024, 64, 2
KEY = 2  # tokens
BATCH, MICRO = 64, 1  # facts
WARM = 20  # steps
BASE_FACTS, BASE_RATE = 4000, 3e-3


def model() -> LlamaForCausalLM:
    """Two blocks, hidden 64, random weights: the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=8, tie_word_embeddings=False,
            attn_implementation="eager",
        ))  # fmt: skip


def facts(count: int, seed: int, base: bool = False) -> tuple[Tensor, Tensor]:
    """-> keys (count, 2), all different, and values (count,). No key of the base's own is among the others."""
    random = torch.Generator().manual_seed(seed)
    numbers = 2 * torch.randperm(VOCABULARY**2 // 2, generator=random)[:count] + int(base)
    keys = torch.stack([numbers // VOCABULARY, numbers % VOCABULARY], 1)
    return keys, torch.randint(VOCABULARY, (count,), generator=random)


def answers(net: LlamaForCausalLM, keys: Tensor) -> Tensor:
    return net(input_ids=keys, use_cache=False, logits_to_keep=1).logits[:, -1]


def loss(net: LlamaForCausalLM, keys: Tensor, values: Tensor) -> Tensor:
    return F.cross_entropy(answers(net, keys), values)


@torch.inference_mode()
def recall(net: LlamaForCausalLM, keys: Tensor, values: Tensor) -> float:
    """Share of the facts whose value is the most probable token."""
    said = torch.cat([answers(net, part).argmax(-1) for part in keys.split(512)])
    return (said == values).float().mean().item()


def train(
    net: LlamaForCausalLM, surgery: Surgery | None, keys: Tensor, values: Tensor, *, rate: float, exposures: int,
    seed: int, ask: int = 10, parts: int = BATCH,
) -> list[list[float]]:  # fmt: skip
    """Adam, linear warm-up and decay to 0; -> [exposures, recall] every `ask` exposures and at the end."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=rate)
    steps = exposures * (len(keys) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: min(1.0, (at + 1) / WARM) * (1 - at / steps))
    random, step, curve = torch.Generator().manual_seed(seed), 0, []
    for passed in range(1, exposures + 1):
        for batch in torch.randperm(len(keys), generator=random)[: len(keys) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            for chosen in batch.split(parts):
                (loss(net, keys[chosen], values[chosen]) * (len(chosen) / BATCH)).backward()
            optimizer.step()
            if surgery is not None:
                surgery.after_step(step, optimizer)
            schedule.step()
            step += 1
        if passed % ask == 0 or passed == exposures:
            curve.append([passed, recall(net, keys, values)])
    return curve


# --- what a process is asked for -------------------------------------------------------------------------------------


def base(job: dict[str, Any]) -> dict[str, Any]:
    """Train the base and keep it in the work folder."""
    net = model()
    keys, values = facts(BASE_FACTS, 1, base=True)
    curve = train(net, None, keys, values, rate=BASE_RATE, exposures=job["exposures"], seed=0)
    torch.save(net.state_dict(), Path(job["work"]) / "base.pt")
    return {"recall": curve[-1][1]}


def patched(job: dict[str, Any], **fields: Any) -> tuple[LlamaForCausalLM, Surgery, int]:
    """-> the base with the job's patch, and what it keeps of a micro-batch beyond the base's own (bytes)."""
    net = model()
    net.load_state_dict(torch.load(Path(job["work"]) / "base.pt", weights_only=True))
    few = facts(MICRO, 2)
    net.requires_grad_(False)
    net.enable_input_require_grads()
    frozen = kept(net, lambda: loss(net, *few))
    net.disable_input_require_grads()
    patch = methods.find(job["patch"])(**{**job["fields"], **fields})
    surgery = patch.apply(net, Place(fast="cpu", slow="disk"))
    return net, surgery, kept(net, lambda: loss(net, *few)) - frozen


def fit(job: dict[str, Any]) -> dict[str, Any]:
    """The least r of which the fast memory is the budget's or more."""

    def size(r: int) -> int:
        _, surgery, activations = patched(job, r=r)
        return sum(fast_bytes(surgery, 0, activations).values())

    r = max(1, int((job["budget"] - size(1)) / (size(2) - size(1))))
    while size(r) < job["budget"]:
        r += 1
    return {"r": r, "fast": size(r)}


def learn(job: dict[str, Any]) -> dict[str, Any]:
    """Give the model `facts` facts of `seed`."""
    net, surgery, activations = patched(job)
    keys, values = facts(job["facts"], job["seed"])
    began, before = time.perf_counter(), recall(net, keys, values)
    told = {key: job[key] for key in ("rate", "exposures", "seed")}
    with Rows(MICRO * KEY) as rows:
        curve = train(net, surgery, keys, values, **told)
    held = fast_bytes(surgery, rows.most, activations)
    return {"recall": curve[-1][1], "before": before, "fast": sum(held.values()), "bytes": held, "curve": curve,
            "slow": sum(table.nbytes["slow"] for table in surgery.stores),
            "parameters": sum(p.numel() for p in net.parameters() if p.requires_grad)
            + sum(table.numel for table in surgery.stores), "seconds": time.perf_counter() - began}  # fmt: skip


def check(job: dict[str, Any]) -> dict[str, Any]:
    """How far apart a training in whole batches and one in micro-batches end."""
    ends = []
    for parts in (BATCH, MICRO):
        net, surgery, _ = patched(job)
        train(net, surgery, *facts(4 * BATCH, TUNED), rate=job["rate"], exposures=1, seed=0, parts=parts)
        ends.append({name: tensor.detach().clone() for name, tensor in surgery.own_tensors().items()
                     if tensor.numel()})  # fmt: skip
    far = max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0])
    return {"difference": far, "moved": max(float(tensor.abs().max()) for tensor in ends[0].values())}


TUNED = 100  # the seed of the facts that learning rates are chosen on
