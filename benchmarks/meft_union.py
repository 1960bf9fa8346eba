"""What share of MEFT's pairs a batch fetches: with random keys alone, with its router, with its trained router.

SmolLM2-135M, bf16 base, r 16,384. Batches have 64 to 6,144 tokens, in rows of 256 from prose that is not trained on.
Averaged over the layers: the pairs that are among the K best of any token if all keys are matched with all tokens (the
union of algorithm 1 without experts); the experts that any token probes, which the forward pass fetches; and those of
them with a pair that fired, which the backward pass fetches again. The last two are measured before and after some
steps of 4 x 256 tokens.

    python benchmarks/meft_union.py --text FILE [--quick] [--steps 12] [--folder FOLDER] [--json FILE]

`--text`: JSON lines (or .gz) with a field "text", enough for the steps and the largest batch.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import conclude, itself, options, say, table_arguments, told_of_experts  # noqa: E402

R, LENGTH, ROWS, RATE = 16384, 256, 4, 2.2e-4
BATCHES = (64, 256, 1024, 6144)  # tokens
CLAIM = f"SmolLM2-135M, MEFT r {R}: the larger a batch, the more of the adapter it fetches; the share, on prose."
NOTES = [
    "without experts: the pairs among the 64 best of any token, over all pairs, with the initial keys.",
    "probed: experts that any token probes, over all; fired: those of them with a pair that counts. "
    "Mean over the 30 layers, on prose that was not trained on.",
]


def worker(job: dict[str, Any]) -> None:
    from datasets import load_dataset

    import trimtab
    from trimtab.contracts import Place
    from trimtab.methods.meft import Meft

    model, tokenizer = trimtab.load_model("smollm2-135m")
    texts = load_dataset("json", data_files=job["text"], split="train")["text"]
    ids = tokenizer("\n".join(texts), return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    held_out, rest = rows.tensor_split([max(BATCHES) // LENGTH])
    if len(rest) < job["steps"] * ROWS:
        raise SystemExit(f"--text: {len(rows)} rows of {LENGTH} tokens, {job['steps'] * ROWS} more than 24 are needed")
    place = Place(fast="cpu", slow="disk", folder=job["folder"])
    surgery = Meft(r=job["r"], **job["fields"]).apply(model, place)
    adapters = list(surgery.adapters.values())
    found = {"pairs": [], "before": [], "after": []}

    def look(when: str) -> None:
        model.eval()
        for tokens in job["batches"]:
            batch = held_out[: -(-tokens // LENGTH), : min(tokens, LENGTH)]
            with torch.inference_mode(), counted(adapters, when == "before") as shares:
                model(input_ids=batch)
            found[when].append([statistics.mean(shares[kind]) for kind in ("probed", "fired")])
            if when == "before":
                found["pairs"].append(statistics.mean(shares["pairs"]))

    look("before")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    model.train()
    losses = []
    for step, batch in zip(range(job["steps"]), rest.split(ROWS), strict=False):
        surgery.before_step(step)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        surgery.after_step(step, optimizer)
        losses.append(loss.item())
        print(json.dumps({"step": step, "loss": losses[-1]}), file=sys.stderr, flush=True)
    look("after")
    surgery.revert()
    say("result", {**found, "first_loss": losses[0], "last_loss": losses[-1]})


@contextmanager
def counted(adapters: list[Any], pairs: bool) -> Iterator[dict[str, list[float]]]:
    """Shares of each layer's experts, and with `pairs` of its pairs without experts, in one pass."""
    shares: dict[str, list[float]] = {"probed": [], "fired": [], "pairs": []}

    def seen(probed_TP: Tensor, store: Any, alive_TP: Tensor | None) -> None:
        chosen = probed_TP if alive_TP is None else probed_TP[alive_TP]
        shares["probed" if alive_TP is None else "fired"].append(len(chosen.unique()) / store.rows)

    matched = lambda adapter, given: shares["pairs"].append(union(given[0].flatten(0, 1).float(), adapter))  # noqa: E731
    hooks = [adapter.register_forward_pre_hook(matched) for adapter in adapters if pairs]
    try:
        with told_of_experts(seen):
            yield shares
    finally:
        for hook in hooks:
            hook.remove()


def union(h_TD: Tensor, adapter: Any) -> float:
    """The pairs among the K best of any token, over all, if each token is matched with all keys."""
    keys_RD = adapter.store.whole()[..., : adapter.width].reshape(-1, adapter.width)
    chosen_R = torch.zeros(len(keys_RD), dtype=torch.bool)
    for part_TD in h_TD.split(512):
        score_TK, best_TK = (part_TD @ keys_RD.T).topk(adapter.patch.k, sorted=False)
        chosen_R[best_TK[score_TK > 0]] = True
    return chosen_R.float().mean().item()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--text", help="prose, as JSON lines with a field text")
    parser.add_argument("--steps", type=int, default=12)
    if (args := table_arguments(parser, worker)) is None:
        return
    if not args.text:
        raise SystemExit("--text FILE is needed: the rows are not part of the repository")
    batches = BATCHES[:2] if args.quick else BATCHES
    job = {"text": args.text, "folder": args.folder, "fields": args.fields, "batches": batches,
           "steps": 2 if args.quick else args.steps, "r": 1024 if args.quick else R}  # fmt: skip
    found = itself(__file__, job, timeout=3600)
    rows, summary = [], {}
    for at, tokens in enumerate(batches):
        before, after = found["before"][at], found["after"][at]
        rows.append({
            "tokens": tokens, "pairs without experts": round(found["pairs"][at], 3),
            "experts probed at the start": round(before[0], 3), "fired": round(before[1], 3),
            f"probed after {job['steps']} steps": round(after[0], 3), f"fired after {job['steps']}": round(after[1], 3),
        })  # fmt: skip
        summary |= {f"pairs_without_experts_{tokens}": found["pairs"][at], f"probed_trained_{tokens}": after[0]}
        print(rows[-1])
    print(f"loss: {found['first_loss']:.3f}, after {job['steps']} steps {found['last_loss']:.3f}")
    conclude(
        "meft_union", args, summary, {}, title="How much of an adapter a batch fetches", claim=CLAIM, rows=rows,
        notes=NOTES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
