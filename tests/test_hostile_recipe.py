"""A recipe that is hostile or broken is refused at once, in a short message."""

from __future__ import annotations

import pytest
import yaml

from helpers_run import tree
from trimtab.errors import BadInput, shortened
from trimtab.validation import DEEPEST, MOST, read_yaml, write_yaml

DEEP = "depth" if hasattr(yaml, "CSafeLoader") else f"more than {DEEPEST} deep"  # libyaml has a bound of its own
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
DIGITS = "9" * 4500


def keys(tmp_path, **changed) -> str:
    return yaml.safe_dump({**tree(tmp_path, tmp_path / "out", {"paca": {"r": 4}}, max_steps=1), **changed})


FILES = {
    "aliases": (lambda path: BOMB, "aliases counted"),
    "brackets": (lambda path: "model: " + "[" * 100_000, DEEP),
    "keys": (lambda path: "".join(f"k{i}: 1\n" for i in range(MOST + 1)), "values"),
    "a long value": (lambda path: keys(path, model="x" * 10**6), "characters"),
    "a very long value": (lambda path: keys(path, model="x" * 10**7), "bytes"),
    "digits": (lambda path: keys(path, output="o") + f"seed: {DIGITS}\n", "cannot be read"),
    "brackets, some": (lambda path: "model: " + "[" * 99 + "]" * 99, f"more than {DEEPEST} deep"),
    "a name with a null": (lambda path: keys(path, model="a\0b"), "no file can have such a name"),
    "no date": (lambda path: "model: 2026-99-99\n", "cannot be read"),
    "no YAML": (lambda path: "model: {a: [1\n", "Write it as YAML"),
    "a long name": (lambda path: keys(path, model="x" * 10**5), "characters"),
    "a long key": (lambda path: keys(path, **{"y" * 10**5: 1}), "no such key"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_hostile_file_is_refused(case, call, tmp_path):
    text, words = FILES[case]
    (tmp_path / "r.yaml").write_text(text(tmp_path))
    code, out, err = call("train", tmp_path / "r.yaml")
    assert code == 2 and out == "" and words in err and "Traceback" not in err, err[:2000]
    assert len(err) < 4000


ORDERS = {
    "a number of rows": "data.train=5",
    "rows of numbers": "data.train=[5]",
    "digits": f"training.max_steps={DIGITS}",
    "a size": f"budget.fast={'9' * 400}GiB",
    "aliases": "data.train=" + "[" * 500,
}


@pytest.mark.parametrize("case", ORDERS)
def test_a_hostile_order_is_refused(case, call, tmp_path):
    (tmp_path / "r.yaml").write_text(keys(tmp_path))
    code, out, err = call("plan", tmp_path / "r.yaml", ORDERS[case])
    assert code == 2 and out == "" and "Traceback" not in err and len(err) < 2500, err[:2000]


def test_what_recipes_hold_is_read():
    text = "a: &base {r: 4}\nb: *base\nc: [1, 1.5, text, null, true, 1.0e-4, 2026-01-01]\n"
    assert read_yaml(text, "recipe") == yaml.safe_load(text)
    words = read_yaml("[1e-4, -2E+3, .5e1, no, off, Yes, on, False]", "recipe")
    assert words == [1e-4, -2e3, 5.0, "no", "off", "Yes", "on", False]
    with pytest.raises(BadInput, match="line 3: "):
        read_yaml("a: 1\nb: [\n", "recipe")


def test_what_is_written_is_read_as_it_was():
    tree = {"a": ["1e-4", "no", "true", "null", "5", "1e", 1e-4, 1e-300, 0.1, 3, True, None, "e5", "y", "ü"]}
    written = write_yaml(tree)
    assert read_yaml(written, "") == tree
    assert yaml.safe_load(written)["a"][:3] == tree["a"][:3], "other readers of YAML too"


def test_a_message_keeps_its_ends():
    assert shortened("asked: have") == "asked: have"
    cut = shortened("model: " + "x" * 5000 + " y: there is none")
    assert len(cut) < 200 and cut.startswith("model: xxx") and cut.endswith(" y: there is none") and "5,0" in cut
