"""`trimtab train RECIPE.yaml`: reads, loads, patches, trains, saves and reports.

Cheap checks come first: the recipe, then the output folder, the data, the model. Nothing is written before all of them
pass. A run whose plan exceeds its budget does not start; one that uses too much is stopped with a checkpoint
(memory/guard.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import methods
from ..artifacts.checkpoint_files import check_files
from ..artifacts.run_folder import begin_run, checkpoints, finished_run, lock_run, open_run
from ..cost.machine import machine, now, versions
from ..errors import BadInput, Interrupted, Stopped
from ..files import write_json
from ..memory.budget import gib
from ..quiet import no_dataset_bars, silence_libraries
from ..recipe import Recipe

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from .session import Ended, Session, Start


NOT_TAKEN = {  # keys of run.json: why a stepper took no step
    "skipped_steps": "their losses were not finite",
    "flat_steps": "the loss did not change between the points (a larger eps or more directions may help)",
}


@silence_libraries()
@no_dataset_bars()
def train(
    recipe: Recipe, quiet: bool = True, say: Callable[[str], None] | None = None, hard: bool = False,
    baselines: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Runs a recipe; -> the content of run.json. `hard`: its budget of the fast tier also limits the process.
    `baselines`: of several stages, what they are compared with (training/baselines.py).

    Raises BadInput for a mistake in the recipe or the data, DoesNotFit before a run that would exceed its budget,
    Stopped during a run that exceeds it, and Interrupted after Ctrl-C (with a checkpoint in the folder).
    """
    began = time.monotonic()
    if not recipe.trains:
        have = "the recipe has no patch" + (" that is trained" if recipe.patches else "")
        raise BadInput("train", have, f"Add one under patches: {', '.join(methods.names('patch', 'train'))}")
    if hard and not (recipe.budget or {}).get("fast"):
        raise BadInput("train --hard", "the recipe has no budget.fast", "Set it, for example budget.fast=2GiB")
    from .progress import speaker

    say = say or speaker(quiet)
    with lock_run(recipe.output, f"train into {recipe.output}"), _write_errors(Path(recipe.output)):
        for key in ("rehearsal", "anchor", "neutral"):
            if getattr(recipe, key) and not recipe.stages:
                raise BadInput(key, "the recipe has no stages", "Remove it, or add stages")
        if recipe.stages:
            from .baselines import check_baselines, train_baselines
            from .stages import train_stages

            check_baselines(recipe, baselines)
            result = train_stages(recipe, _run, quiet, say, hard, began)
            return train_baselines(recipe, baselines, _run, quiet, say, hard, result) if baselines else result
        if baselines:
            raise BadInput(f"--baselines {','.join(baselines)}", "the recipe has no stages", "Add stages, one per task")
        output, checkpoint = open_run(recipe)
        if recipe.resume and (done := finished_run(recipe, checkpoint)):
            say(f"{output} finished after {done['steps']} steps: there is nothing left to train")
            return done
        if checkpoint is not None:
            check_files(checkpoint)
        return _run(recipe, output, checkpoint, quiet, say, hard, began)


def _run(
    recipe: Recipe, output: Path, checkpoint: Path | None, quiet: bool, say: Callable[[str], None], hard: bool,
    began: float, start: Start | None = None, begin: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Loads, trains (from `checkpoint` on) and saves; -> the content of run.json. `begin` is called before the first
    write."""
    from ..artifacts.adapter import save_adapter
    from ..engine.tables import row_parameters
    from ..planning.remembered import shown
    from .session import Session, Start  # imports TRL: after the cheap checks

    session = Session(recipe, output, say, quiet, checkpoint is not None, start or Start())
    _check_shortest(session)
    with session:
        say = session.say
        made = _planned(session)
        if session.main:  # nothing is written before this line
            begin()
            begin_run(output, recipe, resumed=checkpoint is not None)
        trainable = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
        trainable += row_parameters(session.surgeries)
        total = sum(t.numel() for s in session.surgeries for t in s.own_tensors().values())
        patches = " + ".join(map(methods.name_of, session.patches))
        say(f"{patches} on {recipe.model.name}: {trainable:,} trained parameters")
        ended = session.fit(checkpoint, made.budget.fast if made else None, hard, began)
        if ended.why:
            raise _stopped(session, ended, made, hard)
        if session.main:
            session.keep()
        session.meter.stop()
        trained = {
            "recipe": recipe.hash, "finished": now(), "output": str(output),
            "trainable_parameters": trainable, "adapter_numbers": total, "mean_loss": ended.mean_loss,
            **_record(session, began), "predicted": made.predicted() if made else {},
            "shown": shown(recipe),
            "budget": dataclasses.asdict(made.budget) if made else {},
            "processes": session.args.world_size, "machine": machine(), "versions": versions(),
        }  # fmt: skip
        if session.main:
            save_adapter(output / "adapter", session.surgeries, session.base)
            write_json(output / "run.json", trained)
        _report(trained, output, say)
        return trained


@contextlib.contextmanager
def _write_errors(output: Path) -> Iterator[None]:
    """BadInput for a folder that was removed or cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOENT and not output.is_dir():
            raise BadInput(
                f"write into {output}", "the folder was removed during the run",
                "Start the run again, and leave its folder in place until it ends",
            ) from error  # fmt: skip
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
                               errno.EIO):  # fmt: skip
            raise
        raise BadInput(
            f"write into {output}", error.strerror or str(error), "Free some space, or name another output"
        ) from error


