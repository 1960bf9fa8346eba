"""Callbacks of a run: the progress display, metrics.jsonl, counts per step, and stopping."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live as LiveDisplay
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from ..contracts import Surgery
from ..cost.metered import metered
from ..cost.trace import ADAPTER, MAPPED, OPTIMIZER, WEIGHTS, Trace, highest, live
from ..files import write_text
from ..memory.budget import gib
from ..memory.guard import Guard
from ..memory.meter import GIB, Meter

Say = Callable[[str], None]
NEAR = 0.85, 0.97  # shares of the budget at which the bar becomes yellow and red


def speaker(quiet: bool = False) -> Say:
    """A function that prints one line on standard error; with `quiet` it prints nothing."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return lambda line: None if quiet else console.print(line, markup=False)


class MetricsFile(TrainerCallback):
    """Writes one JSON line per log: step, seconds since training began or resumed, loss, learning rate, tokens.

    A resumed run first removes lines after its checkpoint, and the earlier summary.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= state.global_step and '"train_runtime"' not in line]
        if len(kept) < len(lines):
            write_text(self.path, "".join(line + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        seconds = round(time.monotonic() - self.began, 2)
        row = {"step": state.global_step, "seconds": seconds, **{key: value for key, value in (logs or {}).items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def rewarded(logs: dict[str, Any]) -> str:
    """Mean reward, share of prompts whose replies differ in reward, mean length of a reply, and divergence if any."""
    parts = [f"reward {logs['reward']:.3f}"]
    if (equal := logs.get("frac_reward_zero_std")) is not None:
        parts.append(f"{1 - equal:.0%} of groups differ")
    if (length := logs.get("completions/mean_length")) is not None:
        parts.append(f"{length:.0f} tokens")
    if (divergence := logs.get("kl")) is not None:
        parts.append(f"kl {divergence:.3f}")
    return "  ".join(parts)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize


class SamplesFile(MetricsFile):
    """Writes a few sampled replies per log, one JSON line each: step, prompt, reply, what it earned, advantage."""

    def __init__(self, path: Path, trainer: Any):
        super().__init__(path)
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in (logs or {}):
            with self.path.open("a", encoding="utf-8") as file:
                for sample in self.trainer.samples():
                    file.write(json.dumps({"step": state.global_step, **sample}, ensure_ascii=False) + "\n")


class Steps(TrainerCallback):
    """Counts tokens and seconds per step, calls the surgeries around steps, and measures one step's live tensors."""

    def __init__(self, surgeries: Sequence[Surgery], meter: Meter, model: Any, as_loaded: Sequence[Any] = ()):
        self.surgeries, self.meter, self.model = surgeries, meter, model
        self.as_loaded = as_loaded  # weak references to the storages of the model before any patch
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.trace: Trace | None = None  # while a step is metered
        self._metering = contextlib.ExitStack()
        self.live_peak = self.live_mapped = 0
        self.live_phase, self.live_bytes = "", {}  # the phase of the step with the peak, and its bytes by kind
        self.trainer: Any = None
        self.first = 0
        self._counted = 0
        self.first_step_at: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.first = state.global_step
        if self.first and args.process_index == 0:  # resumed: the checkpoint's count covers all processes
            self.trainer._total_train_tokens = state.num_input_tokens_seen
        self._counted = self.trainer._total_train_tokens
        for surgery in self.surgeries:
            surgery.begin(state.max_steps)
        self.meter.mark("train")

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for surgery in self.surgeries:
            surgery.before_step(state.global_step)
        second = state.global_step == self.first + 1  # optimizer state exists, warm-up is over
        if second and not self.trainer.sharded:
            # `own_tensors` of a table would bring its rows up to date, which other steps do not do
            own = [t for surgery in self.surgeries if not surgery.stores for t in surgery.own_tensors().values()]
            tables = [t for surgery in self.surgeries for store in surgery.stores for t in store.mapped()]
            inner = getattr(optimizer, "optimizer", optimizer)
            aside = [storage for ref in self.as_loaded if (storage := ref()) is not None]
            outside = [pair for surgery in self.surgeries for pair in surgery.outside().items()]
            self.trace = self._metering.enter_context(
                metered(self.trainer, self.model, own, inner, tables, aside, outside)
            )
            del aside
            self.live_mapped = self.trace.held.get(MAPPED, 0)
        if self.first_step_at is None:
            self.first_step_at = time.monotonic()
        self._began = time.monotonic()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        for surgery in self.surgeries:
            surgery.after_step(state.global_step, inner)

    def on_step_end(self, args, state, control, **kwargs):
        was_metered = self.trace is not None
        self.end_live()
        tokens = self.trainer._total_train_tokens - self._counted
        self._counted += tokens
        # the first and the metered step do not count for the speed
        if not was_metered and state.global_step > self.first + 1:
            self.seconds.append(time.monotonic() - self._began)
            self.tokens.append(tokens)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trace:
            self.trace.enter("optimizer", OPTIMIZER)

    def end_live(self) -> None:
        if self.trace is None:
            return
        self._metering.close()
        if self.trace.peaks:
            self.live_phase, held = highest(self.trace.peaks)
            self.live_bytes = {kind: size for kind, size in held.items() if size}
            self.live_peak = live(held)
            stays = {kind: held.get(kind, 0) for kind in (WEIGHTS, ADAPTER, OPTIMIZER)}
            process = max(0, self.meter.baseline["anon"] - stays[WEIGHTS])
            self.meter.parts = {"process": process, **stays}
        self.trace = None

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / sum(self.seconds) if self.seconds else 0.0


