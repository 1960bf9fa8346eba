"""Generates the replies: one thread, batches of what waits, nothing that does not fit.

A batch is the first job that waits, and later ones with the same settings, as many as fit the budget by plan. A job
that would not fit alone is refused (DoesNotFit). Whoever comes later waits for the next batch. A job with a seed is
alone in its batch, so that its random numbers are its own.
"""

from __future__ import annotations

import dataclasses
import secrets
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..errors import BadInput, DoesNotFit, Stopped
from ..inference.session import Inference
from ..memory.budget import gib
from ..memory.guard import ran_out
from ..model.limits import learned_positions, rows_depend
from ..model.sampling import complete, left_padded
from ..planning.inference import Work
from ..planning.plan import Plan
from .jobs import Job
from .protocol import Refused

BETWEEN = 4  # widths of 16-bit batches per doubling: each width costs code that oneDNN keeps


class Room:
    """Which batches fit, by plans. A plan takes a quarter of a second or more, so each is made for a rounded batch if
    that fits, and counts for all smaller ones."""

    def __init__(self, made: Inference):
        self.made = made
        self.fit: list[Work] = []
        self.rest: list[tuple[Work, Plan]] = []  # what does not fit

    def excess(self, work: Work) -> tuple[Work, Plan] | None:
        """None if `work` fits; otherwise a batch no larger than it that does not fit, and its plan."""
        if any(_within(work, one) for one in self.fit):
            return None
        if known := self.known_excess(work):
            return known
        rounded = dataclasses.replace(work, rows=_up(work.rows, 1), tokens=_up(work.tokens), new=_up(work.new))
        if not self.known_excess(rounded) and self._fits(rounded) or self._fits(work):
            return None
        return self.rest[-1]

    def known_excess(self, work: Work) -> tuple[Work, Plan] | None:
        """The same without a new plan: None also if it is not known whether `work` fits."""
        return next((pair for pair in self.rest if _within(pair[0], work)), None)

    def _fits(self, work: Work) -> bool:
        made = self.made.planned(dataclasses.replace(work, packed=self.made.is_packed))
        if made is not None and not made.fits:
            self.rest = [pair for pair in self.rest if not _within(work, pair[0])] + [(work, made)]
            return False
        self.fit = [one for one in self.fit if not _within(one, work)] + [work]
        return True


def too_large(tokens: int, new: int, excess: tuple[Work, Plan]) -> DoesNotFit:
    """The error of a reply of `new` tokens to a prompt of `tokens` tokens, with the plan of `excess`, which may be of
    fewer tokens, or of a prompt that was padded."""
    work, made = excess
    more = "more than " if work.new < new or work.tokens < tokens else ""
    return DoesNotFit(
        f"{gib(made.fast)} of the fast tier to reply with {new} tokens to a prompt of {tokens}",
        f"it would use {more}{gib(made.fast_peak_bytes)} ({made.phase})",
        "Send a shorter prompt, lower max_tokens, or start the server with a larger budget.fast",
    )


def _within(one: Work, other: Work) -> bool:
    return one.rows <= other.rows and one.tokens <= other.tokens and one.new <= other.new


def _up(count: int, least: int = 64) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (count - 1).bit_length())


class Finished(Exception):
    """Ends a batch in which no reply wants more tokens."""


class Tokens(BaseStreamer):
    """Passes each new token of a batch on to its job."""

    def __init__(self, jobs: Sequence[Job], check: Callable[[list[Job]], None]):
        self.jobs, self.check, self.begun = jobs, check, False

    def put(self, value: torch.Tensor) -> None:
        if not self.begun:  # the prompts
            self.begun = True
            return
        active = [job for job in self.jobs if not job.idle]
        self.check(active)
        for job, token in zip(self.jobs, value.tolist(), strict=True):
            if not job.idle:
                job.add(token)
        if all(job.idle for job in self.jobs):
            raise Finished

    def end(self) -> None:
        pass


