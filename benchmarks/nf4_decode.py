"""A 4-bit base on a CPU: replies in the form for decoding (model/packed.py) against the ordinary form.

SmolLM2-135M, and Llama-3.2-1B's shape with random weights. Each side is a fresh process that loads the model with
`precision: nf4` and replies as `trimtab generate` does, with the plan, the meter and the guard of its session; the
sides alternate. With LoRA (rank 8 on all linears) too. The difference of the loss is on WikiText-2's test text
(`--data FOLDER`, with wikitext2/test.jsonl.gz), in windows of 512 tokens, which the kernel multiplies. The result
contains no text.

The two constants of model/packed.py were set on SmolLM2's shapes and on 4,096 x 4,096. They are checked here on the 1B
shape's linears.

    python benchmarks/nf4_decode.py --data FOLDER [--quick] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import alternate, arguments, conclude, itself, options, ratios, say, spread  # noqa: E402
from llama_shape import shape_1b, write_model  # noqa: E402

MIB, PROMPT, WINDOW = 2**20, 32, 512
TARGETS = {
    "nf4_decode_gain": [">=", 5.0],
    "loss_difference_percent": ["<=", 0.5],
    "plan_error_percent": ["<=", 5.0],
}
CLAIM = (
    "A 4-bit base in the form for decoding gives at least 5 times the tokens/s of the ordinary form on a CPU, on "
    "SmolLM2-135M and on Llama-3.2-1B's shape, inside its plan."
)
NOTES = [
    "nf4_decode_gain: the smaller of the two models' medians of packed to ordinary, round by round, in tokens/s of "
    "decoding: 1 / the median time between two tokens, one reply at a time, after a prompt of 32 tokens. by CPU time: "
    "the same ratio of the process's CPU time, which other work on the machine changes less. whole_reply_gain: the "
    "same of the whole session's work after loading, with the prompt, packing and unpacking.",
    "peak: anonymous memory of the process at its highest while it plans and replies, by the session's meter; "
    "peak_ratio: the larger of the two models' packed to ordinary. plan_error_percent: of the packed form, the median "
    "difference of planned and measured peak, of the worse model.",
    "loss_difference_percent: of the mean loss over the windows, SmolLM2, packed less ordinary, absolute.",
    "crossover_slowest: the time of the form that `MOST` chooses to that of the faster one; the worst of the 1B "
    "shape's linears and of 1 to 2,048 rows. tokens_to_pay: the tokens after which packing and unpacking are paid for, "
    "the worst of these linears, beside `PAYS`.",
]


# --- children --------------------------------------------------------------------------------------------------------


def worker(job: dict[str, Any]) -> None:
    {"reply": reply, "loss": loss, "rows": rows}[job["do"]](job)


def session(job: dict[str, Any]) -> Any:
    from trimtab.inference.session import Inference
    from trimtab.model import packed
    from trimtab.recipe import Recipe

    if not packed.available():
        raise SystemExit("this CPU has no AVX512-BF16: the two forms are the same")
    if not job["packed"]:
        packed.available = lambda: False
    model = {"name": job["model"], "precision": "nf4"}
    return Inference(Recipe.from_dict({"model": model, "patches": [{"lora": {}}]}), base_only=True)


def reply(job: dict[str, Any]) -> None:
    import torch

    from trimtab.contracts import Place
    from trimtab.methods.lora import LoRA
    from trimtab.model import packed
    from trimtab.model.sampling import complete

    made, marks, cpu = session(job), [], []
    if job["lora"]:
        patch = LoRA(r=8)
        made.surgeries.append(patch.apply(made.model, Place(fast="cpu")))
        made.run.patches.append(patch)
        made.opened.append(patch)
    ids = torch.randint(3, 30000, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def on_token(count: int) -> None:
        made.on_token(count)
        marks.append(time.perf_counter())
        cpu.append(time.process_time())

    def timed(wanted: bool, pack: Callable[[bool], None] = made.pack) -> None:
        began = time.perf_counter()
        pack(wanted)
        took.append(time.perf_counter() - began)

    took: list[float] = []
    made.pack = timed
    with made:
        made.replies([PROMPT], job["new"])
        assert packed.any_packed(made.model) == job["packed"]
        began = time.perf_counter()
        complete(made.model, made.tokenizer, ids, torch.ones_like(ids), on_token=on_token, max_new_tokens=job["new"],
                 min_new_tokens=job["new"])  # fmt: skip
        assert packed.any_packed(made.model) == job["packed"]
        replied = time.perf_counter() - began
        made.pack(False)
        record = made.record()
    steps, busy = ([b - a for a, b in zip(seen, seen[1:], strict=False)][1:] for seen in (marks, cpu))
    say("result", {
        "decode": 1 / statistics.median(steps), "decode_cpu": 1 / statistics.median(busy),
        "whole": job["new"] / (replied + sum(took)),
        "packing": took[0], "unpacking": took[1], "prompt": marks[0] - began,
        "peak": record["measured"]["fast_peak_bytes"], "planned": record["predicted"]["fast_peak_bytes"],
    })  # fmt: skip


def loss(job: dict[str, Any]) -> None:
    import torch

    from trimtab.model import packed

    made = session(job)
    text = gzip.decompress(Path(job["text"]).read_bytes()).decode().splitlines()
    whole = "\n\n".join(json.loads(line)["text"] for line in text)
    ids = torch.tensor(made.tokenizer(whole[: 20 * job["windows"] * WINDOW])["input_ids"])
    windows = ids[: job["windows"] * WINDOW].view(-1, WINDOW)
    assert len(windows) == job["windows"] and packed.MOST >= WINDOW
    with made, torch.no_grad():
        made.pack(made.packs(NEW))
        losses = [float(made.model(input_ids=w[None], labels=w[None]).loss) for w in windows]
    say("result", {"loss": statistics.fmean(losses)})


def rows(job: dict[str, Any]) -> None:
    """Seconds of a linear by number of rows in the two forms, and of packing and unpacking."""
    import bitsandbytes as bnb
    import torch

    from trimtab.model import packed

    out, width = job["shape"]
    linear = bnb.nn.Linear4bit(width, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    linear.weight.data.normal_(0, 0.02)
    linear.to("cpu").eval().requires_grad_(False).support_avx512bf16_for_cpu = False

    def seconds(run: Callable[[], Any]) -> float:
        run()
        times, until = [], time.perf_counter() + 0.3
        while len(times) < 3 or time.perf_counter() < until:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def both() -> None:
        packed.pack(linear)
        packed.unpack(linear)

    found, most = {}, packed.MOST
    with torch.no_grad():
        for count in ROWS:
            x = torch.randn(count, width, dtype=torch.bfloat16)
            ordinary = seconds(lambda: linear(x))  # noqa: B023
            packed.pack(linear)
            times = []
            for packed.MOST in (2**30, 0):  # the kernel; dequantised from the packed form
                times.append(seconds(lambda: linear(x)))  # noqa: B023
            packed.MOST = most
            packed.unpack(linear)
            found[count] = {"ordinary": ordinary, "kernel": times[0], "dequantised": times[1]}
    say("result", {"rows": found, "both": seconds(both)})


# --- the parent ------------------------------------------------------------------------------------------------------

ROWS = (1, 4, 16, 64, 256, 512, 1024, 2048)
SHAPES = ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192))  # of the 1B shape
NEW = 48


def replies(model: str, name: str, lora: bool, new: int, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> (figures of a model, a row of the table)."""
    job = {"do": "reply", "model": model, "lora": lora, "new": new}
    sides = {form: (lambda form=form: itself(__file__, {**job, "packed": form == "packed"}))
             for form in ("ordinary", "packed")}  # fmt: skip
    runs = alternate(sides, rounds)
    ours, theirs = runs["packed"], runs["ordinary"]
    figures = {
        "decode": statistics.median(ratios(ours, theirs, "decode")),
        "cpu": statistics.median(ratios(ours, theirs, "decode_cpu")),
        "whole": statistics.median(ratios(ours, theirs, "whole")),
        "peak": statistics.median(ratios(ours, theirs, "peak")),
        "plan": statistics.median(run["planned"] / run["peak"] - 1 for run in ours),
    }
    column = lambda side, key, unit=1.0: spread([run[key] / unit for run in side])  # noqa: E731
    row = {
        "model": name + (", LoRA r 8" if lora else ""), "new tokens": new,
        "ordinary, tokens/s": column(theirs, "decode"), "packed, tokens/s": column(ours, "decode"),
        "ratio": f"{figures['decode']:.1f}", "by CPU time": f"{figures['cpu']:.1f}",
        "whole reply": f"{figures['whole']:.1f}",
        "prompt, s": f"{column(theirs, 'prompt')} / {column(ours, 'prompt')}",
        "pack and unpack, s": spread([run["packing"] + run["unpacking"] for run in ours]),
        "peak, MiB": f"{column(theirs, 'peak', MIB)} / {column(ours, 'peak', MIB)}",
        "planned, MiB": f"{column(theirs, 'planned', MIB)} / {column(ours, 'planned', MIB)}",
    }  # fmt: skip
    return figures, row


