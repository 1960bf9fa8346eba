"""SparseGPT against Wanda and magnitude pruning: WikiText-2 perplexity of SmolLM2-135M, and memory above the base.

`--data FOLDER` has wikitext2/validation.jsonl.gz and test.jsonl.gz. Windows of 512 tokens of the validation articles
calibrate (the same ones for Wanda), others train a PaCA on top, and a last part, set apart, chooses its learning rate.
Perplexity is that of windows of the test articles. Each side has its own process, whose anonymous memory is sampled
from the moment the base is loaded (mapped from its file) to the end of pruning. The result contains no text.
What each process gave is kept in results/sparsegpt_trainings.jsonl, and it is not run again.

    python benchmarks/sparsegpt.py --data FOLDER [--quick] [--json FILE]
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, Kept, arguments, conclude, itself, options, say

MODEL, WINDOW = "smollm2-135m", 512
CALIBRATION, APART, TEST = 16, 4, 8  # windows
STEPS, BATCH, RATES = 16, 2, (1e-3, 3e-3)  # of the PaCA on top
PATTERNS = ("unstructured", "2:4")
SIDES = ("magnitude", "wanda", "sparsegpt")


def windows(file: Path, tokenizer: Any, path: Path) -> Any:
    """(n, WINDOW) ids of all articles, one after the other."""
    import torch

    text = "".join(json.loads(line)["text"] for line in gzip.decompress(file.read_bytes()).decode().splitlines())
    ids = torch.tensor(tokenizer(text).input_ids)
    torch.save(ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW), path)


def perplexity(model: Any, ids_NT: Any) -> float:
    import torch

    losses = []
    with torch.no_grad():
        for ids in ids_NT.split(1):
            losses.append(model(input_ids=ids, labels=ids).loss.float().item())
    return math.exp(sum(losses) / len(losses))


def worker(job: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from trimtab import methods
    from trimtab.contracts import Place
    from trimtab.memory.meter import process_memory
    from trimtab.model import anatomy
    from trimtab.model.load import load_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    held, test = (torch.load(Path(job["folder"]) / f"{name}.pt") for name in ("validation", "test"))
    calibration, training, apart = held[: job["rows"]], held[CALIBRATION:-APART], held[-APART:][: job["apart"]]
    place = Place(fast="cpu", slow="disk", folder=job["folder"])
    model, _ = load_model(MODEL)
    found: dict[str, Any] = {"block": sum(p.numel() for p in anatomy.blocks(model)[1][0].parameters())}
    at_start, peak, done = process_memory()["anon"], [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], process_memory()["anon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    if job["side"] != "base":
        ours = job["side"] == "sparsegpt"
        fields = {"rows": job["rows"], "pattern": job["pattern"], **({} if ours else {"score": job["side"]})}
        surgery = methods.find("sparsegpt" if ours else "pruning")(**fields).apply(model, place)
        if (kept := Path(job["folder"]) / "pruned.safetensors").is_file() and job["rate"]:
            surgery.load_tensors(load_file(kept))
        elif surgery.patch.calibration_rows:
            surgery.calibrate(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibration.split(1)
            )
        done.set()
        if ours and job["pattern"] == "unstructured" and not kept.is_file():
            save_file({name: t.contiguous().clone() for name, t in surgery.own_tensors().items()}, kept)
        found["zeros"] = sum(int((m.weight == 0).sum()) for m in surgery.linears.values()) / sum(
            m.weight.numel() for m in surgery.linears.values()
        )
    done.set()
    watcher.join()
    found["growth"] = peak[0] - at_start
    if job["rate"]:
        above = methods.find("paca")(r=8).apply(model, place)
        optimizer = torch.optim.AdamW([t for t in above.own_tensors().values() if t.requires_grad], lr=job["rate"])
        rows = itertools.cycle(training.split(BATCH))
        model.train()
        for step in range(job["steps"]):
            optimizer.param_groups[0]["lr"] = job["rate"] * (1 - step / job["steps"])
            ids = next(rows)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        found["apart"] = perplexity(model, apart)
    if job["test"]:
        found["perplexity"] = perplexity(model, test[: job["test"]])
    say("result", found)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", metavar="FOLDER", help="the folder of wikitext2")
    if (args := arguments(parser, worker, needs_data=True)) is None:
        return
    from trimtab.model.load import config_folder, load_tokenizer
    from trimtab.model.spec import ModelSpec

    tokenizer = load_tokenizer(config_folder(ModelSpec(MODEL)))
    rows, summary = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("validation", "test"):
            windows(Path(args.data) / f"wikitext2/{name}.jsonl.gz", tokenizer, Path(folder) / f"{name}.pt")
        job = {"folder": folder, "rows": 4 if args.quick else CALIBRATION, "apart": 2 if args.quick else APART,
               "test": 2 if args.quick else TEST, "steps": 2 if args.quick else STEPS, "rate": 0, "side": "base",
               "pattern": "unstructured"}  # fmt: skip

        kept = Kept(Path(folder) / "kept" if args.quick else RESULTS / "sparsegpt_trainings.jsonl")

        def run(**more: Any) -> dict[str, Any]:
            asked = {key: value for key, value in {**job, **more}.items() if key != "folder"}
            return kept.once(asked, lambda _: itself(__file__, {**job, **more}, threads=1, timeout=3600))

        def row(side: str, pattern: str, found: dict[str, Any]) -> None:
            pruned = pattern and "zeros" in found and "apart" not in found  # that one reads the pruned weights
            rows.append({"side": side, "pattern": pattern, "perplexity": found["perplexity"],
                         "zeros, %": round(100 * found["zeros"], 2) if pruned else "",
                         "growth, MiB": round(found["growth"] / 2**20, 1) if pruned else ""})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)

        base = run()
        row("base", "", base)
        for pattern in PATTERNS:
            ends = {side: run(side=side, pattern=pattern) for side in SIDES}
            for side, found in ends.items():
                row(side, pattern, found)
            suffix = "" if pattern == "unstructured" else "_2_4"
            ours = ends["sparsegpt"]["perplexity"]
            summary |= {f"ppl_to_{side}{suffix}": ours / ends[side]["perplexity"] for side in SIDES[:2]}
            if not suffix:
                pruned, growth = ours, ends["sparsegpt"]["growth"]
        trained = {}
        for rate in RATES[:1] if args.quick else RATES:
            trained[rate] = run(side="sparsegpt", rate=rate)
        rate = min(trained, key=lambda r: trained[r]["apart"])
        row(f"sparsegpt, then PaCA at {rate}", "unstructured", trained[rate])
        row(f"base, then PaCA at {rate}", "", over := run(rate=rate))
    two = 2 * 4 * base["block"]
    summary |= {
        "growth_gib": growth / 2**30, "growth_to_two_blocks": growth / two,
        "paca_recovers": (math.log(pruned) - math.log(trained[rate]["perplexity"]))
        / (math.log(pruned) - math.log(over["perplexity"])),
    }  # fmt: skip
    conclude("sparsegpt", args, summary, TARGETS, title="SparseGPT against Wanda and magnitude pruning", claim=CLAIM,
             rows=rows, notes=NOTES)  # fmt: skip


TARGETS = {
    "ppl_to_magnitude": ["<", 1], "ppl_to_wanda": ["<", 1], "ppl_to_magnitude_2_4": ["<", 1],
    "ppl_to_wanda_2_4": ["<", 1], "growth_to_two_blocks": ["<=", 1],
}  # fmt: skip
CLAIM = (
    "SmolLM2-135M at 50 % and 2:4 on WikiText-2: the perplexity after SparseGPT over that after Wanda and after "
    "magnitude pruning, with the same calibration windows; and the memory that pruning needs above the mapped base."
)
NOTES = [
    f"Calibration: {CALIBRATION} windows of {WINDOW} tokens of the validation articles; perplexity: {TEST} windows of "
    "the test articles. The paper calibrates with 128 windows of 2,048 tokens of C4.",
    "growth: anonymous memory beyond the loaded base, in a process that only prunes; two blocks are counted in fp32, "
    "the precision that pruning computes in. The pruned weights of SparseGPT are in a file; those of the other two are "
    "copies in memory.",
    f"PaCA: r 8, {STEPS} steps of {BATCH} windows of the validation articles; the learning rate was chosen on {APART} "
    "windows set apart. paca_recovers: the share of the loss between the pruned model and the base with the same PaCA "
    "that training recovers. Training fills zeros in the columns that it trains.",
]


if __name__ == "__main__":
    main()