class Live(TrainerCallback):
    """Shows step, loss, tokens/s, time left, and the use of the fast tier.

    On a terminal two lines with a bar each; elsewhere plain lines, less and less often, down to one per minute.
    `limit`: the budget in bytes, if there is one.
    """

    def __init__(self, steps: Steps, say: Say, quiet: bool, limit: int | None = None):
        self.steps, self.say, self.quiet, self.limit = steps, say, quiet, limit
        self.live: LiveDisplay | None = None
        self.loss = ""
        self._next, self._pause = 0.0, 5.0  # seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.step, self.last = state.global_step, state.max_steps
        if not self.quiet and sys.stderr.isatty():
            # no refresh thread: redrawn when a step ends
            self.live = LiveDisplay(self, console=Console(stderr=True), auto_refresh=False)
            self.live.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step
        if self.live:
            self.live.refresh()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.quiet or not logs or "loss" not in logs:
            return
        self.loss = f"loss {float(logs['loss']):.3f}" if logs.get("reward") is None else rewarded(logs)
        if self.live:
            self.live.refresh()
        elif time.monotonic() >= self._next or state.global_step == state.max_steps:
            self._next = time.monotonic() + self._pause
            self._pause = min(60.0, 1.5 * self._pause)
            parts = (f"step {state.global_step}/{state.max_steps}", self.loss, self.speed, self.memory)
            self.say("  ".join(part for part in parts if part))

    @property
    def speed(self) -> str:
        """Tokens per second; "" until a step has been timed (from the third on)."""
        rate = self.steps.tokens_per_second
        return f"{rate:,.0f} tokens/s" if rate else ""

    @property
    def memory(self) -> str:
        held = gib(self.steps.meter.held())
        if not self.limit:
            return held
        limit = gib(self.limit)
        number, unit = held.split()
        return f"{number if limit.endswith(' ' + unit) else held} of {limit}"  # a unit that both have is shown once

    @property
    def left(self) -> str:
        """Time left, from the timed steps; "" until there are some."""
        taken = self.steps.seconds
        if not taken:
            return ""
        seconds = int(sum(taken) / len(taken) * (self.last - self.step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The two lines, fitted to the terminal's width by dropping the least important figures."""
        figures = [text for text in (self.loss, self.left, self.speed) if text]
        name = f"step {self.step}/{self.last}"
        of = self.limit or self.steps.meter.total
        share = self.steps.meter.held() / of if of else 0.0
        colour = "green" if share < NEAR[0] else "yellow" if share < NEAR[1] else "red"
        memory = self.memory if self.limit else f"{self.memory}, {of / GIB:.1f} here"
        first = max(len(name), len("fast tier"))
        while len(figures) > 1 and first + len("  ".join(figures)) + 14 > options.max_width:
            figures.pop()
        second = max(len("  ".join(figures)), len(memory))
        table = Table.grid(padding=(0, 1))
        free = options.max_width - first - second - 2
        for label, done, whole, style, text in (
            (name, self.step, self.last, "cyan", "  ".join(figures)),
            ("fast tier", min(share, 1.0), 1.0, colour, Text(memory, style=colour if share >= NEAR[0] else "")),
        ):
            bar = [ProgressBar(total=whole, completed=done, width=min(32, free), complete_style=style,
                               finished_style=style)] if free >= 4 else []  # fmt: skip
            table.add_row(label, *bar, text)
        yield table

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        if self.live:
            self.live.refresh()
            self.live.stop()
            self.live = None


class StopOnInterrupt(TrainerCallback):
    """On Ctrl-C (or SIGTERM), finishes the step, writes a checkpoint and ends the run. A second one ends it at once."""

    def __init__(self, say: Say):
        self.say, self.requested = say, False
        self.number = signal.SIGINT  # the signal that was received
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopOnInterrupt:
        if threading.current_thread() is threading.main_thread():  # Python handles signals only there
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.number = True, signal.Signals(number)
        self.say("Stopping: finishing this step and writing a checkpoint (again to stop at once)")

    def on_step_end(self, args, state, control, **kwargs):
        self.requested = any_process(self.requested, args)
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control


class SaveLast(TrainerCallback):
    """Writes a checkpoint after the last step, whatever save_strategy is."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step >= state.max_steps
        return control


class StopAtLimit(TrainerCallback):
    """When the guard has tripped, finishes the step, writes a checkpoint and ends the run."""

    def __init__(self, guard: Guard, meter: Meter):
        self.guard, self.meter = guard, meter

    def on_step_end(self, args, state, control, **kwargs):
        self.meter.sample()
        if any_process(bool(self.guard.why), args):
            self.guard.why = self.guard.why or "machine"  # another process's guard tripped
            control.should_save = control.should_training_stop = True
        return control


def any_process(flag: bool, args: Any) -> bool:
    """Whether `flag` is set in any process, so that all stop after the same step."""
    if args.world_size > 1:
        flags = torch.tensor(float(flag), device=args.device)
        torch.distributed.all_reduce(flags)
        return bool(flags)
    return flag
