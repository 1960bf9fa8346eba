"""How replies are scored, against cases worked out by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest

from trimtab.data.metrics import METRICS, contains, exact_match, final_number, number, set_iou
from trimtab.data.spec import DataSpec
from trimtab.errors import BadInput


@pytest.mark.parametrize("reply, accepted, exact, within", [
    ("The Eiffel Tower.", ["eiffel tower"], 1, 1),
    ("It is the Eiffel-Tower", ["eiffel tower"], 0, 0),  # SQuAD's normalisation leaves out the hyphen: one word
    ("in 14 December, 1972", ["March 1972", "14 December 1972"], 0, 1),
    ("Romania", ["Oman"], 0, 0),  # words, not letters
    ("an answer", ["the"], 0, 0),  # nothing is left of the accepted answer
    ("", ["Oman"], 0, 0),
])  # fmt: skip
def test_exact_match_and_contains(reply, accepted, exact, within):
    assert exact_match(reply, accepted) == exact and contains(reply, accepted) == within


@pytest.mark.parametrize("reply, accepted, wanted", [
    ("b, a", ["a, b"], 1),
    ("A,  b ,b", ["a, b, c"], 2 / 3),
    ("a, d", ["a, b, c"], 1 / 4),
    ("a\nb", ["a, b"], 1),
    ("get rates, x", ["get  rates"], 1 / 2),
    ("a", ["b", "a, c"], 1 / 2),  # the best one counts
    ("", ["a"], 0),
    (" , ", [""], 1),
])  # fmt: skip
def test_set_iou(reply, accepted, wanted):
    assert set_iou(reply, accepted) == pytest.approx(wanted)


@pytest.mark.parametrize("text, wanted", [
    ("He has 2 + 3 = 5 apples", "5"), ("#### 1,234", "1234"), ("#### 18 or was it 20?", "18"),
    ("so $7.50.", "7.50"), ("it fell by 5-3", "3"), ("it is -3", "-3"), ("about $-1,000,000.", "-1000000"),
    ("1 234", "1234"), ("1\u202f234\u202f567.5 km", "1234567.5"), ("10 20 300", "300"), ("in 1 2345", "2345"),
    ("about 1e3", "1000"), ("2.5E-3", "0.0025"), ("\u22125", "-5"), ("from 7 \u2212 2", "2"), ("5\u22123", "3"),
    ("1/4", "0.25"), ("-3/4", "-0.75"), ("1 1/2 cups", "1.5"), ("1\u00bd", "1.5"), (r"$\frac{3}{4}$", "0.75"),
    ("on 3/4/2024", "2024"), ("1/0", None), ("10\u00b2", "10"),
    ("1,23", "23"), ("a .5 share", ".5"), ("none", None), ("5 apples ####", None),
])  # fmt: skip
def test_number(text, wanted):
    assert number(text) == (None if wanted is None else Decimal(wanted))


def test_final_number():
    answer = ["She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18"]
    assert final_number("That is 18.00 dollars.", answer) == 1
    assert final_number("16 - 3 = 13\n#### 13", answer) == 0
    assert final_number("1/4", ["3/4"]) == 0 and final_number("3/4", ["0.75"]) == 1
    assert final_number("x = \u22127", ["-7"]) == 1 and final_number("7", ["\u22127"]) == 0
    assert final_number("1 234", ["1,234"]) == final_number("1e3", ["1000"]) == 1
    assert final_number("1e999", ["1e998"]) == 0 and final_number("9" * 9999, ["9" * 9999]) == 1
    assert final_number("I do not know", answer) == 0 and final_number("no idea", ["none"]) == 0


def test_recipes_name_metrics():
    assert DataSpec(metrics=list(METRICS)).metrics == list(METRICS)
    assert set(DataSpec().metrics) <= METRICS.keys()
    with pytest.raises(BadInput, match="final_number"):
        DataSpec(metrics=["final_numbers"])
