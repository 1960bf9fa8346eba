"""Rehearsal: what is kept within a budget of bytes, how it is mixed in, and that a run with it resumes exactly."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy
import pytest

from helpers_run import PLACES, QUESTIONS, left, make_world, run, same, tree, write_rows
from trimtab.data.order import Mixed
from trimtab.engine.rehearsal import Rows, choose, nbytes, read, row_bytes, write
from trimtab.errors import BadInput, Stopped
from trimtab.training import time_limit

pytestmark = pytest.mark.filterwarnings("ignore")


def made(tasks: list[int], seed: int = 0, tokens=lambda draw: draw.randint(3, 30)) -> Rows:
    draw, rows = random.Random(seed), Rows()
    for place, task in enumerate(tasks):
        ids = numpy.array([draw.randrange(60_000) for _ in range(tokens(draw))], dtype=numpy.uint32)
        rows.ids.append(ids)
        rows.counts.append(numpy.array([draw.random() < 0.5 for _ in ids]))
        rows.tasks.append(task)
        rows.places.append(place)
        rows.keys.append(draw.random())
    return rows


def names(rows: Rows) -> list[tuple[int, int]]:
    return list(zip(rows.tasks, rows.places, strict=True))


@pytest.mark.parametrize("four", [False, True])
def test_a_file_has_the_bytes_that_count_and_reads_back(tmp_path, four):
    rows = made([1] * 40)
    write(tmp_path / "kept", rows, four)
    size = (tmp_path / "kept").stat().st_size
    assert nbytes(rows, four) <= size <= nbytes(rows, four) + 600  # the header
    back = read(tmp_path / "kept")
    assert back.tasks == rows.tasks and back.places == rows.places and back.keys == rows.keys
    for one, two in ((rows.ids, back.ids), (rows.counts, back.counts)):
        assert all(numpy.array_equal(a, b) for a, b in zip(one, two, strict=True))
    (tmp_path / "kept").write_bytes((tmp_path / "kept").read_bytes()[:-9])
    with pytest.raises(BadInput, match="cannot be read"):
        read(tmp_path / "kept")


def test_the_reservoir_does_not_depend_on_when_rows_came():
    rows = made([1] * 30 + [2] * 60 + [3] * 10)
    budget = nbytes(rows) // 3
    kept = choose(rows, budget, "reservoir")
    assert budget - row_bytes(30, False) <= nbytes(kept) <= budget
    parts = [rows.picked(list(part)) for part in (range(30), range(30, 90), range(90, 100))]
    one = Rows()
    for part in parts:
        one = choose(one.joined(part), budget, "reservoir")
    assert set(names(one)) <= set(names(kept)) and len(one) >= len(kept) - 3, "but for the room at the end"
    assert set(names(choose(kept, budget // 2, "reservoir"))) == set(names(choose(rows, budget // 2, "reservoir")))


def test_each_row_is_kept_with_the_same_chance():
    """200 reservoirs of a fifth of 50 equal rows: each row in about 40, within 4.5 standard deviations."""
    counts: Counter[int] = Counter()
    for seed in range(200):
        rows = made([1] * 20 + [2] * 30, seed, tokens=lambda draw: 10)
        kept = choose(rows, 10 * row_bytes(10, False), "reservoir")
        assert len(kept) == 10
        counts.update(kept.places)
    deviation = (200 * 0.2 * 0.8) ** 0.5
    assert all(abs(counts[place] - 40) < 4.5 * deviation for place in range(50))


def test_the_ring_keeps_an_equal_share_of_the_newest():
    rows = made([1] * 40 + [2] * 10 + [3] * 40)
    budget = 3 * sum(row_bytes(len(ids), False) for ids in rows.ids[40:50]) // 2
    kept = choose(rows, budget, "ring")
    for task in (1, 2, 3):
        part = kept.picked([i for i, t in enumerate(kept.tasks) if t == task])
        assert 0 < nbytes(part) <= budget // 3
        last = [place for place, t in zip(rows.places, rows.tasks, strict=True) if t == task][-len(part) :]
        assert part.places == last


@pytest.mark.parametrize("own,more,mix", [(10, 4, 0.25), (7, 1, 0.5), (30, 50, 0.1), (5, 3, 0.9)])
def test_rows_are_mixed_into_each_batch(own, more, mix):
    sampler = Mixed(own, more, mix, seed=0)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler) and len(order) == len(sampler)
        assert sorted(i for i in order if i < own) == list(range(own)), "each own row once"
        old = [i for i in order if i >= own]
        assert max(Counter(old).values(), default=0) - min(Counter(old).values(), default=0) <= 1
        for start in range(len(order)):
            for end in range(start + 1, len(order) + 1):
                assert abs(sum(i >= own for i in order[start:end]) - mix * (end - start)) <= 1
        orders.append(order)
    assert orders[0] != orders[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    for name, ask in zip(("one", "two"), QUESTIONS, strict=False):
        rows = [{"question": ask.format(place), "answer": answer} for place, answer in PLACES]
        if name == "two":  # other columns
            rows = [{"prompt": row["question"] + " ", "completion": row["answer"]} for row in rows]
        write_rows(folder / f"{name}.jsonl", rows * 2)
        write_rows(folder / f"{name}_test.jsonl", rows[:2])
    return folder


def keys(world: Path, output: Path, rehearsal: dict | None, **training) -> dict:
    found = tree(world, output, {"lora": {"r": 4}}, max_steps=4, per_device_train_batch_size=4, **training)
    found["data"] = {"reply_tokens": 3}
    found["stages"] = [{"name": name, "data": {"train": str(world / f"{name}.jsonl"),
                                               "test": str(world / f"{name}_test.jsonl")}}
                       for name in ("one", "two", "one again")]  # fmt: skip
    found["stages"][2]["data"] = found["stages"][0]["data"]
    return found | ({"rehearsal": rehearsal} if rehearsal else {})


def test_a_run_keeps_and_rehearses_within_the_budget(world, tmp_path, monkeypatch):
    from trimtab.engine.trainers import CausalTrainer

    seen, step = [], CausalTrainer.training_step

    def counted(self, model, inputs, count=None):
        seen.append(len(self.train_dataset))
        return step(self, model, inputs, count)

    monkeypatch.setattr(CausalTrainer, "training_step", counted)
    run(keys(world, tmp_path / "run", {"budget": 200, "mix": 0.5}))
    first, second = (read(path) for path in sorted((tmp_path / "run/stages").glob("*/kept.safetensors")))
    assert 0 < nbytes(first) <= 200 and 0 < nbytes(second) <= 200 and set(first.tasks) == {1}
    assert seen == [10] * 4 + [10 + len(first)] * 4 + [10 + len(second)] * 4
    assert not (tmp_path / "run/stages/3-one again/kept.safetensors").exists(), "nothing comes after it"
    told = json.loads((tmp_path / "run/run.json").read_text())["rehearsal"]
    assert told == {"budget_bytes": 200, "bytes": nbytes(second), "rows": len(second), "seen": 20,
                    "share_of_rows": len(second) / 20}  # fmt: skip


def test_resume_is_exact_with_rehearsal(world, tmp_path, monkeypatch):
    reads: list[int] = []
    monkeypatch.setattr(time_limit, "clock", lambda: reads.append(0) or time.monotonic() + 60 * len(reads))
    last = {"save_strategy": "steps", "save_steps": 4}
    rehearsal = {"budget": "1KiB", "policy": "ring"}
    run(keys(world, tmp_path / "whole", rehearsal, **last))
    stops, parts = 0, keys(world, tmp_path / "parts", rehearsal, max_minutes=3.5, **last)
    for attempt in range(8):
        reads.clear()
        try:
            run(parts, resume=attempt > 0)
            break
        except Stopped:
            stops += 1
    assert stops >= 3
    for folder in (tmp_path / "whole/stages").glob("*-*"):
        same(left(folder), left(tmp_path / "parts/stages" / folder.name))
        kept, again = (path / "kept.safetensors" for path in (folder, tmp_path / "parts/stages" / folder.name))
        assert kept.exists() == again.exists() and (not kept.exists() or kept.read_bytes() == again.read_bytes())
    with pytest.raises(BadInput, match="with rehearsal"):
        run(keys(world, tmp_path / "parts", {"budget": "2KiB"}), resume=True)


@pytest.mark.parametrize("rehearsal,more,words", [
    ({"budget": 20}, {}, "budget: 20 bytes: the shortest row of stage 1 needs"),
    ({"budget": "much"}, {}, "it is not a size"), ({"budget": 99, "mix": 1.0}, {}, "less than 1"),
    ({"budget": 99, "policy": "best"}, {}, "no such choice"),
    ({"budget": "1MiB"}, {"packing": True}, "remove packing"),
    ({"budget": "1MiB"}, {"train_sampling_strategy": "sequential"}, "train_sampling_strategy is sequential"),
])  # fmt: skip
def test_bad_input(world, tmp_path, rehearsal, more, words):
    with pytest.raises(BadInput, match=words):
        run(keys(world, tmp_path / "run", rehearsal, **more))
    assert not (tmp_path / "run").exists()


def test_rehearsal_needs_stages(world, tmp_path):
    lone = tree(world, tmp_path / "run", {"lora": {}}) | {"rehearsal": {"budget": "1MiB"}}
    with pytest.raises(BadInput, match="the recipe has no stages"):
        run(lone)
