"""Rehearsal: what is kept within a budget of bytes, how it is mixed in, and that a run with it resumes exactly."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers_run import PLACES, QUESTIONS, left, make_world, run, run_in_parts, same, tree, write_rows
from trimtab import Recipe, load_adapter
from trimtab.data.order import Mixed
from trimtab.engine.probe import head_read
from trimtab.engine.rehearsal import Rows, choose, nbytes, read, row_bytes, spread, write
from trimtab.errors import BadInput
from trimtab.model.loss import next_token_loss

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


def with_tops(rows: Rows, top: int) -> Rows:
    draw = numpy.random.default_rng(0)
    for counts in rows.counts:
        shape = (int(counts[1:].sum()), top)
        rows.tops.append(draw.integers(0, 60_000, shape).astype(numpy.uint32))
        rows.logs.append(draw.integers(0, 256, shape).astype(numpy.uint8))
    return rows


@pytest.mark.parametrize("four,top", [(False, 0), (True, 0), (False, 4), (True, 3)])
def test_a_file_has_the_bytes_that_count_and_reads_back(tmp_path, four, top):
    rows = with_tops(made([1] * 40), top) if top else made([1] * 40)
    entries = sum(int(counts[1:].sum()) for counts in rows.counts) * top
    assert nbytes(rows, four) == nbytes(made([1] * 40), four) + entries * (5 if four else 3)
    write(tmp_path / "kept", rows, four)
    size = (tmp_path / "kept").stat().st_size
    assert nbytes(rows, four) <= size <= nbytes(rows, four) + 600  # the header
    back = read(tmp_path / "kept")
    assert back.tasks == rows.tasks and back.places == rows.places and back.keys == rows.keys
    for one, two in ((rows.ids, back.ids), (rows.counts, back.counts), (rows.tops, back.tops), (rows.logs, back.logs)):
        if top or one:
            assert len(one) == len(two)
        assert all(numpy.array_equal(a, b) for a, b in zip(one, two, strict=bool(one)))
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


def test_diverse_losses_are_kept_from_easy_to_hard():
    assert spread(list(range(8))) == [4, 2, 6, 1, 3, 5, 7, 0]
    rows = made([1] * 64 + [2] * 16, tokens=lambda draw: 10)
    kept = choose(rows, 16 * row_bytes(10, False), "loss_diverse")
    for task in (1, 2):
        losses = sorted(key for key, t in zip(rows.keys, rows.tasks, strict=True) if t == task)
        ranks = sorted(losses.index(key) for key, t in zip(kept.keys, kept.tasks, strict=True) if t == task)
        assert len(ranks) == 8
        assert all(ranks[i] // (len(losses) // 8) == i for i in range(8)), "one from each eighth of the losses"


@pytest.mark.parametrize("whole", [False, True])
def test_the_loss_against_probabilities(world, whole):
    """Value and gradient, against autograd from the definition; of shares of 1 on the labels, the plain loss."""
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    torch.manual_seed(0)
    ids = torch.randint(5, 40, (3, 9))
    labels = torch.where(torch.rand(3, 9) < 0.3, -100, ids)
    inputs = {"input_ids": ids}
    at, share = torch.stack([torch.randperm(40)[:4] for _ in range(27)]).view(3, 9, 4), torch.rand(3, 9, 4).softmax(-1)
    weight = model.get_input_embeddings().weight
    with head_read(model):
        value, _, seen = next_token_loss(model, inputs, labels, whole=whole, soft=(at, share), chunk=5)
        (ours,) = torch.autograd.grad(value, weight)
        logp = model(**inputs).logits[:, :-1].log_softmax(-1)
        counts = labels[:, 1:] != -100
        wanted = -(logp.gather(-1, at[:, 1:]) * share[:, 1:]).sum(-1)[counts].mean()
        (theirs,) = torch.autograd.grad(wanted, weight)
        assert int(seen) == int(counts.sum()) and torch.allclose(value, wanted, atol=1e-5)
        assert torch.allclose(ours, theirs, atol=1e-5)
        hard = (labels.clamp(min=0)[..., None].repeat(1, 1, 2), torch.tensor([1.0, 0.0]).expand(3, 9, 2))
        plain = next_token_loss(model, inputs, labels, whole=whole)[0]
        assert torch.allclose(next_token_loss(model, inputs, labels, whole=whole, soft=hard)[0], plain, atol=1e-6)


def test_kept_logits_are_those_of_the_model_after_its_own_stage(world, tmp_path, monkeypatch):
    from trimtab.engine.trainers import CausalTrainer

    batches, step = [], CausalTrainer.training_step

    def seen(self, model, inputs, count=None):
        batches.append({key: value.clone() for key, value in inputs.items()})
        return step(self, model, inputs, count)

    monkeypatch.setattr(CausalTrainer, "training_step", seen)
    made_keys = keys(world, tmp_path / "run", {"budget": 2000, "mix": 0.5, "keep": "logits", "top": 4})
    run(made_keys)
    first, second = (read(path) for path in sorted((tmp_path / "run/stages").glob("*/kept.safetensors")))
    assert 0 < nbytes(first) <= 2000 and 0 < nbytes(second) <= 2000 and set(second.tasks) == {1, 2}
    recipe = Recipe.load(tmp_path / "run")
    for kept, task, name in ((first, 1, "1-one"), (second, 1, "1-one"), (second, 2, "2-two")):
        model = AutoModelForCausalLM.from_pretrained(world / "llama")
        load_adapter(model, tmp_path / "run/stages" / name / "adapter")
        for ids, counts, tops, logs in zip(
            *(getattr(kept.picked([i for i, t in enumerate(kept.tasks) if t == task]), key)
              for key in ("ids", "counts", "tops", "logs")), strict=True,
        ):  # fmt: skip
            with torch.no_grad():
                logp = model(torch.from_numpy(ids.astype(int))[None]).logits[0, :-1].log_softmax(-1)
            best = logp[torch.from_numpy(counts[1:])].topk(4)
            assert tops.shape == (counts[1:].sum(), 4)
            assert numpy.abs(logs / -16 - best.values.numpy().clip(-255 / 16)).max() <= 1 / 32 + 1e-3
            assert (tops == best.indices.numpy()).mean() > 0.9, "but for ties"
    batch = batches[4]  # the first of stage two: half its rows are rehearsed, and have soft targets
    assert batch["soft_ids"].shape == (*batch["labels"].shape, 4)
    counts = batch["labels"][:, 1:] != -100
    assert torch.allclose(batch["soft_shares"][:, 1:][counts].sum(-1), torch.ones(int(counts.sum())), atol=1e-5)
    soft = (batch["soft_shares"][:, 1:, 0] < 1).logical_and(counts).any(1)
    assert 1 <= int(soft.sum()) <= 3, "half of them, but for the longest row, which comes first"
    assert "soft_ids" not in batches[0]
    assert recipe.stage_recipes()[1].objective == {"causal_lm": {"soft": 4}}


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


@pytest.mark.parametrize("how", [{"policy": "ring"}, {"policy": "loss_diverse", "keep": "logits", "top": 3}])
def test_resume_is_exact_with_rehearsal(world, tmp_path, minutes, how):
    last = {"save_strategy": "steps", "save_steps": 4}
    rehearsal = {"budget": "1KiB", **how}
    run(keys(world, tmp_path / "whole", rehearsal, **last))
    parts = keys(world, tmp_path / "parts", rehearsal, max_minutes=3.5, **last)
    assert run_in_parts(parts, minutes) >= 3
    for folder in (tmp_path / "whole/stages").glob("*-*"):
        same(left(folder), left(tmp_path / "parts/stages" / folder.name))
        kept, again = (path / "kept.safetensors" for path in (folder, tmp_path / "parts/stages" / folder.name))
        assert kept.exists() == again.exists() and (not kept.exists() or kept.read_bytes() == again.read_bytes())
    with pytest.raises(BadInput, match="with rehearsal"):
        run(keys(world, tmp_path / "parts", {"budget": "2KiB"}), resume=True)


@pytest.mark.parametrize("rehearsal,more,words", [
    ({"budget": 20}, {}, "budget: 20 bytes: the shortest row of stage 1 needs"),
    ({"budget": "much"}, {}, "it is not a size"), ({"budget": 99, "mix": 1.0}, {}, "less than 1"),
    ({"budget": 99, "policy": "best"}, {}, "no such choice"), ({"budget": 99, "top": 0}, {}, "top"),
    ({"budget": 99, "top": 4}, {}, "keep: text keeps no probabilities"),
    ({"budget": 60, "keep": "logits", "top": 64}, {}, "the shortest row of stage 1 needs"),
    ({"budget": 999, "keep": "logits"}, {"loss_type": "dft"}, "keep: logits.*keep: text"),
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


def test_probabilities_come_from_stages_alone(world, tmp_path):
    made = tree(world, tmp_path / "run", {"lora": {"r": 4}}, max_steps=1) | {"objective": {"causal_lm": {"soft": 4}}}
    with pytest.raises(BadInput, match="soft: 4.*Remove soft"):
        run(made)
    assert not (tmp_path / "run").exists()
