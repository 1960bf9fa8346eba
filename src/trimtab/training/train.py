"""`trimtab train RECIPE.yaml`: read, load, patch, train, save, report.

The order is chosen so that what is cheap to refuse is refused first: the recipe, then the output folder, then the
data, then the model. Nothing is written before all of them are found good. A run whose plan exceeds its budget does not
start; one that holds too much as it goes on is stopped with a checkpoint (memory/guard.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import methods
from ..artifacts.checkpoint_files import check_files
from ..artifacts.run_folder import begin_run, checkpoints, finished_run, lock_run, open_run
from ..cost.machine import machine, now, versions
from ..errors import BadInput, Interrupted, Stopped
from ..files import write_json
from ..memory.meter import GIB
from ..quiet import hushed, no_dataset_bars
from ..recipe import Recipe

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from .session import Ended, Session


@hushed()
@no_dataset_bars()
def train(
    recipe: Recipe, quiet: bool = True, say: Callable[[str], None] | None = None, hard: bool = False
) -> dict[str, Any]:
    """Run a recipe; returns what run.json holds. `hard`: its budget of the fast tier is a limit of the process too.

    Raises BadInput for what the user must mend, DoesNotFit before a run that its budget does not hold, Stopped for one
    that held too much on the way, and Interrupted after Ctrl-C (a checkpoint is then in the folder).
    """
    began = time.monotonic()
    if not recipe.trains:
        have = "the recipe has no patch" + (" that is trained" if recipe.patches else "")
        raise BadInput("train", have, f"Add one under patches: {', '.join(methods.names('patch', 'train'))}")
    if hard and not (recipe.budget or {}).get("fast"):
        raise BadInput("train --hard", "the recipe states no budget.fast", "Say, for example, budget.fast=2GiB")
    from .progress import speaker

    say = say or speaker(quiet)
    with lock_run(recipe.output, f"train into {recipe.output}"):
        output, checkpoint = open_run(recipe)
        if recipe.resume and (done := finished_run(recipe, checkpoint)):
            say(f"{output} is finished after {done['steps']} steps: nothing is left to train, and nothing was changed")
            return done
        if checkpoint is not None:
            check_files(checkpoint)
        return _run(recipe, output, checkpoint, quiet, say, hard, began)


def _run(
    recipe: Recipe, output: Path, checkpoint: Path | None, quiet: bool, say: Callable[[str], None], hard: bool,
    began: float,
) -> dict[str, Any]:  # fmt: skip
    """Load, train from `checkpoint` on, and save; -> what run.json holds."""
    from ..artifacts.adapter import save_adapter
    from ..engine.tables import row_numbers
    from ..planning.remembered import shown
    from .session import Session  # imports TRL: after the cheap checks

    session = Session(recipe, output, say, quiet)
    _possible(session)
    with _trouble_writing_told(output), session:
        say = session.say
        made = _planned(session)
        if session.main:  # nothing is written before this line
            begin_run(output, recipe, resumed=checkpoint is not None)
        trainable = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
        trainable += row_numbers(session.surgeries)
        total = sum(t.numel() for s in session.surgeries for t in s.own_tensors().values())
        patches = " + ".join(map(methods.name_of, session.patches))
        say(f"{patches} on {recipe.model.name}: {trainable:,} numbers are trained")
        ended = session.fit(checkpoint, made.budget.fast if made else None, hard)
        if ended.why:
            raise _stopped(session, ended, made, hard)
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
        _tell(trained, output, say)
        return trained


@contextlib.contextmanager
def _trouble_writing_told(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOENT and not output.is_dir():
            raise BadInput(
                f"write into {output}", "the folder has gone since the run began",
                "Start the run anew, and leave its folder where it is until it ends",
            ) from error  # fmt: skip
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise BadInput(
            f"write into {output}", error.strerror or str(error), "Make room, or name another output"
        ) from error


def _possible(session: Session) -> None:
    """Refuse a run whose budget would not hold its shortest batch before tables are made: they may be large.

    How long its rows are is known only when there is a trainer; `_planned` refuses what the longest would exceed.
    """
    from ..memory.meter import process_memory
    from ..planning.fit import require_fit
    from ..planning.plan import plan

    recipe = session.recipe
    if recipe.budget and session.args.world_size == 1 and any(patch.uses_tables for patch in session.patches):
        made = plan(recipe, args=session.args, rows=1, tokens=2, process=0)
        here = max(0, process_memory()["anon"] - made.kinds.get("weights", 0))  # they are loaded by now
        require_fit(dataclasses.replace(made, process=here, phase="with one row of two tokens"), recipe)


def _planned(session: Session) -> Plan | None:
    """What the plan predicts for the longest rows. A run over its `budget:` is refused here.

    Without a budget, a run that the planner does not cover goes on without a prediction.
    """
    from ..planning.fit import require_fit
    from ..planning.plan import plan

    recipe = session.recipe
    if session.args.world_size > 1:
        if recipe.budget:
            raise BadInput("budget: with several processes", "the planner knows runs of one process", "Take it out")
        return None
    try:
        made = plan(recipe, args=session.args, **session.largest_batch())
    except BadInput:
        if recipe.budget:
            raise
        return None
    held = made.start_bytes - made.process
    made = dataclasses.replace(made, process=max(0, session.meter.rebase() - held), disk=None)  # tables are made by now
    if recipe.budget:
        require_fit(made, recipe)
        session.say(f"planned: {made.fast_peak_bytes / GIB:.2f} GiB of the fast tier at the peak")
    return made


def _stopped(session: Session, ended: Ended, made: Plan | None, hard: bool) -> Exception:
    """The error that a run ends with which did not come to its end."""
    from ..planning.fit import advice

    output, guard = session.output, session.guard
    at = f"step {ended.step} of {ended.wanted}"
    left = checkpoints(output)
    if ended.why == "interrupt":
        return Interrupted(f"stopped after {at}", f"{left[-1]} holds everything", "Go on with resume=true")
    if ended.diverged:
        good = [path for path in left if int(path.name.split("-")[-1]) <= ended.diverged.good]
        have = f"{ended.diverged.what}; "
        have += f"{good[-1]} is from before that" if good else "no checkpoint is from before that"
        rate = session.args.learning_rate
        how = f"Begin again with overwrite=true and training.learning_rate={rate / 4:.1e} (it was {rate:.1e})"
        return Stopped(f"step {ended.step + 1} of {ended.wanted}", have, f"{how}, or say engine.stop_if_diverged=false")
    limit = guard.budget
    if ended.why == "refused":
        asked = f"step {ended.step + 1} of {ended.wanted}"
        asked += f" within {guard.budget / GIB:.2f} GiB (--hard)" if hard and guard.budget else ""
        have = "an allocation was refused" if guard.budget else "the memory ran out"
        held = max(guard.most, (limit or 0) + 1)
    else:
        asked, have = guard.describe()
        have, held = f"{have} up to {at}, where it was stopped", guard.most
        if ended.why == "machine":
            limit = None
    have += f"; {left[-1]} is complete" if left else "; no checkpoint had been written yet"
    how = "Go on with resume=true and" if left else "Begin again with overwrite=true and"
    return Stopped(asked, have, f"{how} {advice(session.recipe, made, held, limit)}")


def _record(session: Session, began: float) -> dict[str, Any]:
    """What the run did and held: the measured part of run.json."""
    from ..engine.tables import traffic

    trainer, steps = session.trainer, session.steps
    tokens = trainer.tokens()
    share = trainer._total_train_tokens / max(tokens, 1)  # what this process saw of them
    return {
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "kept_step": _kept_step(trainer),
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
    """The newest line of the log with `key` up to the step whose weights were kept."""
    kept = _kept_step(trainer)
    return next((row for row in reversed(trainer.state.log_history) if key in row and row["step"] <= kept), {})


def _evaluation(trainer: Any) -> dict[str, float]:
    """The `eval_*` figures of the weights that were kept, where the recipe asked for evaluation on the way."""
    return {key: value for key, value in _newest(trainer, "eval_loss").items() if key.startswith("eval_")}


def _final_loss(trainer: Any) -> float | None:
    loss = _newest(trainer, "loss").get("loss")
    return None if loss is None else float(loss)


def _tell(run: dict[str, Any], output: Path, say: Callable[[str], None]) -> None:
    measured = run["measured"]
    loss = "" if run["final_loss"] is None else f", loss {run['final_loss']:.3f}"
    if run["kept_step"] != run["steps"]:
        loss += f" at step {run['kept_step']}, the best, whose weights are kept"
    rate = measured["tokens_per_second"]  # 0 where no step was timed
    speed = f", {rate:,.0f} tokens/s" if rate else ""
    say(f"{run['steps']} steps, {run['tokens']:,} tokens{loss}{speed}")
    growth = measured["fast_growth_bytes"] / GIB
    say(f"fast tier: {measured['fast_peak_bytes'] / GIB:.2f} GiB at the peak, {growth:.2f} GiB of it for this run")
    if "store_up_bytes_per_step" in measured:
        moved = measured["store_up_bytes_per_step"] + measured["store_down_bytes_per_step"]
        share = measured.get("store_prefetch_hit_rate")
        ahead = "" if share is None else f", {share:.0%} of the rows read ahead in time"
        say(f"tables: {moved / GIB:.2f} GiB moved a step{ahead}")
    say(f"{output / 'adapter'}: the adapter    {output / 'run.json'}: all figures")
