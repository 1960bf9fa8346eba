"""Seconds of MEFT's step: the few operations that a plan traces stand for those of all experts at work."""

from __future__ import annotations

import statistics

import pytest
import torch

from tiny import ROWS, TOKENS, recipe_of
from trimtab.cost import roofline
from trimtab.cost.roofline import row_update, written_back
from trimtab.cost.trace import OPTIMIZER
from trimtab.engine.arguments import training_arguments
from trimtab.engine.objectives import arguments_class
from trimtab.planning.plan import plan
from trimtab.planning.step import PlannedStep
from trimtab.tiered import planned as tables
from trimtab.tiered.store import TieredStore
from world import flat

pytestmark = pytest.mark.filterwarnings("ignore")
MEFT = {"r": 256, "probes": 4, "k": 16, "scale": 1.0}
PLACES, NEAR = ("ram", "disk"), 0.75  # the optimizer: a real trace lacks the rows' norm, writes, views made at once
FIELDS = [MEFT, {**MEFT, "k": 64, "router": "fixed"}, {**MEFT, "experts": 64, "probes": 2}]


def test_how_many_experts_are_expected_at_work():
    """What was measured, and what can be whatever the text: no more than there are, or than were asked for."""
    for many, share in ((128, 0.93), (256, 0.84), (512, 0.70), (1024, 0.54), (2048, 0.35)):
        assert tables.touched(many, 1024, 8) / many == pytest.approx(share, abs=0.02)
    assert tables.touched(1, 10**6, 1) == pytest.approx(1.0) and tables.touched(10**6, 1, 1) == 1.0
    assert tables.touched(4096, 1, 8) == pytest.approx(8, rel=0.05), "those of a single token"
    counts = [tables.touched(64, tokens, 8) for tokens in (1, 8, 64, 512, 10**5)]
    assert counts == sorted(counts) and counts[0] <= 8 and counts[-1] <= 64


@pytest.fixture
def counted_alike(monkeypatch):
    """In a real step, the operations of a loop cannot be told from others."""
    monkeypatch.setattr(roofline, "PLAIN", 1.0)


def traced(recipe, real: bool) -> tuple[dict[str, float], float]:
    args = training_arguments(recipe, arguments_class(recipe.load_objective()), "out", True)
    torch.manual_seed(0)
    # each operation counts, and each row that steps; reading rows from memory, which only a plan counts, hardly does
    rates = flat(overhead=1e-5, bandwidth=1e10, update=1e8)
    cost = PlannedStep(recipe, args, None, real).trace(ROWS, TOKENS, None, rates)
    return cost.seconds, cost.step_seconds(1)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_the_seconds_of_a_plan_are_those_of_a_real_steps_operations(fields, place, folders, counted_alike, monkeypatch):
    folder = folders("llama", torch.float32)
    recipe = recipe_of(folder, {"meft": fields}, engine={"recompute": "none"}, place={"slow": place})
    at_work, group = [], TieredStore.group

    def counted(store, probed_TP, alive=None):
        groups = group(store, probed_TP, alive)
        at_work.append(len(groups.rows))
        return groups

    with monkeypatch.context() as patched:
        patched.setattr(TieredStore, "group", counted)
        phases, real = traced(recipe, real=True)
    mean = statistics.mean(at_work)
    assert mean > 4, "there is something to stand for"
    monkeypatch.setattr(tables, "touched", lambda *asked: mean)
    planned, seconds = traced(recipe, real=False)
    assert seconds - planned[OPTIMIZER] == pytest.approx(real - phases[OPTIMIZER], rel=0.05)
    assert planned[OPTIMIZER] == pytest.approx(phases[OPTIMIZER], rel=NEAR)
    monkeypatch.setattr(tables, "touched", lambda *asked: 1.0)
    assert traced(recipe, real=False)[1] < 0.75 * seconds


def test_no_more_experts_are_expected_at_work_than_the_cap(folders, monkeypatch):
    """A pass of which 6 experts are expected takes as long as one that is capped at 6, whatever is expected."""
    seconds = []
    for cap, rows in ((0, 6.0), (6, 60.0), (0, 60.0)):
        monkeypatch.setattr(tables, "touched", lambda *asked, many=rows: many)
        recipe = recipe_of(folders("llama", torch.float32), {"meft": {**MEFT, "cap": cap}})
        seconds.append(traced(recipe, real=False)[1])
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-6) and seconds[2] > 1.2 * seconds[1]


def test_rows_step_once_for_accumulated_micro_batches(folders):
    once, twice = (
        plan(recipe_of(folders("llama", torch.float32), {"meft": MEFT}, training=training), process=0, rates=flat())
        for training in ({}, {"gradient_accumulation_steps": 8})
    )
    assert 1.0 < twice.tokens_per_second / once.tokens_per_second < 2.0


@pytest.mark.parametrize("fields", [{"semantics": "union", "router": "fixed"}, {"adam": "exact"}, {"moments": "int8"}])
def test_what_is_not_counted_has_no_speed(fields, folders):
    made = plan(recipe_of(folders("llama", torch.float32), {"meft": {**MEFT, **fields}}), process=0, rates=flat())
    assert made.tokens_per_second is None and any(
        "semantics: per_token, adam: lazy, moments: fp32" in note for note in made.notes
    )


def test_the_update_of_rows_by_hand():
    assert row_update(flat(), 70_000, 10, False) == pytest.approx(10 * (8 * 70_000 / 7e8 + 4e-6))
    copied = 7 * 2 * 700 / 1e9
    assert row_update(flat(), 700, 10, True) == pytest.approx(10 * (8 * 700 / 7e8 + 1e-6 + copied))


def test_changed_pages_wait_for_the_disk_once_memory_may_not_hold_them(folders, monkeypatch):
    rates = flat(disk={"write": 100.0})
    assert written_back(200, 1000, rates) == 0.0 and written_back(700, 1000, rates) == 5.0
    assert written_back(700, -5, rates) == 7.0 and written_back(700, 1000, flat()) is None
    recipe = recipe_of(folders("llama", torch.float32), {"meft": MEFT}, place={"slow": "disk"})
    free = plan(recipe, process=0, rates=flat(disk={"write": 1e3}))
    tables, live = free.table_bytes, free.live_peak_bytes
    monkeypatch.setattr("trimtab.planning.plan.ram", lambda: {"MemAvailable": live + tables + free.slow_bytes})
    bound = plan(recipe, process=0, rates=flat(disk={"write": 1e3, "read": 1e9}))
    assert bound.tokens_per_second < 0.01 * free.tokens_per_second
    assert any("limited by writing them to the disk" in note for note in bound.notes)
    assert plan(recipe, process=0, rates=flat()).tokens_per_second is None, "how fast the disk is is not known"
    monkeypatch.setattr("trimtab.planning.plan.ram", lambda: {"MemAvailable": live + tables - 1})
    assert plan(recipe, process=0, rates=flat(disk={"read": 1e9, "write": 1e9})).tokens_per_second is None
    monkeypatch.setattr("trimtab.planning.plan.ram", lambda: {"MemAvailable": 2 * free.slow_bytes})
    in_ram = recipe_of(folders("llama", torch.float32), {"meft": MEFT}, place={"slow": "ram"})
    assert plan(in_ram, process=0, rates=flat()).tokens_per_second > 0
