"""The guard: a run that holds too much ends with a checkpoint and code 4, and goes on from there bit for bit."""

from __future__ import annotations

import errno
import io
import math
import os
import random
import resource
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console

import trimtab
from helpers_run import forked, left, make_world, metrics, same, tree
from trimtab.data.order import LongestFirst, filled
from trimtab.engine import trainers as engine
from trimtab.errors import BadInput, Stopped
from trimtab.memory import guard, meter
from trimtab.memory.guard import Guard, ran_out, reserve_bytes
from trimtab.memory.meter import GIB, Meter, Sample, process_memory, worker_memory
from trimtab.recipe import Recipe
from trimtab.training import progress
from world import at_step

pytestmark = pytest.mark.filterwarnings("ignore")
MIB = 2**20
STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def run(keys: dict, hard: bool = False, **changed) -> dict:
    return Recipe.from_dict({**keys, **changed}).train(hard=hard)


def within(mib: int) -> dict:
    """A budget of so much more than this process holds."""
    return {"budget": {"fast": process_memory()["anon"] + mib * MIB}}


# --- stopped, and gone on --------------------------------------------------------------------------------------------


def test_a_run_over_its_budget_stops_with_a_checkpoint_and_goes_on(world, tmp_path):
    keys = tree(world, tmp_path / "whole", {"paca": {"r": 4}}, **STEPS)
    run(keys)
    parts, ballast = {**keys, "output": str(tmp_path / "parts")}, []
    with at_step(3, lambda: ballast.append(torch.ones(160 * MIB // 4))), pytest.raises(Stopped) as stopped:
        run(parts, **within(128))
    said = str(stopped.value)
    assert stopped.value.exit_code == 4
    for words in ("stay within", "step 3 of 6", "checkpoint-3 is complete", "resume=true", "budget.fast"):
        assert words in said, said
    assert [p.name for p in engine.checkpoints(tmp_path / "parts")] == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "parts" / "run.json").exists() and not list((tmp_path / "parts").glob(".*"))
    ballast.clear()
    run(parts, resume=True, **within(160))
    same(left(tmp_path / "whole"), left(tmp_path / "parts"))


def test_it_goes_on_in_smaller_micro_batches(world, tmp_path):
    keys = tree(world, tmp_path / "whole", {"paca": {"r": 4}}, **STEPS, optim="sgd")
    run(keys)
    parts, ballast = {**keys, "output": str(tmp_path / "parts")}, []
    with at_step(2, lambda: ballast.append(torch.ones(160 * MIB // 4))), pytest.raises(Stopped):
        run(parts, **within(128))
    ballast.clear()
    halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "activation_checkpointing": True}
    run({**parts, "training": {**parts["training"], **halves}}, resume=True)
    for (_, a, *_), (_, b, *_) in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    with pytest.raises(BadInput, match="started with"):
        run({**parts, "training": {**parts["training"], "per_device_train_batch_size": 1}}, resume=True)


def test_a_machine_that_runs_short_stops_a_run_without_a_budget(world, tmp_path, monkeypatch):
    keys = tree(world, tmp_path / "run", {"paca": {"r": 4}}, max_steps=4)
    with at_step(2, lambda: monkeypatch.setattr(meter, "available_memory", lambda: 5 * MIB)):
        monkeypatch.setattr(Meter, "EVERY", 1)
        with pytest.raises(Stopped, match=r"5\.0 MiB was left.*checkpoint-2.*engine.recompute=ffn, which uses less"):
            run(keys)


def test_a_guard_that_trips_in_the_last_step_lets_the_run_finish(world, tmp_path):
    ballast = []
    with at_step(2, lambda: ballast.append(torch.ones(160 * MIB // 4))):
        found = run(tree(world, tmp_path / "run", {"paca": {"r": 4}}, max_steps=2), **within(128))
    assert found["steps"] == 2 and (tmp_path / "run" / "adapter").is_dir()


def test_what_the_guard_sees():
    assert reserve_bytes(4 * GIB) == 256 * MIB and reserve_bytes(16 * GIB) == 512 * MIB and reserve_bytes(2**40) == GIB
    seen = Guard(budget=100, reserve=10)
    seen.see(Sample(held=100, left=10, anon=0, mapped=0))
    assert not seen.why
    seen.see(Sample(held=101, left=None, anon=0, mapped=0))
    seen.see(Sample(held=50, left=9, anon=0, mapped=0))
    assert seen.why == "budget" and seen.most == 101
    short = Guard(reserve=10)
    short.see(Sample(held=7, left=9, anon=0, mapped=0))
    assert short.why == "machine" and "was left" in short.describe()[1]


def test_a_machine_short_from_the_start_is_not_watched(monkeypatch):
    monkeypatch.setattr(guard, "available_memory", lambda: MIB)
    assert Guard.of(None, torch.device("cpu")).reserve == 0
    monkeypatch.setattr(guard, "available_memory", lambda: None)
    assert Guard.of(5, torch.device("cpu")) == Guard(5)


def test_workers_are_counted():
    def child():
        (done_read, done_write), (ready_read, ready_write) = os.pipe(), os.pipe()
        before = worker_memory()
        pid = os.fork()
        if not pid:
            block = torch.ones(32 * MIB // 4)
            os.write(ready_write, b"x")
            os.read(done_read, 1)
            os._exit(int(block[0]) - 1)
        os.read(ready_read, 1)
        found = worker_memory() - before
        os.write(done_write, b"x")
        os.waitpid(pid, 0)
        assert 32 * MIB <= found < 64 * MIB, found

    assert forked(child) == 0


# --- a limit of the process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("take", [lambda: torch.ones(2**30), lambda: bytearray(2**32)], ids=["torch", "python"])
def test_an_allocation_over_a_hard_budget_ends_with_4(take, world, tmp_path, capfd):
    keys = tree(world, tmp_path / "run", {"paca": {"r": 4}}, **STEPS)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with at_step(5, take), pytest.raises(Stopped) as stopped:
        run(keys, hard=True, **within(512))
    said = str(stopped.value)
    for words in ("step 6 of 6 within", "--hard", "allocation failed", "checkpoint-4 is complete", "resume=true"):
        assert words in said, said
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert [p.name for p in engine.checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "run" / "run.json").exists() and not list((tmp_path / "run").glob(".*"))
    run(keys, resume=True, hard=True, **within(512))
    whole = {**keys, "output": str(tmp_path / "whole")}
    run(whole)
    same(left(tmp_path / "whole"), left(tmp_path / "run"))
    assert "Traceback" not in capfd.readouterr().err


def test_a_hard_budget_holds_what_is_really_held(world, tmp_path):
    """The kernel lets pages be taken up to the budget, and no further."""

    def child():
        watch = Meter().start()
        budget = process_memory()["anon"] + 256 * MIB
        with guard.hard_limit(budget, torch.device("cpu"), watch):
            torch.ones(224 * MIB // 4)
            reserved = torch.empty(200 * MIB // 4)  # mapped and not touched: costs nothing once it has been seen
            watch.sample()
            block = torch.ones(128 * MIB // 4)
            watch.sample()
            try:
                torch.ones(192 * MIB // 4)
            except RuntimeError as error:
                assert ran_out(error)
            else:
                raise AssertionError("more than the budget was given")
            assert len(reserved) > len(block) and process_memory()["anon"] <= budget
        watch.stop()
        torch.ones(512 * MIB // 4)

    assert forked(child) == 0


def test_hard_needs_a_budget(world, tmp_path, call):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree(world, tmp_path / "out", {"paca": {"r": 4}}, max_steps=1)))
    code, _, err = call("train", path, "--hard")
    assert code == 2 and "budget.fast" in err and not (tmp_path / "out").exists()
    code, _, err = call("train", path, "--hard", "budget.fast=1MiB")
    assert code == 3 and not (tmp_path / "out").exists()
    code, _, err = call("train", path, "--hard", "budget.fast=90%", "-q")
    assert code == 0 and (tmp_path / "out" / "run.json").exists()


def test_which_errors_say_that_memory_ran_out():
    def raised(outer: Exception, inner: Exception) -> Exception:
        try:
            raise outer from inner
        except Exception as error:
            return error

    assert ran_out(MemoryError()) and ran_out(torch.OutOfMemoryError()) and ran_out(OSError(errno.ENOMEM, "x"))
    assert ran_out(raised(ValueError("x"), MemoryError()))
    primitive = RuntimeError("could not create a primitive")
    assert ran_out(primitive, hard=True) and not ran_out(primitive)
    assert (
        not ran_out(RuntimeError("shape"), hard=True) and not ran_out(OSError(errno.ENOSPC, "x")) and not ran_out(None)
    )


# --- the longest row first -------------------------------------------------------------------------------------------


def widths(keys: dict, monkeypatch) -> list[list[int]]:
    """The lengths of the rows of each training batch, in the order in which they came."""
    found: list[list[int]] = []
    real = engine._OurTrainer.loss_of

    def seen(self, model, inputs, count):
        found.append(inputs["attention_mask"].sum(-1).tolist())
        return real(self, model, inputs, count)

    with monkeypatch.context() as patched:
        patched.setattr(engine._OurTrainer, "loss_of", seen)
        run(keys)
    return found


def test_the_longest_row_comes_first_and_every_row_once(world, tmp_path, monkeypatch):
    keys = tree(world, tmp_path / "ours", {"paca": {"r": 4}}, num_train_epochs=2)
    ours = widths(keys, monkeypatch)
    monkeypatch.setattr(engine, "longest_first", lambda sampler, trainer: sampler)
    theirs = widths({**keys, "output": str(tmp_path / "theirs")}, monkeypatch)
    flat = [[n for batch in order for n in batch] for order in (ours, theirs)]
    assert max(ours[0]) == max(flat[0]) and flat[0][15:] == flat[1][15:] and len(flat[0]) == 30
    assert max(ours[1]) == max(n for batch in ours[1:8] for n in batch), "the second step has the optimizer's state too"
    assert sum(a != b for a, b in zip(*flat, strict=True)) <= 4
    assert sorted(flat[0][:15]) == sorted(flat[1][:15])


def test_another_order_is_left_alone(world, tmp_path, monkeypatch):
    for strategy in ("sequential", "group_by_length"):
        keys = tree(world, tmp_path / strategy, {"paca": {"r": 4}}, max_steps=4, train_sampling_strategy=strategy)
        found = widths(keys, monkeypatch)
        if strategy == "sequential":
            keys["output"] += "2"
            monkeypatch.setattr(engine, "longest_first", lambda sampler, trainer: sampler)
            assert widths(keys, monkeypatch) == found and max(found[0]) < max(sum(found, []))
            monkeypatch.undo()
        else:
            assert max(found[0]) == max(sum(found, []))


@pytest.mark.parametrize("batch,times", [(2, 1), (2, 2), (4, 3), (50, 2)])
def test_the_order_stays_a_permutation(batch, times):
    from accelerate.data_loader import SeedableRandomSampler

    lengths = torch.randint(1, 9, (20,)).numpy()
    inner = SeedableRandomSampler(range(20), data_seed=3)
    plain = list(inner)
    inner.set_epoch(0)
    order = LongestFirst(inner, lengths, batch, times)
    found = list(order)
    assert sorted(found) == list(range(20)) and len(order) == 20
    assert sum(a != b for a, b in zip(found, plain, strict=True)) <= 4
    step = batch * times
    assert lengths[found[:batch]].max() == lengths.max()
    if step < 20:
        assert lengths[found[step : step + batch]].max() == lengths[found[step:]].max()
    order.set_epoch(0)
    assert list(order) == found
    whole = LongestFirst(inner, lengths, step, 1)
    whole.set_epoch(0)
    for start in range(0, 20, step):
        rows = [sorted(one[start : start + step]) for one in (found, list(whole))]
        assert rows[0] == rows[1], "the same rows in each step, however it is cut"
        whole.set_epoch(0)
    order.set_epoch(1)
    later = list(order)
    inner.set_epoch(1)
    assert later == list(inner) != plain
    even = LongestFirst(inner, lengths * 0 + 5, batch, times)
    even.set_epoch(0)
    assert list(even) == plain


@pytest.mark.parametrize("step", [1, 8])
def test_the_share_of_a_batch_that_is_no_padding(step):
    lengths = torch.randint(1, 30, (4000,), generator=torch.Generator().manual_seed(1)).numpy()
    draw, kept, padded = random.Random(5), 0, 0
    for _ in range(2000):
        batch = [int(n) for n in draw.choices(lengths, k=4)]
        kept, padded = kept + sum(batch), padded + 4 * step * math.ceil(max(batch) / step)
    assert filled(lengths, 4, step) == pytest.approx(kept / padded, abs=0.02)
    assert filled(lengths * 0 + 16, 4, step) == 1.0 and filled(lengths[:3] * 0 + 4, 4, 16) == 0.25


# --- what is shown ---------------------------------------------------------------------------------------------------


def shown(width: int, held: float, limit: float | None) -> tuple[list[str], progress.Live]:
    holder = SimpleNamespace(held=lambda: int(held * GIB), total=24 * GIB)
    steps = SimpleNamespace(meter=holder, tokens_per_second=1234.0, seconds=[0.5])
    live = progress.Live(steps, print, quiet=True, limit=None if limit is None else int(limit * GIB))
    state = SimpleNamespace(global_step=0, max_steps=100)
    live.on_train_begin(None, state, None)
    live.step, live.loss = 40, "loss 2.345"
    console = Console(record=True, width=width, force_terminal=True, color_system="truecolor", file=io.StringIO())
    console.print(live)
    return console.export_text(styles=True).splitlines(), live


@pytest.mark.parametrize("width", [28, 40, 60, 80, 120, 200])
def test_the_bars_fit_the_width(width):
    lines, _ = shown(width, 1.02, 2.0)
    assert len(lines) == 2, lines
    plain = Console(width=width, record=True, file=io.StringIO())
    plain.print(shown(width, 1.02, 2.0)[1])
    text = plain.export_text().splitlines()
    assert "40/100" in text[0] and "loss 2.345" in text[0] and "1.02 of 2.00 GiB" in text[1]
    assert all(len(line.rstrip()) <= width for line in text)
    if width >= 80:
        assert "1,234 tokens/s" in text[0] and "left" in text[0] and "━━" in text[0] and "━━" in text[1]


def test_the_bar_warns_by_its_colour():
    codes = [shown(100, held, 2.0)[0][1] for held in (0.5, 1.8, 1.99, 2.5)]
    assert "\x1b[32m" in codes[0] and "\x1b[33m" in codes[1] and "\x1b[31m" in codes[2] and "\x1b[31m" in codes[3]
    assert "24.0 here" in shown(100, 1.0, None)[0][1]


def test_plain_lines_say_of_how_much(world, tmp_path):
    said: list[str] = []
    keys = tree(world, tmp_path / "run", {"paca": {"r": 4}}, max_steps=2)
    trimtab.Recipe.from_dict({**keys, "budget": {"fast": 8 * GIB}}).train(quiet=False, say=said.append)
    assert any(line.startswith("step 2/2") and "of 8.00 GiB" in line for line in said)