def _check_shortest(session: Session) -> None:
    """DoesNotFit if even the shortest batch exceeds the budget, before tables are allocated: they may be large.

    The lengths of rows are known only with a trainer; `_planned` checks the longest.
    """
    from ..memory.meter import process_memory
    from ..planning.fit import require_fit
    from ..planning.plan import plan

    recipe = session.recipe
    if recipe.budget and session.args.world_size == 1 and any(patch.uses_tables for patch in session.patches):
        made = plan(recipe, args=session.args, rows=1, tokens=2, process=0)
        here = max(0, process_memory()["anon"] - made.kinds.get("weights", 0))  # the weights are loaded already
        require_fit(dataclasses.replace(made, process=here, phase="with one row of two tokens"), recipe)


def _planned(session: Session) -> Plan | None:
    """The plan for the longest rows. DoesNotFit if it exceeds the recipe's budget.

    None, without a budget, for a run that the planner does not cover.
    """
    from ..engine.arguments import time_limit
    from ..engine.tables import expert_bytes
    from ..planning.fit import require_fit
    from ..planning.plan import plan
    from ..planning.planned_model import taken
    from .time_limit import require_step

    recipe = session.applied
    if session.args.world_size > 1:
        if recipe.budget:
            raise BadInput("budget: with several processes", "only runs of one process can be planned", "Remove it")
        return None
    try:
        made = plan(recipe, args=session.args, **session.largest_batch())
    except BadInput:
        if recipe.budget:
            raise
        return None
    loaded = made.start_bytes - made.process + expert_bytes(session.surgeries)
    made = dataclasses.replace(made, process=max(0, session.meter.rebase() - loaded), disk=None)  # tables exist already
    require_step(time_limit(recipe), made.step_seconds(session.args.gradient_accumulation_steps))
    if recipe.budget:
        require_fit(made, recipe)
    made = made.settled(session.place.device, lambda spare: taken(session.surgeries, spare))
    if recipe.budget:
        session.say(f"planned: {gib(made.fast_peak_bytes)} of the fast tier at the peak")
    return made


def _stopped(session: Session, ended: Ended, made: Plan | None, hard: bool) -> Exception:
    """The exception for a run that stopped early."""
    from ..planning.fit import advice

    output, guard = session.output, session.guard
    at = f"step {ended.step} of {ended.wanted}"
    left = checkpoints(output)
    if ended.why == "time":
        return session.timer.stopped(at, left[-1], session.resumed)
    if ended.why == "interrupt":
        stopped = Interrupted(f"stopped after {at}", f"{left[-1]} is complete", "Continue with resume=true")
        stopped.exit_code = 128 + session.interrupt.number
        return stopped
    if ended.why == "lost":
        have = f"{left[-1]} is complete" if left else "no checkpoint had been written yet"
        how = "resume=true" if left else "overwrite=true, and set save_strategy: steps"
        asked = f"step {ended.step + 1} of {ended.wanted} in {session.args.world_size} processes"
        return Stopped(asked, f"another process has ended or cannot be reached; {have}", f"Start all again with {how}")
    if ended.failed:
        have = f"{left[-1]} is complete" if left else "no checkpoint had been written yet"
        return type(ended.failed)(ended.failed.asked, f"{ended.failed.have}; {have}", ended.failed.do)
    if ended.diverged:
        good = [path for path in left if int(path.name.split("-")[-1]) <= ended.diverged.good]
        have = f"{ended.diverged.what}; "
        have += f"{good[-1]} is from before that" if good else "no checkpoint is from before that"
        rate = session.args.learning_rate
        how = f"Start again with overwrite=true and training.learning_rate={rate / 4:.1e} (it was {rate:.1e})"
        return Stopped(f"step {ended.step + 1} of {ended.wanted}", have, f"{how}, or set engine.stop_if_diverged=false")
    limit = guard.budget
    if ended.why == "refused":
        asked = f"step {ended.step + 1} of {ended.wanted}"
        asked += f" within {gib(guard.budget)} (--hard)" if hard and guard.budget else ""
        have = "an allocation failed" if guard.budget else "the memory ran out"
        used = max(guard.most, (limit or 0) + 1)
    else:
        asked, have = guard.describe()
        have, used = f"{have} up to {at}, where it was stopped", guard.most
        if ended.why == "machine":
            limit = None
    have += f"; {left[-1]} is complete" if left else "; no checkpoint had been written yet"
    how = "Continue with resume=true and" if left else "Start again with overwrite=true and"
    return Stopped(asked, have, f"{how} {advice(session.recipe, made, used, limit)}")


