"""Writes the small synthetic data of classification.yaml: sentiment.jsonl and sentiment_test.jsonl, beside this file.

The sentences are combined from our own words below. The test rows use things and clauses that no training row has, so a
classifier must know what the words of praise and blame mean.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

TRAIN = {
    "things": ("the ferry ride", "our hotel room", "this kettle", "the evening course", "my new bicycle", "the soup",
               "the museum tour", "that puzzle game"),
    "clauses": ("{thing} was {word} from start to end", "I found {thing} {word}", "to my surprise {thing} was {word}",
                "my sister called {thing} {word}", "{word}, that is what {thing} was"),
    "positive": ("delightful", "well made", "charming", "worth every coin"),
    "negative": ("dreadful", "badly made", "tiresome", "a waste of money"),
}  # fmt: skip
TEST = {
    "things": ("the winter coat", "their new record", "the repair shop", "this novel", "the garden party"),
    "clauses": ("all in all {thing} is {word}", "nobody had told me that {thing} would be so {word}"),
    "positive": ("wonderful", "enjoyable"),
    "negative": ("disappointing", "awful"),
}


def rows(words: dict[str, tuple[str, ...]], each: int, seed: int) -> list[dict[str, str]]:
    """`each` different sentences per label, shuffled."""
    rng, made = random.Random(seed), []
    for label in ("positive", "negative"):
        possible = [
            clause.format(thing=thing, word=word)
            for clause in words["clauses"]
            for thing in words["things"]
            for word in words[label]
        ]
        made += [{"sentence": text, "label": label} for text in rng.sample(possible, each)]
    rng.shuffle(made)
    return made


if __name__ == "__main__":
    for name, words, each in (("sentiment.jsonl", TRAIN, 40), ("sentiment_test.jsonl", TEST, 16)):
        path = Path(__file__).parent / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(words, each, seed=0)))
        print(path)