def crossover(shapes: tuple[tuple[int, int], ...], most: int) -> tuple[float, float, list[str]]:
    slowest, pay, table = 0.0, 0.0, []
    for shape in shapes:
        found = itself(__file__, {"do": "rows", "shape": shape})
        times = {int(count): entry for count, entry in found["rows"].items()}
        for count, entry in times.items():
            chosen = entry["kernel" if count <= most else "dequantised"]
            slowest = max(slowest, chosen / min(entry["kernel"], entry["dequantised"]))
        pay = max(pay, found["both"] / (times[1]["ordinary"] - times[1]["kernel"]))
        shown = (
            f"{count} {1e3 * e['ordinary']:.2f} / {1e3 * e['kernel']:.2f} / {1e3 * e['dequantised']:.2f}"
            for count, e in times.items()
        )
        table.append(f"{shape[0]} x {shape[1]}: pack and unpack {1e3 * found['both']:.1f} ms; {', '.join(shown)}.")
        print(table[-1], flush=True)
    return slowest, pay, table


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", help="the folder with wikitext2/test.jsonl.gz")
    parser.add_argument("--folder", help="where the 1B shape is written, 2.5 GB (default: the temporary folder)")
    if (args := arguments(parser, worker, needs_data=True)) is None:
        return
    rounds, smol = (1 if args.quick else args.rounds), "smollm2-135m"
    found, table = {}, []
    for lora in (False, True):
        found["smol", lora], row = replies(smol, "SmolLM2-135M", lora, NEW, rounds)
        table.append(row)
    text = str(Path(args.data) / "wikitext2" / "test.jsonl.gz")
    job = {"do": "loss", "model": smol, "text": text, "windows": 4 if args.quick else 40}
    plain, packed = (itself(__file__, {**job, "packed": form})["loss"] for form in (False, True))
    if not args.quick:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            write_model(Path(folder), 16, shape_1b())
            found["1b", False], row = replies(folder, "Llama-3.2-1B's shape", False, 16, rounds)
            table.append(row)
    from trimtab.model.packed import MOST, PAYS

    slowest, pay, linears = crossover(SHAPES[:1] if args.quick else SHAPES, MOST)
    bare = [figures for (_, lora), figures in found.items() if not lora]
    summary = {
        "nf4_decode_gain": min(figures["decode"] for figures in bare),
        "smollm2_decode_gain": found["smol", False]["decode"],
        **({} if args.quick else {"1b_decode_gain": found["1b", False]["decode"]}),
        "lora_decode_gain": found["smol", True]["decode"],
        "whole_reply_gain": min(figures["whole"] for figures in bare),
        "peak_ratio": max(figures["peak"] for figures in bare),
        "plan_error_percent": 100 * max(abs(figures["plan"]) for figures in bare),
        "loss_difference_percent": abs(100 * (packed / plain - 1)),
        "crossover_slowest": slowest,
        "tokens_to_pay": pay,
    }
    notes = [
        *NOTES,
        f"the losses: {plain:.5f} ordinary, {packed:.5f} packed. MOST: {MOST} rows; PAYS: {PAYS} tokens.",
        "The 1B shape's linears, by number of rows: ms of the ordinary form / the kernel / dequantised from the packed "
        "form. " + " ".join(linears),
    ]
    conclude("nf4_decode", args, summary, TARGETS, title="4-bit weights that decode fast", claim=CLAIM, rows=table,
             notes=notes)  # fmt: skip


if __name__ == "__main__":
    main()