def _record(session: Session, began: float) -> dict[str, Any]:
    """The measured part of run.json."""
    from ..engine.tables import traffic

    trainer, steps = session.trainer, session.steps
    tokens = trainer.tokens()
    share = trainer._total_train_tokens / max(tokens, 1)  # this process's share of them
    return {
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "kept_step": _kept_step(trainer),
        **session.stepper.record(),
        "final_loss": _final_loss(trainer),
        "evaluation": _evaluation(trainer),
        "measured": {
            **session.meter.result(),
            "live_peak_bytes": steps.live_peak,
            "phase": steps.live_phase,
            "bytes": steps.live_bytes,
            "mapped_weight_bytes": steps.live_mapped,
            "tokens_per_second": round(steps.tokens_per_second / (share or 1.0), 2),
            "seconds_to_first_step": round((steps.first_step_at or time.monotonic()) - began, 2),
            "seconds": round(time.monotonic() - began, 2),
            **traffic(session.surgeries, trainer.state.global_step - steps.first),
        },
    }


def _kept_step(trainer: Any) -> int:
    """The step whose weights the adapter has: the best one with `load_best_model_at_end`, else the last."""
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return best or trainer.state.global_step


def _newest(trainer: Any, key: str) -> dict[str, Any]:
    """The newest line of the log with `key` up to the step whose weights the adapter has."""
    last = _kept_step(trainer)
    return next((row for row in reversed(trainer.state.log_history) if key in row and row["step"] <= last), {})


def _evaluation(trainer: Any) -> dict[str, float]:
    """The `eval_*` figures of the adapter's weights, if the recipe evaluates during training."""
    return {key: value for key, value in _newest(trainer, "eval_loss").items() if key.startswith("eval_")}


def _final_loss(trainer: Any) -> float | None:
    loss = _newest(trainer, "loss").get("loss")
    return None if loss is None else float(loss)


def _report(run: dict[str, Any], output: Path, say: Callable[[str], None]) -> None:
    measured = run["measured"]
    loss = "" if run["final_loss"] is None else f", loss {run['final_loss']:.3f}"
    if run["kept_step"] != run["steps"]:
        loss += f" at step {run['kept_step']}, the best, whose weights are kept"
    rate = measured["tokens_per_second"]  # 0 if no step was timed
    speed = f", {rate:,.0f} tokens/s" if rate else ""
    say(f"{run['steps']} steps, {run['tokens']:,} tokens{loss}{speed}")
    for key, what in NOT_TAKEN.items():
        if run.get(key):
            say(f"{run[key]} of {run['steps']} steps did nothing: {what}")
    peak, growth = gib(measured["fast_peak_bytes"]), gib(measured["fast_growth_bytes"])
    say(f"fast tier: {peak} at the peak, {growth} of it for this run")
    if "store_up_bytes_per_step" in measured:
        transferred = measured["store_up_bytes_per_step"] + measured["store_down_bytes_per_step"]
        share = measured.get("store_prefetch_hit_rate")
        ahead = "" if share is None else f", {share:.0%} of the rows prefetched in time"
        say(f"tables: {gib(transferred)} transferred per step{ahead}")
    say(f"{output / 'adapter'}: the adapter    {output / 'run.json'}: all figures")
