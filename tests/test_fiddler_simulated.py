"""The cost model of experts in two tiers: decisions against all assignments, the bound against a search, and replays
against the store itself."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch

from conftest import MIXTURES, tiny_batch
from tiny import ROWS as ROWS_OF_STEP
from tiny import TOKENS, recipe_of, tiny_folder
from trimtab.cost.experts import GPUS, Machine, Trace, best_hits, best_seconds, makespan, replay
from trimtab.engine.arguments import training_arguments
from trimtab.engine.objectives import arguments_class
from trimtab.errors import BadInput
from trimtab.methods.fiddler import Dynamic, Fiddler, LeastRecentlyUsed, Popular
from trimtab.planning.step import PlannedStep
from world import PLACE, flat

ROWS = [range(4), range(4, 8)]
DISK = Machine("a disk", fast_bytes=1e10, fast_flops=1e11, link_bytes=1e9)


def random_trace(steps: int, seed: int = 0, skew: float = 1.0) -> Trace:
    random = torch.Generator().manual_seed(seed)
    share = torch.arange(1, 5).float() ** -skew
    found = Trace(ROWS, 35 * 10**7, 3.5e8)
    for step in range(steps):
        layer, tokens = step % 2, 1 if step % 7 else 5
        picked = torch.multinomial(share.repeat(tokens, 1), 2, generator=random) + ROWS[layer].start
        rows, counts = picked.unique(return_counts=True)
        found.steps.append((layer, tokens, dict(zip(rows.tolist(), counts.tolist(), strict=True))))
    return found


@pytest.mark.parametrize("machine", [*GPUS, DISK], ids=lambda machine: machine.name)
def test_the_decision_is_near_the_best_of_all(machine):
    random, worst = torch.Generator().manual_seed(1), 0.0
    for _ in range(40):
        needed = {row: int(torch.randint(1, 200, (), generator=random)) for row in range(8)}
        hits, streamed = list(range(2)), list(range(2, 8))
        made = makespan(machine, 3.5e8, 3.5e8, needed, hits, [], streamed)
        best = best_seconds(machine, 3.5e8, 3.5e8, needed, hits, streamed)
        assert made.seconds >= best * (1 - 1e-9)
        worst = max(worst, made.seconds / best)
        assert machine.host_flops or made.rows == []
    assert worst < 1.25


def test_few_tokens_are_computed_beside_the_weights_and_many_on_the_device():
    """As in the paper: decoding chooses the host, a long prompt the device."""
    for machine in GPUS[:2]:
        one, many = ({row: count for row in range(2)} for count in (1, 4096))
        assert makespan(machine, 3.5e8, 3.5e8, one, [], [], [0, 1]).rows == [0, 1]
        assert makespan(machine, 3.5e8, 3.5e8, many, [], [], [0, 1]).rows == []


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_no_choice_serves_more_than_the_bound_and_one_serves_as_many(slots):
    steps = random_trace(9, seed=slots).steps

    @functools.cache
    def most(at: int, resident: frozenset) -> int:
        if at == len(steps):
            return 0
        needed = set(steps[at][2])
        keep = resident | needed  # what may stay: any of these, up to the slots
        return len(resident & needed) + max(
            most(at + 1, frozenset(kept)) for kept in itertools.combinations(keep, min(slots, len(keep)))
        )

    assert best_hits(steps, slots) == most(0, frozenset()) > 0


@pytest.mark.parametrize("make", [functools.partial(Dynamic, 0.99, 0.2), LeastRecentlyUsed, Popular])
def test_no_residency_beats_the_bound(make):
    trace = random_trace(400)
    for slots in (0, 2, 5, 8):
        found = replay(trace, make(), slots, DISK)
        assert found.hits <= best_hits(trace.steps, slots) and found.hits + found.misses > 800
        assert found.seconds > 0 and found.hosted == 0 and found.moved == found.misses


def test_more_slots_take_less_time_and_a_faster_link_too():
    trace = random_trace(400, skew=2.0)
    times = [replay(trace, Dynamic(0.99, 0.2), slots, GPUS[0]).seconds for slots in (0, 4, 8)]
    assert times == sorted(times, reverse=True)
    by_link = [replay(trace, LeastRecentlyUsed(), 4, machine).seconds for machine in GPUS]
    assert by_link == sorted(by_link, reverse=True)


def test_a_recorded_trace_replays_to_what_the_store_did(tmp_path):
    model = MIXTURES["qwen3_moe"]()
    surgery = Fiddler(cache=1e-4).apply(model, PLACE)
    with surgery.recorded() as trace, torch.no_grad():
        batch = tiny_batch(model)
        model(**batch)
        model.generate(batch["input_ids"][:1], max_new_tokens=12, min_new_tokens=12)
    assert trace.passes == 13 and len(trace.steps) == 26 and trace.size == surgery.tiers.slot_bytes
    assert trace.flops == 2 * 3 * 64 * 32
    trace.save(tmp_path / "trace.json")
    again = Trace.load(tmp_path / "trace.json")
    assert again == trace
    found = replay(again, surgery.patch.new_residency(), surgery.tiers.slots, DISK)
    assert (found.hits, found.misses) == (surgery.tiers.traffic.hits, surgery.tiers.traffic.misses)
    assert surgery.tiers.trace is None


def test_a_damaged_trace_is_refused(tmp_path):
    path = tmp_path / "trace.json"
    for content in ("", "{}", '{"layers": [1], "size": 1, "flops": 1, "steps": [[0]]}'):
        path.write_text(content)
        with pytest.raises(BadInput, match="Record it again"):
            Trace.load(path)


def test_a_plan_counts_the_products_of_every_expert_that_a_token_uses(tmp_path):
    """Two experts a token take twice the seconds of one in the experts."""
    seconds = []
    for each in (1, 2, 3):
        model = tiny_folder(tmp_path / str(each), "mixtral", torch.float32, num_experts_per_tok=each)
        step = recipe_of(model, {"lora": {"r": 4}})
        over = dataclasses.replace(step, patches=[{"fiddler": {}}, *step.patches])
        args = training_arguments(over, arguments_class(over.load_objective()), tmp_path, True)
        taken = PlannedStep(over, args, None).trace(ROWS_OF_STEP, TOKENS, None, flat(bandwidth=1e15)).seconds
        seconds.append(sum(taken.values()))
    one, two, three = seconds
    layer = 2 * ROWS_OF_STEP * TOKENS * 3 * 64 * 128 / 1e9  # of one expert for all tokens, at 1 GFLOP/s
    passes = 2 * (1 + 2) * layer  # forward; recomputed and backward; in two layers
    assert two - one == pytest.approx(passes, rel=0.1) and three - two == pytest.approx(passes, rel=0.1)
