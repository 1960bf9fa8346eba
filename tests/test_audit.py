"""`trimtab data audit`: planted faults are found, each once, and clean rows raise no alarm."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

import pytest

from helpers_run import make_world, tree, write_rows
from trimtab.cli import main
from trimtab.data.audit import audit, write_clean
from trimtab.data.near import near_pairs, shingles_of
from trimtab.data.row_faults import Words, cut_answer, encoding_fault, language, secret
from trimtab.errors import BadInput
from trimtab.validation import write_yaml

NOUNS = "river harbour engine garden winter market student ladder island window candle bridge teacher forest".split()
VERBS = "carries repairs follows visits paints measures forgets opens crosses cleans borrows watches".split()
HOW = "slowly every morning|without a word|before the rain|near the old mill|for three years|with great care".split("|")


def sentence(draw: random.Random) -> str:
    one, two = draw.sample(NOUNS, 2)
    return f"The {one} {draw.choice(VERBS)} the {two} {draw.choice(HOW)}."


def chat(draw: random.Random, number: int) -> dict:
    """A conversation of one or two questions, all different."""
    turns = [{"role": "system", "content": "You are a careful guide."}] if draw.random() < 0.3 else []
    for _ in range(draw.choice((1, 2))):
        turns.append({"role": "user", "content": f"What happens in chapter {number}? {sentence(draw)}"})
        turns.append({"role": "assistant", "content": " ".join(sentence(draw) for _ in range(draw.choice((4, 5, 6))))})
    return {"messages": turns}


@pytest.fixture(scope="module")
def clean() -> list[dict]:
    draw = random.Random(0)
    return [chat(draw, number) for number in range(300)]


def near_or_not() -> float:
    """Near duplicates are looked for where datasketch is installed."""
    try:
        import datasketch  # noqa: F401
    except ImportError:
        return 0
    return 0.8


def kinds(made) -> list[tuple[str, int]]:
    return [(finding.kind, finding.line) for finding in made.findings]


def test_no_false_alarm_on_clean_rows(clean, tmp_path):
    half = len(clean) // 2
    one, two = write_rows(tmp_path / "one.jsonl", clean[:half]), write_rows(tmp_path / "two.jsonl", clean[half:])
    made = audit([str(one)], [str(two)], near=near_or_not())
    assert made.findings == [] and [len(source.rows) for source in made.sources] == [half, half]
    assert made.sources[0].languages == {"en": half}
    assert list(made.lines())[-1] == "nothing found"


def broken(row: dict, **changes) -> dict:
    """`row` with the content of turns replaced; `last=""` changes the last turn."""
    turns = [dict(turn) for turn in row["messages"]]
    turns[-1] |= changes
    return {"messages": turns}


def test_planted_faults_are_found(clean, tmp_path):
    rows = [json.loads(json.dumps(row)) for row in clean[:100]]
    last = rows[0]["messages"][-1]["content"]
    planted = {
        "exact": {"messages": [{**turn, "content": turn["content"].upper() + " "} for turn in rows[3]["messages"]]},
        "roles": {"messages": [*rows[4]["messages"], {"role": "user", "content": "And then? Does it go on?"}]},
        "empty": broken(rows[5], content=" \n"),
        "cut": broken(rows[6], content=last + " The harbour repairs the old bridge, the window and the"),
        "encoding": broken(rows[7], content=last + " The cafÃ© closes."),
        "language": broken(rows[8], content="Der Fluss und der Garten sind nicht für die Stadt, das ist mit dem Wind "
                           "auf den Wegen. " * 9),
        "secret": broken(rows[9], content=last + " The key is AKIA" + "Q7" * 8 + "."),
    }  # fmt: skip
    lines = [json.dumps(row) for row in rows] + [json.dumps(row) for row in planted.values()]
    lines += ['{"messages": [', '{"messages": "hello"}']
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"messages": [{"role": "user", "content": "\xe9"}]}\n')
    made = audit([str(path)], near=0)
    found = {line: kind for kind, line in kinds(made)}
    wanted = {101 + index: kind for index, kind in enumerate(planted)} | {108: "broken", 109: "broken", 110: "encoding"}
    assert found == wanted
    assert "AKIA" not in json.dumps(made.to_dict())


def test_overlap_with_a_test_set_is_found_in_the_training_file(clean, tmp_path):
    other = broken(clean[11], content="The teacher follows the candle. The island cleans the ladder before the rain.")
    train = write_rows(tmp_path / "train.jsonl", [*clean[:10], clean[50], other])
    test = write_rows(tmp_path / "test.jsonl", [clean[50], *clean[11:20]])
    made = audit([str(train)], [str(test)], near=0)
    assert [(finding.kind, finding.file, finding.line) for finding in made.findings] == [
        ("overlap", str(train), 11), ("overlap", str(train), 12)]  # fmt: skip
    assert made.findings[0].detail == f"as line 1 of {test}"
    assert made.findings[1].detail == f"the prompt of line 2 of {test}"


def test_near_duplicates_are_found(clean, tmp_path):
    pytest.importorskip("datasketch")
    rows = clean[:60]
    nearly = broken(rows[2], content=rows[2]["messages"][-1]["content"].replace("The", "A", 1))
    train = write_rows(tmp_path / "train.jsonl", [*rows, nearly])
    longer = broken(rows[7], content=rows[7]["messages"][-1]["content"] + " Indeed.")
    test = write_rows(tmp_path / "test.jsonl", [longer, *clean[60:70]])
    made = audit([str(train)], [str(test)])
    found = [(finding.kind, finding.line) for finding in made.findings]
    assert found == [("overlap", 8), ("near", 61)]
    texts = [" ".join(turn["content"] for turn in row["messages"]) for row in [*rows, nearly]]
    sets = [shingles_of(text) for text in texts]
    share = lambda i, j: len(sets[i] & sets[j]) / len(sets[i] | sets[j])  # noqa: E731
    exact = {i for i in range(len(sets)) for j in range(i) if share(i, j) >= 0.8}
    assert {i for i, _, _ in near_pairs(texts, 0.8)} == exact
    assert all(found == pytest.approx(share(i, j)) for i, j, found in near_pairs(texts, 0.8))


def test_near_duplicates_need_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(BadInput, match=r"datasketch is not installed.*trimtab\[audit\].*--near 0"):
        list(near_pairs(["a"], 0.8))


def test_tokens_are_those_of_training(tmp_path):
    world = make_world(tmp_path)
    from trimtab.engine.inputs import foresee
    from trimtab.model.load import config_folder, load_tokenizer
    from trimtab.recipe import Recipe

    recipe = Recipe.from_dict(tree(world, tmp_path / "run", {"lora": {}}, pad_to_multiple_of=1))
    longest = foresee(recipe).batch["tokens"]
    tokenizer = load_tokenizer(config_folder(recipe.model))
    made = audit([str(world / "facts.jsonl")], (), recipe.data, tokenizer, longest - 1, near=0, skip=["exact"])
    sizes = made.sources[0].tokens
    assert max(sizes) == longest > min(sizes) > 0
    assert [kind for kind, _ in kinds(made)] == ["long"] * sizes.count(longest)


def test_single_rules():
    words = Words(["The committee finished the organization of the harbour."])
    long = "The ship was late, and nobody knew. It waited for the organiz"
    assert cut_answer(long, Words([*["organization harbour"] * 3, long])).startswith("its last word")
    assert not cut_answer(long + "ation", Words([*["organization"] * 3, long]))
    assert not cut_answer("Paris and", words) and not cut_answer("It ends with a list:\n- one\n- two", words)
    assert cut_answer("Use this:\n```python\nprint(1)", words) and not cut_answer("```\na\n```", words)
    assert encoding_fault("naÃ¯ve") and encoding_fault("it\u00e2\u20ac\u2122s") and encoding_fault("a\x00b")
    for fine in ("naïve café, «CAFÉ»", "NÃO, ÂNGULO", "日本語", "emoji 👩‍🔬", "a\tb\r\n"):
        assert not encoding_fault(fine), fine
    assert language("Это предложение написано по-русски, и оно достаточно длинное.") == "cyrillic"
    assert language("The paper and the pencil are on the table that you have.") == "en"
    assert (
        language("Paris") == ""
        and language("今日は天気がいいので、公園まで散歩に行きましょう。そしてお茶を飲みます。") == "japanese"
    )
    assert secret("password: hunter2hunter2") and secret("-----BEGIN RSA PRIVATE KEY-----")
    assert not secret("The password: it must have at least eight characters.") and not secret("api_key = YOUR_API_KEY")


def test_a_cleaned_copy_is_never_in_place(clean, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*clean[:5], clean[2]])
    before = path.read_bytes()
    made = audit([str(path)], near=0)
    (written,) = write_clean(made, tmp_path / "clean")
    assert written.read_text() == "".join(before.decode().splitlines(keepends=True)[:5])
    assert audit([str(written)], near=0).findings == []
    with pytest.raises(BadInput, match="it is one of the files that were read"):
        write_clean(made, tmp_path, overwrite=True)
    with pytest.raises(BadInput, match="it exists"):
        write_clean(made, tmp_path / "clean")
    assert path.read_bytes() == before
    packed = tmp_path / "more/rows.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(before))
    with pytest.raises(BadInput, match="two files have this name"):
        write_clean(audit([str(path), str(packed)], near=0), tmp_path / "both")


@pytest.mark.parametrize("files,more,words", [
    ([], {}, "no file was named"), (["a.jsonl"], {"skip": ["roels"]}, "no such kind"),
    (["missing.jsonl"], {}, "no such file"), (["x", "x"], {}, "named twice"), (["a.jsonl"], {"near": 2}, "from 0 to 1"),
])  # fmt: skip
def test_bad_input(files, more, words):
    with pytest.raises(BadInput, match=words):
        audit(files, **more)


def test_the_verb(clean, tmp_path, capsys, monkeypatch):
    world = make_world(tmp_path)
    path = write_rows(world / "rows.jsonl", [*clean[:5], clean[2]])
    keys = tree(world, world / "run", {"lora": {}}, max_length=512)
    keys["data"] = {"train": "rows.jsonl", "test": "facts.jsonl"}
    (world / "recipe.yaml").write_text(write_yaml(keys))

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["trimtab", "data", "audit", "--near", "0", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert call(str(path)) == 0 and "exact: 1" in capsys.readouterr().out
    assert call(str(path), "--strict") == 1 and call(str(path), "--strict", "--skip", "exact") == 0
    capsys.readouterr()
    assert call("--recipe", str(world / "recipe.yaml"), "--json", "--write", str(tmp_path / "out")) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(file["file"]).name for file in found["files"]] == ["rows.jsonl", "facts.jsonl"]
    assert found["files"][0]["tokens"] > 0 and found["files"][1]["part"] == "test" and found["found"] == 1
    assert len((tmp_path / "out/rows.jsonl").read_text().splitlines()) == 5
