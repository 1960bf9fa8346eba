"""What a process holds beside its tensors: the line through two trainings, and the file it is kept in."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from trimtab.cost import overhead
from trimtab.cost.overhead import Overhead
from trimtab.planning import calibrate

MACHINE = {"cpu": "one", "cores": 2, "device": "cpu"}
MIB = 2**20


def test_the_line_through_trainings():
    line = [(growth * MIB, round((30 + 1.1 * growth) * MIB)) for growth in (500, 100, 60)]
    found = Overhead.through(400 * MIB, line, [(200 * MIB, 280 * MIB), (200 * MIB, 290 * MIB)], 0.9)
    assert found.share == pytest.approx(0.1) and found.fixed == pytest.approx(30 * MIB, rel=1e-4) and found.measured
    assert found.autocast_overhead == pytest.approx(0.175, rel=1e-3)
    assert found.of(200 * MIB) == pytest.approx(50 * MIB, rel=1e-4) and found.of(-1) == found.fixed
    assert found.of(200 * MIB, autocast=True) == pytest.approx(85 * MIB, rel=1e-3)
    assert found.of(200 * MIB, backward_transient=20 * MIB) - found.of(200 * MIB) == 3 * MIB
    assert found.of(200 * MIB, threads=3) - found.of(200 * MIB) == 3 * overhead.THREAD
    odd = Overhead.through(0, [(100, 300), (200, 350)], [(100, 200)], 1.0)  # a small training that was disturbed
    assert odd.share == 0 and 150 < odd.fixed < 200 and odd.autocast_overhead == 0
    dense = Overhead.through(0, line, [(200 * MIB, 240 * MIB)], 1.0)  # of which the state makes no gaps
    assert dense.autocast_overhead == pytest.approx(-0.05, rel=1e-3)
    assert dense.of(200 * MIB, autocast=True) == pytest.approx(40 * MIB, rel=1e-3)


def test_no_line_fits_better():
    points = [(100 * MIB, 130 * MIB), (100 * MIB, 150 * MIB), (1000 * MIB, 1140 * MIB)]
    found = Overhead.through(0, points, [(100 * MIB, 200 * MIB)], 1.0)

    def error(share: float, fixed: float) -> float:
        return sum(((1 + share) * growth + fixed - held) ** 2 / held for growth, held in points)

    least = error(found.share, found.fixed)
    assert all(error(found.share + s, found.fixed + f) > least for s, f in ((0.01, 0), (-0.01, 0), (0, MIB), (0, -MIB)))


def test_what_was_measured_is_kept(tmp_path):
    assert not overhead.load(MACHINE, tmp_path).measured
    found = Overhead(7, 8, 0.25, 0.125, 0.5, measured=True)
    assert overhead.save(found, MACHINE, tmp_path) and overhead.load(MACHINE, tmp_path) == found
    assert not overhead.load({**MACHINE, "cores": 4}, tmp_path).measured
    (file,) = (tmp_path / "rates").iterdir()
    kept = json.loads(file.read_text())
    broken = ["{", "[]", json.dumps({**kept, "form": 0}), *(json.dumps(kept | bad) for bad in (
        {"share": -1}, {"share": "a"}, {"fixed": float("inf")}, {"odd": 1},
        {"autocast_overhead": 2}, {"autocast_overhead": -0.3}, {"efficiency": 0}))]  # fmt: skip
    for text in broken:
        file.write_text(text)
        assert overhead.load(MACHINE, tmp_path) == Overhead(), text
    assert not overhead.save(found, MACHINE, file)


def test_a_training_to_measure_by(tmp_path, monkeypatch):
    """As the doctor's, but for a shorter one."""
    monkeypatch.setattr(calibrate, "STEPS", 4)
    monkeypatch.setattr(calibrate, "TOKENS", 16)
    found = calibrate.run(calibrate.Training("full", 1), tmp_path / "new")
    assert found["process"] > found["tensors"] > 0 and found["growth"] > 0 and found["speed"] > 0


def test_of_the_same_training_the_least_counts(monkeypatch):
    grown = {training: 50 * training.rows * MIB for training in calibrate.ALL}
    odd = iter([*[1.35] * 4, *[1.0] * (len(calibrate.ALL) - 8), *[1.35] * 4])  # the first and the last four

    def call(_, training, folder, **environment):
        tensors = grown[calibrate.Training(**training)]
        return {"process": 400 * MIB, "tensors": tensors, "growth": next(odd) * (30 * MIB + 1.1 * tensors),
                "speed": 8.0, "expected": 10.0}  # fmt: skip

    monkeypatch.setattr(calibrate, "subprocess_call", call)
    found = calibrate.measure_overhead()
    assert found.measured and found.efficiency == 0.8 and found.autocast_overhead == pytest.approx(0, abs=1e-3)
    assert found.share == pytest.approx(0.1) and found.fixed == pytest.approx(30 * MIB, rel=1e-4)


def test_in_a_hurry_one_training_counts(monkeypatch):
    said: list[str] = []

    def call(_, training, folder, **environment):
        return {"process": 400 * MIB, "tensors": 100 * MIB, "growth": 130 * MIB, "speed": 8.0, "expected": 10.0}

    monkeypatch.setattr(calibrate, "subprocess_call", call)
    found = calibrate.measure_overhead(thorough=False, say=said.append)
    assert found.quick and found.measured and found.efficiency == 0.8 and len(said) == 1
    assert found.share == Overhead.share and found.of(100 * MIB) == pytest.approx(30 * MIB, abs=1)


def test_what_was_measured_thoroughly_stays(monkeypatch):
    """Quick measures only what is missing; thorough replaces quick; fresh is as thorough as what it replaces."""
    from trimtab.cost import rates
    from world import flat

    measured: list[str] = []

    def measure_rates(_, machine):
        measured.append("rates")
        return asdict(flat(machine=machine))

    def quick_overhead(thorough, say):
        measured.append("thorough" if thorough else "quick")
        return Overhead(7, 8, 0.25, 0.125, 0.5, measured=True, quick=not thorough)

    kept = {"rates": None, "process": Overhead()}
    monkeypatch.setattr(calibrate, "subprocess_call", measure_rates)
    monkeypatch.setattr(calibrate, "measure_overhead", quick_overhead)
    monkeypatch.setattr(rates, "load", lambda *_: kept["rates"])
    monkeypatch.setattr(rates, "save", lambda found, _: kept.update(rates=found))
    monkeypatch.setattr(overhead, "load", lambda *_: kept["process"])
    monkeypatch.setattr(overhead, "save", lambda found, *_: kept.update(process=found))
    said: list[str] = []
    for how, wanted in [({}, ["rates", "quick"]), ({}, []), ({"fresh": True}, ["rates", "quick"]),
                        ({"thorough": True}, ["thorough"]), ({"thorough": True}, []), ({}, []),
                        ({"fresh": True}, ["rates", "thorough"])]:  # fmt: skip
        measured.clear(), said.clear()
        found, beside, _ = calibrate.calibrate(**how, say=said.append)
        assert measured == wanted, how
        assert bool(said) == bool(wanted)
    assert found == kept["rates"] and not beside.quick


def test_a_training_that_fails_measures_nothing(monkeypatch):
    monkeypatch.setattr(calibrate, "ALL", (calibrate.Training("nothing", 1),))
    assert calibrate.measure_overhead() == Overhead()


def test_each_new_shape_of_a_product_costs_code():
    from trimtab.cost.overhead import PRODUCT

    beside = Overhead(fixed=100, share=0.1)
    assert beside.of(1000, shapes=7) == beside.of(1000) + 7 * PRODUCT
