"""What prefetching MEFT's rows saves when the table is not in memory, and what it costs when it is.

SmolLM2-135M, bf16 base, the table in a file, r 16,384. One side prefetches nothing, the other what is known to be
needed (`prefetch: none, known`), each in a fresh process, in turn. Before each cold pass all pages of the tables are
written to the disk and dropped, and the kernel confirms that they are gone. Decoding is greedy, one token per pass. A
training step is one row of 32 tokens, always the same: forward pass, backward pass and AdamW.

    python benchmarks/meft_ahead.py [--quick] [--rounds 2] [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import alternate, city_text, conclude, itself, options, ratios, say, spread, table_arguments  # noqa: E402

SIDES = ("none", "known")
PROMPT, TOKENS = 32, 32  # tokens of the prompt, of a training step's row
TARGETS = {
    "cold_speedup_decode": [">=", 1.5], "cold_speedup_step": [">=", 1.5], "warm_cost": ["<=", 1.02],
}  # fmt: skip
CLAIM = (
    "SmolLM2-135M, bf16 base, MEFT r 16,384 with its table in a file: if no page of the table is in memory, "
    "prefetching makes decoding and training steps faster; if all are, it costs next to nothing."
)
NOTES = [
    "cold: before each pass no page of the tables is in memory (the kernel confirms it); warm: all pages that the pass "
    "needs are.",
    "cold_speedup: `known`, the default, against `none`.",
    "warm_cost: passes of `known` with its reader thread against passes without it, in turn within the same process; "
    "the worse of decoding and training steps.",
]


class Files:
    """The files of tables made from here on, by descriptor: their pages can be dropped."""

    def __init__(self) -> None:
        from trimtab.tiered import mapped_file

        self.held: list[tuple[int, int]] = []  # descriptor, bytes

        def keeping(descriptor: int, size: int) -> mmap.mmap:
            self.held.append((os.dup(descriptor), size))
            return mmap.mmap(descriptor, size)

        mapped_file.mmap = SimpleNamespace(mmap=keeping)

    def drop(self, stores: list[Any]) -> None:
        """Write and drop all pages. A page that is being read cannot be dropped yet; fails if any stays."""
        for _ in range(100):
            if not (left := self._drop(stores)):
                return
        raise RuntimeError(f"{left} pages of the tables are still in memory")

    def _drop(self, stores: list[Any]) -> int:
        """-> how many pages are still in memory."""
        libc, left = ctypes.CDLL(None, use_errno=True), 0
        for (descriptor, size), store in zip(self.held, stores, strict=True):
            at = ctypes.c_void_p(store._table.data_ptr())
            os.fdatasync(descriptor)
            if libc.madvise(at, ctypes.c_size_t(size), mmap.MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), "madvise")
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            pages = (ctypes.c_char * -(-size // mmap.PAGESIZE))()
            if libc.mincore(at, ctypes.c_size_t(size), pages):
                raise OSError(ctypes.get_errno(), "mincore")
            left += len(pages) - pages.raw.count(b"\0")
        return left


def worker(job: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimtab.contracts import Place
    from trimtab.methods.meft import Meft
    from trimtab.model.load import cached_folder

    folder, files = cached_folder("smollm2-135m"), Files()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    patch = Meft(r=job["r"], prefetch=job["prefetch"], **job["fields"])
    surgery = patch.apply(model, Place(fast="cpu", slow="disk", folder=job["folder"]))
    stores, drop = surgery.stores, lambda: files.drop(surgery.stores)
    text = "".join(json.loads(line)["text"] for line in Path(job["text"]).read_text().splitlines()[:40])
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    # nothing is learned, so that each step needs the rows of the one before
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> None:
        row = ids[:, :TOKENS]
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def decode(many: int, before: Callable[[], None]) -> list[float]:
        """Seconds of each pass of one token after the prompt's."""
        out, times = model(input_ids=ids[:, :PROMPT], use_cache=True), []
        for _ in range(many):
            before()
            began = time.perf_counter()
            out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter() - began)
        return times

    def steps(many: int, before: Callable[[], None]) -> list[float]:
        times = []
        for _ in range(many):
            before()
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        return times

    readers, passes = [store.reader for store in stores], itertools.count()

    def read_ahead(how: bool) -> None:
        for store, reader in zip(stores, readers, strict=True):
            store.reader = reader if how else None

    def in_turn() -> None:
        """Every second pass is without a reader: the machine is the same for both."""
        read_ahead(next(passes) % 2 == 0)

    found: dict[str, Any] = {}
    steps(2, in_turn)  # rows get their moments, so that there is something on the disk to be read
    for name, work in (("step", steps), ("decode", decode)):
        model.train(name == "step")
        work(2 * job[f"warm_{name}"], in_turn)  # all that is needed is brought into memory
        times = work(2 * job[f"warm_{name}"], in_turn)
        found[f"warm_{name}"], without = (statistics.median(times[at::2]) for at in (0, 1))
        found[f"warm_{name}_cost"] = found[f"warm_{name}"] / without
        read_ahead(True)
        found[f"cold_{name}"] = statistics.median(work(job[f"cold_{name}"], drop))
    surgery.revert()
    say("result", found)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    if (args := table_arguments(parser, worker)) is None:
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        text = Path(folder) / "cities.jsonl"
        city_text(text)
        counts = {"warm_step": 10, "cold_step": 2, "warm_decode": 48, "cold_decode": 8}
        if args.quick:
            counts = {"warm_step": 2, "cold_step": 1, "warm_decode": 5, "cold_decode": 3}
        job = {"text": str(text), "folder": folder, "r": 1024 if args.quick else 16384,
               "fields": args.fields, **counts}  # fmt: skip
        run = lambda how: itself(__file__, {**job, "prefetch": how})  # noqa: E731
        runs = alternate({how: (lambda how=how: run(how)) for how in SIDES}, 1 if args.quick else args.rounds)
    off, known = (runs[how] for how in SIDES)
    faster = {name: statistics.median(ratios(off, known, f"cold_{name}")) for name in ("decode", "step")}
    slower = {name: statistics.median(run[f"warm_{name}_cost"] for run in known) for name in ("decode", "step")}
    summary = {
        "cold_speedup_decode": faster["decode"], "cold_speedup_step": faster["step"],
        "warm_cost": max(slower.values()), "warm_cost_decode": slower["decode"], "warm_cost_step": slower["step"],
    }  # fmt: skip
    rows = [
        {"prefetch": side, **{f"{heat} {work}, ms": spread([1000 * run[f"{heat}_{work}"] for run in of])
                          for work in ("decode", "step") for heat in ("cold", "warm")}}
        for side, of in runs.items()
    ]  # fmt: skip
    for row in rows:
        print(row)
    conclude(
        "meft_ahead", args, summary, TARGETS, title="Prefetched rows", claim=CLAIM, rows=rows, notes=NOTES
    )  # fmt: skip


if __name__ == "__main__":
    main()