class Worker:
    """Within `with`, replies to the jobs that are submitted. `rows`: most replies at once; `most`: most that wait.

    `failed` gets the error after which it cannot go on. Errors of a batch go to its jobs.
    """

    def __init__(self, made: Inference, rows: int, most: int, failed: Callable[[Exception], None]):
        self.made, self.most, self.failed = made, most, failed
        self.model, self.tokenizer = made.model, made.tokenizer
        self.rows = 1 if rows_depend(made.model) else rows
        self.places = learned_positions(made.model)
        self.coarse = made.device.type == "cpu" and made.model.dtype.itemsize == 2
        self.room = Room(made)
        self.waiting: deque[Job] = deque()
        self.busy = threading.Condition()
        self.cut_at: float | None = None  # when running replies are cut; set: closing
        self.thread = threading.Thread(target=self._run, name="trimtab-replies", daemon=True)

    # --- from the event loop -------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Refused if too many wait, if the server is stopping, or if it is known that one of `jobs` does not fit."""
        for job in jobs:
            if excess := self.room.known_excess(self._work([job])):
                raise too_large(len(job.ids), job.new, excess)
        with self.busy:
            if self.cut_at is not None:
                raise stopping()
            if len(jobs) > self.most:
                have = f"at most {self.most} can wait"
                raise Refused(400, f"reply to {len(jobs)} prompts", have, "Send them in several requests")
            if len(self.waiting) + len(jobs) > self.most:
                have = f"{len(self.waiting)} others wait already"
                raise Refused(429, "wait for a reply", have, "Try again later", "queue_full")
            self.waiting.extend(jobs)
            self.busy.notify()

    def drop(self, jobs: Sequence[Job]) -> None:
        """The client of `jobs` is gone: nothing more is generated for it."""
        with self.busy:
            for job in jobs:
                job.gone = True
                if job in self.waiting:
                    self.waiting.remove(job)

    def close(self, grace: float) -> None:
        """Refuses what waits; running replies may take `grace` seconds more, then they are cut."""
        with self.busy:
            now = time.monotonic() + grace
            self.cut_at = now if self.cut_at is None else min(now, self.cut_at)
            waiting, self.waiting = list(self.waiting), deque()
            self.busy.notify()
        for job in waiting:
            job.end(stopping())

    # --- its thread ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Worker:
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close(0.0)
        self.thread.join()

    def _run(self) -> None:
        try:
            while self._next():
                pass
        except Exception as error:
            self.close(0.0)
            self.failed(error)

    def _next(self) -> bool:
        """Replies to one batch. -> False if it was the last."""
        with self.busy:
            while not self.waiting and self.cut_at is None:
                self.busy.wait()
            waiting = list(self.waiting)
        if not waiting:
            return False
        batch: list[Job] = []
        try:
            batch = self._batch(waiting)
            with self.busy:
                self.waiting = deque(job for job in self.waiting if job not in batch)
                batch = [job for job in batch if not job.idle]
            if batch:
                self._reply(batch)
        except Exception as error:
            self._end(batch or waiting[:1], error)
        return not self.made.guard.why or self._recovered()

    def _batch(self, waiting: list[Job]) -> list[Job]:
        """The jobs to reply to next, as many as fit."""
        first = waiting[0]
        if excess := self.room.excess(self._work([first])):
            raise too_large(len(first.ids), first.new, excess)
        batch = [first]
        for job in waiting[1:]:
            if len(batch) < self.rows and self._joins(job, batch) and not self.room.excess(self._work([*batch, job])):
                batch.append(job)
        if self.coarse:
            batch = batch[: 1 << (len(batch).bit_length() - 1)]
        return batch

    def _joins(self, job: Job, batch: list[Job]) -> bool:
        """Whether `job` can be in one batch with these. A finished reply gets padding tokens until all are finished,
        and these take positions, of which a model may have learned only so many."""
        if job.seed is not None or batch[0].seed is not None or job.settings != batch[0].settings:
            return False
        work = self._work([*batch, job])
        return self.places is None or work.tokens + work.new <= self.places

    def _work(self, batch: Sequence[Job]) -> Work:
        return self.work(len(batch), max(len(job.ids) for job in batch), max(job.new for job in batch))

    def work(self, rows: int, tokens: int, new: int) -> Work:
        """A batch of `rows` prompts, the longest of `tokens` tokens, with replies of `new`."""
        width = self._width(tokens)
        lengths = BETWEEN * max(1, (rows * width).bit_length() - 2) if self.coarse else 1
        return Work(rows, width, new, lengths)

    def _width(self, width: int) -> int:
        """The width of a batch with prompts of up to `width` tokens: for 16-bit products on a CPU the next of 16, 20,
        24, 28, 32, 40, ..., since each shape of theirs costs memory. Within learned positions in any case."""
        if not self.coarse or width <= 2 * BETWEEN:
            return width
        step = max(1, (1 << (width - 1).bit_length()) // (2 * BETWEEN))
        return min(-(-width // step) * step, self.places or sys.maxsize)

    def _reply(self, batch: list[Job]) -> None:
        for job in batch:
            job.send("")
        work = self._work(batch)
        ids, mask = left_padded([job.ids for job in batch], self.tokenizer.pad_token_id, work.tokens)
        seed = batch[0].seed if batch[0].seed is not None else secrets.randbits(63)
        device = self.made.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            try:
                complete(
                    self.model, self.tokenizer, ids, mask, streamer=Tokens(batch, self._check),
                    cache=self.made.cache(), max_new_tokens=work.new, **batch[0].settings,
                )  # fmt: skip
            except Finished:
                pass
        for job in batch:
            if not job.idle:
                job.finish()

    def _check(self, active: list[Job]) -> None:
        self.made.on_token(len(active))
        if self.cut_at is not None and time.monotonic() >= self.cut_at:
            for job in active:
                job.finish()

    def _end(self, batch: Sequence[Job], error: Exception) -> None:
        """Reports `error` to the clients. A bug is reported on standard error too."""
        if isinstance(error, Stopped) and self.made.guard.why == "machine":
            error = Refused(503, error.asked, error.have, "Try again later")
        elif ran_out(error):
            have = "this machine has no memory left for it"
            error = Refused(503, "reply to the request", have, "Try again later, or send a shorter one")
        elif not isinstance(error, BadInput | DoesNotFit | Stopped | Refused):
            traceback.print_exception(error)
        error = error.with_traceback(None)
        error.__context__ = error.__cause__ = None
        with self.busy:
            self.waiting = deque(job for job in self.waiting if job not in batch)
        for job in batch:
            job.end(error)

    def _recovered(self) -> bool:
        """After the guard has tripped: whether memory is within the limits again, now that the batch is gone."""
        guard = self.made.guard
        for _ in range(20):  # a malloc returns memory with some delay
            guard.why, guard.least_left = "", None
            self.made.meter.sample()
            if guard.why != "budget":
                return True
            time.sleep(0.1)
        asked, have = guard.describe()
        error = Stopped(asked, f"{have}, and still does without any reply", "Allow more with budget.fast")
        self.close(0.0)
        self.failed(error)
        return False


def stopping() -> Refused:
    return Refused(503, "reply to the request", "the server is stopping", "Try again when it runs again")
