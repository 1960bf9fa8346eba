"""Run by `make demo`: a small model learns 120 facts about the world's cities, in the memory of a small machine.

It trains an adapter with more parameters than the model, which is in a file together with its optimizer state. The
model is asked about each fact before and after training, in a wording that it is not trained on.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from trimtab.errors import Interrupted, TrimtabError
from trimtab.memory.allocator import restart_under
from trimtab.process.interrupt import stopped_by_interrupt

MODEL = "smollm2-135m"
FACTS = 120  # cities; each is asked about in five wordings, so five times as many rows
STEPS = 37  # one pass over all but a few rows: a fact is seen in four or five wordings
BATCH = 16
LONGEST = 64  # tokens; the rows are shorter
BUDGET = "1.25GiB"  # of the fast tier: what the whole process may use, including interpreter and libraries
PAIRS = 4096  # key-value pairs that MEFT adds to the FFN of each layer
LEARNING_RATE = 5e-4  # as chosen on other cities (benchmarks/knowledge.py)
TESTED = 60  # of the held-out questions, one for each city; None: all of them
FOLDER = Path("runs/demo")
SHOWN = 6


def main() -> None:
    from trimtab import Recipe
    from trimtab.data.demo import TEST_TEMPLATE, build_geography
    from trimtab.model.hub import cached_folder
    from trimtab.planning.remembered import remember
    from trimtab.report.report import report

    cached_folder(MODEL, say=progress)
    know_machine()
    began = time.monotonic()
    made = build_geography(FOLDER, FACTS)
    print(f"1  {made.facts} facts: which country a city is in; {made.countries} countries")
    print(f"   {made.train_rows} questions to train on, {made.test_rows} to test with, such as")
    print(f"   {TEST_TEMPLATE.format(city='...')}")

    recipe = Recipe(
        model=MODEL,
        data={"train": str(made.train), "test": str(made.test)},
        patches=[{"meft": {"r": PAIRS}}],
        place={"slow": "disk"},
        budget={"fast": BUDGET},
        training={
            "max_steps": STEPS, "per_device_train_batch_size": BATCH, "max_length": LONGEST,
            "learning_rate": LEARNING_RATE, "pad_to_multiple_of": 16,
        },
        output=str(FOLDER),
        overwrite=True,
    )  # fmt: skip
    print(f"2  {MODEL} before training ...", flush=True)
    before = recipe.evaluate(base_only=True, limit=TESTED)
    print(f"   answers {before['metrics']['contains']:.0%} of the test questions")

    planned = recipe.plan()
    remember(recipe, planned)
    print(f"3  MEFT trains {PAIRS} pairs beside each FFN, in a file: {planned.trained:,} parameters; budget: {BUDGET}.")
    print(f"   The plan, for rows of {LONGEST} tokens:")
    print("\n".join(f"   {line}" for line in planned.lines()))
    print(f"4  {STEPS} steps of {BATCH} rows ...", flush=True)
    run = recipe.train(quiet=False, say=steps)
    predicted, measured = run["predicted"], run["measured"]
    gib = 2**30
    print(f"   {run['tokens']:,} tokens in {measured['seconds']:.0f} s, {measured['tokens_per_second']:,.0f} tokens/s")
    speed = f" and {predicted['tokens_per_second']:,.0f} tokens/s" if predicted["tokens_per_second"] else ""
    print(f"   predicted for the longest rows: {predicted['fast_peak_bytes'] / gib:.2f} GiB{speed}; "
          f"used: {measured['fast_peak_bytes'] / gib:.2f} GiB")  # fmt: skip

    print("5  the same questions again ...", flush=True)
    after = recipe.evaluate(limit=TESTED)
    print(f"   answers {after['metrics']['contains']:.0%} of them\n")
    prefix, suffix = TEST_TEMPLATE.split("{city}")
    show([
        (old["prompt"].removeprefix(prefix).removesuffix(suffix), old["answers"][0], old["reply"], new["reply"])
        for old, new in zip(before["samples"][:SHOWN], after["samples"], strict=False)
    ])  # fmt: skip

    metrics = [result["metrics"]["contains"] for result in (before, after)]
    print(f"\nrecall on a wording never trained on: {metrics[0]:.1%} before, {metrics[1]:.1%} after")
    print(f"{time.monotonic() - began:.0f} s in total; {FOLDER / 'adapter'}: {adapter_size():.1f} MiB, "
          f"{report([FOLDER])}: the report on one page")  # fmt: skip
    print("\nNext:")
    for verb, what in [
        (f"generate {FOLDER}", "talk to it"),
        (f"eval {FOLDER}", "test it again"),
        ("doctor", "what this machine has, and how fast it is"),
    ]:
        print(f"  {command()} {verb:<32} {what}")


def know_machine() -> None:
    """Measure once, quickly, how fast the machine is and what a process uses on it; keep the result."""
    from trimtab.planning.calibrate import calibrate

    calibrate(say=progress)


def show(rows: list[tuple[str, str, str, str]]) -> None:
    """City, country, reply before, reply after: a table on a terminal, plain columns elsewhere."""
    head = ("city", "country", "before", "after")
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Column, Table

        table = Table(*(Column(name, no_wrap=True) for name in head), box=box.SIMPLE_HEAD, pad_edge=False)
        for city, country, old, new in rows:
            right = country.lower() in new.lower()
            table.add_row(city, country, one_line(old, 48), f"[{'green' if right else 'red'}]{one_line(new, 30)}")
        Console(highlight=False).print(table)
        return
    for city, country, old, new in [head, *rows]:
        print(f"{one_line(city, 18):<18}  {one_line(country, 16):<16}  {one_line(old, 40):<40}  {one_line(new, 30)}")


def one_line(text: Any, width: int) -> str:
    text = " ".join(str(text).split()).replace("[", "(")
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."


def progress(line: str) -> None:
    print(f"   {line}", file=sys.stderr, flush=True)


def steps(line: str) -> None:
    """Print only the steps of what `train` reports; the demo prints the result itself."""
    if line.startswith("step"):
        progress(line)


def adapter_size() -> float:
    """MiB"""
    return sum(path.stat().st_size for path in (FOLDER / "adapter").iterdir()) / 2**20


def command() -> str:
    """How `trimtab` is called from here: by name if the shell finds it, else by the path of this environment."""
    beside = Path(sys.executable).with_name("trimtab")
    return "trimtab" if shutil.which("trimtab") or not beside.exists() else os.path.relpath(beside)


if __name__ == "__main__":
    with stopped_by_interrupt("the demo was stopped; next time it starts from the beginning"):
        restart_under()  # a malloc can only be chosen before a process starts
        try:
            main()
        except Interrupted:  # in training: it has finished its step and written a checkpoint
            raise KeyboardInterrupt from None
        except TrimtabError as error:
            print(f"demo: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
