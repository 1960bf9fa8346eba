"""What benchmarks/knowledge.py concludes from its trainings, and what it counts as fast memory, on cases by hand."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from conftest import MODELS, tiny_batch
from trimtab.contracts import Place
from trimtab.methods.lora import LoRA
from trimtab.methods.meft import Meft

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fast_memory  # noqa: E402
import knowledge  # noqa: E402


def test_facts_held_lie_where_recall_falls_through_the_mark():
    assert knowledge.held([(100, 1.0), (400, 0.9)]) == pytest.approx(200)  # half way, in logarithms
    assert knowledge.held([(100, 1.0), (200, 0.99), (400, 0.91)]) == pytest.approx(200 * 2 ** (4 / 8))
    assert knowledge.held([(100, 0.5), (200, 0.4)]) == 100 and knowledge.held([(100, 1.0)]) == 100


def test_the_ladder_goes_on_until_the_mark_is_between_two_rungs():
    for start in (64, 128, 1448, 8192):
        points = dict(knowledge.bracket(lambda count: 1.0 if count <= 500 else 0.5, start, 64))
        assert 362 <= max(count for count, recall in points.items() if recall == 1.0) <= 500
        assert min(count for count, recall in points.items() if recall == 0.5) == 512
    assert knowledge.bracket(lambda count: 0.1, 128, 64)[0] == (64, 0.1), "there is an end"
    assert [knowledge.rung(512, by) for by in (-2, -1, 0, 1, 2)] == [256, 362, 512, 724, 1024]


@pytest.mark.parametrize("search,best,tried", [
    ("calmer", 8e-3, (8e-3, 4e-3)), ("calmer", 4e-3, (8e-3, 4e-3, 2e-3)),
    ("calmer", 1e-3, (8e-3, 4e-3, 2e-3, 1e-3, 5e-4)), ("calmer", 1.6e-2, (8e-3, 4e-3)),
    ("around", 8e-3, (8e-3, 4e-3, 1.6e-2)), ("around", 4e-3, (8e-3, 4e-3, 2e-3)),
    ("around", 1.6e-2, (8e-3, 4e-3, 1.6e-2, 3.2e-2)),
])  # fmt: skip
def test_rates_by_factors_of_two(tmp_path, monkeypatch, search, best, tried):
    asked = []
    bench = knowledge.Bench("real", tmp_path, tmp_path / "kept")
    monkeypatch.setattr(bench, "run", lambda do, rate, **job: asked.append((rate, job)) or
                        {"recall": 1 / (1 + abs(rate - best)), "fast": 7})  # fmt: skip
    side = getattr(bench, search)(knowledge.Side("PaCA", "paca", {"r": 2}, 8e-3), facts=9, apart=True)
    assert (side.rate, side.fast) == (best if best in tried else 8e-3, 7)
    assert sorted({rate for rate, _ in asked}) == sorted(tried)
    assert all(job["fields"] == {"r": 2} and job["apart"] and job["facts"] == 9 for _, job in asked)


@pytest.mark.parametrize("recall", [0.9, 0.8])
def test_more_pairs_where_they_pay_and_memory_for_the_others(tmp_path, monkeypatch, recall):
    """A peer's r is a tenth of its budget here."""
    bench = knowledge.Bench("real", tmp_path, tmp_path / "kept")
    monkeypatch.setattr(bench, "run", lambda do, **job: {"r": job["budget"] // 10} if do == "fit" else
                        {"recall": recall, "fast": 200})  # fmt: skip
    meft, full = knowledge.Side("MEFT", "meft", {"r": 64, "k": 8}, 1e-3, 0.8, 100), knowledge.Side("F", "full", {})
    lora = knowledge.Side("LoRA", "lora", {"rslora": True, "r": 10}, 2e-3)
    wide = bench.wider(meft, {"k": 16, "probes": 4}, facts=9, apart=True)
    assert (wide is meft) == (recall == 0.8)
    sides = knowledge.grown(bench, wide, [meft, lora, full])
    if wide is meft:
        assert sides == [meft, lora, full]
    else:
        assert (wide.fields, wide.rate, wide.fast) == ({"r": 64, "k": 16, "probes": 4}, 1e-3, 200)
        assert sides[:-1] == [wide, meft, lora, full], "what they had is tested too"
        assert (sides[-1].fields, sides[-1].rate, sides[-1].patch) == ({"rslora": True, "r": 21}, 2e-3, "lora")


def test_a_training_is_run_once_and_kept(tmp_path):
    """The trainings run through a script that notes each and answers with its rate, or fails where that is 0."""
    script, kept, noted = tmp_path / "train.py", tmp_path / "kept.jsonl", tmp_path / "noted"
    script.write_text(
        "import json, os, sys\njob = json.loads(sys.argv[-1])\n"
        f"open({str(noted)!r}, 'a').write(os.environ['OMP_NUM_THREADS'] + chr(10))\n"
        "sys.exit('no') if not job['rate'] else print('@result', json.dumps({'recall': job['rate']}))\n"
    )
    new = lambda: knowledge.Bench("real", tmp_path, kept, f"{sys.executable} {script}", 2)  # noqa: E731
    recall = lambda bench: lambda rate: bench.run("learn", rate=rate, facts=3)["recall"]  # noqa: E731
    assert (bench := new()).each(recall(bench), [0.5, 0.25, 0.125]) == [0.5, 0.25, 0.125]
    with pytest.raises(SystemExit, match="no"):
        bench.each(recall(bench), [0.0, 0.75])
    assert (bench := new()).each(recall(bench), [0.125, 0.25, 0.5]) == [0.125, 0.25, 0.5], "another process"
    assert noted.read_text().split().count(str(max(1, os.cpu_count() // 2))) in (4, 5), "five at most were run"
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert {line["job"]["rate"]: line["result"]["recall"] for line in lines}.items() >= {0.5: 0.5, 0.25: 0.25}.items()
    assert all(line["job"]["facts"] == 3 and "work" not in line["job"] for line in lines)
    whole = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(whole)[:-9])  # ended amid the last line
    assert len(new().kept.known) == len(whole) - 1 and kept.read_text() == "".join(whole[:-1])


def test_interval():
    assert knowledge.interval([4.0]) == (4.0, 4.0, 4.0)
    mean, low, high = knowledge.interval([1.0, 2.0, 3.0])
    assert mean == 2 and high - mean == mean - low == pytest.approx(4.303 / 3**0.5)


def test_rows_at_work():
    """16 experts of 4 pairs of 2 x 64 numbers: 2,048 bytes a row, twice as much with gradients."""
    model = MODELS["llama"]()
    surgery = Meft(r=64, experts=16, probes=3, k=5).apply(model, Place(fast="cpu"))
    adapter = next(iter(surgery.adapters.values()))
    h_TD = torch.randn(6, 64)
    probed_TP = adapter.router.route(h_TD).probed_TP
    for tokens, parts in ((None, [slice(0, 6)]), (2, [slice(0, 2), slice(2, 4), slice(4, 6)])):
        with fast_memory.Rows(tokens) as rows:
            adapter(h_TD, h_TD).sum().backward()
        up = max(len(probed_TP[part].unique()) for part in parts) * 2048
        assert up <= rows.most <= 2 * up and rows.most % 2048 == 0
        if tokens is None:
            back = len(adapter.store.pending()) * 2048 * 2
            assert rows.most == max(up, back)
    with fast_memory.Rows() as rows, torch.inference_mode():
        adapter(h_TD, h_TD)
    assert rows.most == 0


def test_fast_bytes():
    model = MODELS["llama"]()
    found = fast_memory.fast_bytes(LoRA(r=2).apply(model, Place(fast="cpu")), 0, -5)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == {"trained": 16 * trained, "other": 0, "bookkeeping": 0, "rows": 0, "activations": 0}
    for router, tables in (("gate", 2), ("fixed", 1)):
        surgery = Meft(r=64, experts=16, router=router).apply(MODELS["llama"](), Place(fast="cpu"))
        found = fast_memory.fast_bytes(surgery, 7, 11)
        assert (found["trained"], found["other"]) == (0, 2 * 16 * 64 * 4)  # layers, experts, hidden, bytes
        assert (found["bookkeeping"], found["rows"], found["activations"]) == (tables * 2 * 16 * 5, 7, 11)


def test_kept_activations_are_counted_once():
    model = MODELS["llama"]()
    batch = tiny_batch(model)
    loss = lambda: model(**batch).loss  # noqa: E731
    model.requires_grad_(False)
    assert fast_memory.kept(model, loss) == 0, "nothing is trained"
    LoRA(r=2, targets="down_proj").apply(model, Place(fast="cpu"))
    few = fast_memory.kept(model, loss)
    model.enable_input_require_grads()
    assert 0 < few < fast_memory.kept(model, loss)
    x = torch.randn(8, requires_grad=True)
    assert fast_memory.kept(torch.nn.Linear(1, 1), lambda: (x * x).sum()) == 32
