"""Data: each form from each kind of file, the masks that TRL makes of it, lengths, and each thing that may be wrong."""

from __future__ import annotations

import gzip
import json

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from helpers_load import CHAT, tiny_tokenizer
from trimtab.data.rows import check_lengths, eval_pairs, read_rows, tokenize_classification
from trimtab.data.spec import DataSpec
from trimtab.errors import BadInput

QA = [{"question": "paris ?", "answer": "france"}, {"question": "madrid ?", "answer": ["spain", "the spain"]}]


def write(path, rows, packed=False):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    return str(path)


def read(path, tokenizer=None, task="causal-lm", like=None, **spec):
    return read_rows(DataSpec(train=path, **spec), "train", tokenizer, task, like)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_question_and_answer_become_a_chat(tmp_path):
    path = write(tmp_path / "d.jsonl.gz", QA, packed=True)
    rows = read(path, tiny_tokenizer())
    assert rows.dataset.column_names == ["prompt", "completion"]
    assert rows.dataset[1] == {"prompt": [user("madrid ?")], "completion": [assistant("spain")]}
    assert eval_pairs(rows)[1] == ([user("madrid ?")], ["spain", "the spain"])
    rows = read(path, tiny_tokenizer(), system="good")
    assert rows.dataset[0]["prompt"] == [{"role": "system", "content": "good"}, user("paris ?")]


def test_squads_form_of_answers(tmp_path):
    row = {"question": "paris ?", "context": "x", "answers": {"text": ["france", "the france"], "answer_start": [0, 0]}}
    names = {"question": "question", "answer": "answers"}
    rows = read(write(tmp_path / "d.jsonl", [row]), tiny_tokenizer(None), columns=names)
    assert rows.dataset[0] == {"prompt": "paris ?\n", "completion": "france"}
    assert rows.answers == [["france", "the france"]]
    for answers in ({"text": []}, {"text": [3]}, {"start": [1]}):
        with pytest.raises(BadInput, match="d.jsonl, line 1"):
            read(write(tmp_path / "d.jsonl", [row | {"answers": answers}]), columns=names)


@pytest.mark.parametrize("template, chat", [(None, None), (CHAT, False)])
def test_question_and_answer_without_a_chat(tmp_path, template, chat):
    rows = read(write(tmp_path / "d.jsonl", QA), tiny_tokenizer(template), chat=chat)
    assert rows.dataset[0] == {"prompt": "paris ?\n", "completion": "france"}


def test_prompt_and_completion_stay_as_they_are(tmp_path):
    path = write(tmp_path / "d.jsonl", QA)
    columns = {"prompt": "question", "completion": "answer"}
    rows = read(path, tiny_tokenizer(), columns=columns)
    assert rows.form == "prompt + completion" and rows.dataset[0] == {"prompt": "paris ?", "completion": "france"}
    rows = read(path, tiny_tokenizer(), columns=columns, chat=True)
    assert rows.dataset[0] == {"prompt": [user("paris ?")], "completion": [assistant("france")]}
    path = write(tmp_path / "c.jsonl", [{"prompt": [user("paris ?")], "completion": "france"}])
    assert read(path, tiny_tokenizer()).dataset[0]["completion"] == [assistant("france")]


def test_messages(tmp_path):
    talk = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    tools = [{"type": "function", "function": {"name": "f"}}]
    path = write(tmp_path / "d.jsonl", [{"messages": talk, "tools": tools, "id": 1}])
    rows = read(path, tiny_tokenizer())
    assert rows.dataset[0] == {"prompt": talk[:3], "completion": [talk[3]], "tools": json.dumps(tools)}
    assert not rows.assistant_only and eval_pairs(rows) == [(talk[:3], ["d"])]
    marked = read(path, tiny_tokenizer("{%- generation %}x{% endgeneration -%}"))
    assert marked.assistant_only and marked.dataset[0]["messages"] == talk
    assert eval_pairs(marked) == [(talk[:3], ["d"])]


ALPACA = {"instruction": "add", "input": "1 2", "output": "3", "text": "Below is an instruction"}
SHARE = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
         {"from": "tool", "value": "c"}, {"from": "gpt", "value": "d"}]  # fmt: skip


def test_alpaca(tmp_path):
    """Its input may be empty or missing; its ready-made text is not what is trained on."""
    bare = {"instruction": "say hi", "output": "hi"}
    path = write(tmp_path / "d.jsonl", [ALPACA, bare | {"input": ""}, bare])
    rows = read(path, tiny_tokenizer(None))
    assert rows.form == "instruction + output"
    assert rows.dataset[0] == {"prompt": "add\n\n1 2\n", "completion": "3"}
    assert rows.dataset[1] == rows.dataset[2] == {"prompt": "say hi\n", "completion": "hi"}
    rows = read(path, tiny_tokenizer(), system="s")
    talk = [{"role": "system", "content": "s"}, user("add\n\n1 2")]
    assert rows.dataset[0] == {"prompt": talk, "completion": [assistant("3")]}
    assert eval_pairs(rows)[0] == (talk, ["3"])
    renamed = write(tmp_path / "r.jsonl", [{"ask": "a", "more": "b", "say": "c"}])
    columns = {"instruction": "ask", "input": "more", "output": "say"}
    assert read(renamed, tiny_tokenizer(None), columns=columns).dataset[0]["prompt"] == "a\n\nb\n"


def test_alpaca_with_history_and_system(tmp_path):
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}
    path = write(tmp_path / "d.jsonl", [row])
    talk = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    assert read(path, tiny_tokenizer()).dataset[0] == {"prompt": talk, "completion": [assistant("d")]}
    with pytest.raises(BadInput, match="line 1: system is given, and no chat template"):
        read(path, tiny_tokenizer(None))
    with pytest.raises(BadInput, match="line 1: history has"):
        read(write(tmp_path / "d.jsonl", [row | {"history": ["a"]}]), tiny_tokenizer())


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_conversations(tmp_path, column):
    rows = read(write(tmp_path / "d.jsonl", [{column: SHARE}]), tiny_tokenizer())
    roles = ["system", "user", "assistant", "tool"]
    assert rows.form == column and [m["role"] for m in rows.dataset[0]["prompt"]] == roles
    assert rows.dataset[0]["completion"] == [assistant("d")] and rows.answers == [["d"]]
    path = write(tmp_path / "o.jsonl", [{column: [user("a"), assistant("b")], "system": "s"}])
    assert read(path, tiny_tokenizer()).dataset[0]["prompt"][0] == {"role": "system", "content": "s"}
    odd = [{column: [*SHARE[1:3], {"from": "narrator", "value": "x"}]}]
    with pytest.raises(BadInput, match=f'line 1: {column} has a message from "narrator"'):
        read(write(tmp_path / "d.jsonl", odd), tiny_tokenizer())


def test_text_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]
    rows = read(write(tmp_path / "d.jsonl", [{"messages": talk}]), tiny_tokenizer())
    assert rows.dataset[0] == {"prompt": [user("hello")], "completion": [assistant("hel")]}
    for part, words in (({"type": "image", "url": "x"}, 'a part of the type "image"'), ("x", "has a str"),
                        ({"type": "text"}, "is null, not text")):  # fmt: skip
        path = write(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": [part]}, *talk[1:]]}])
        with pytest.raises(BadInput, match=f"line 1: messages .*{words}"):
            read(path, tiny_tokenizer())


def test_tool_calls_are_not_merged_across_rows(tmp_path):
    call = [{"function": {"name": "f", "arguments": {"x": 1}}}]
    other = [{"function": {"name": "g", "arguments": {"y": "two"}}}]
    rows = [{"messages": [user("a"), {"role": "assistant", "tool_calls": c}]} for c in (call, other)]
    dataset = read(write(tmp_path / "d.jsonl", rows), tiny_tokenizer()).dataset
    assert dataset[0]["completion"][0]["tool_calls"] == call
    assert dataset[1]["completion"][0]["tool_calls"] == other


def test_text_csv_and_parquet(tmp_path):
    rows = [{"text": 'a "good", film\nis', "x": 1}, {"text": "007", "x": 2}]
    (tmp_path / "d.csv").write_text('text,x\n"a ""good"", film\nis",1\n007,2\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("d.csv", "d.parquet"):
        found = read(str(tmp_path / name))
        assert found.form == "text" and found.dataset.to_list() == [{"text": row["text"]} for row in rows]
    with pytest.raises(BadInput, match="have no answers"):
        eval_pairs(found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.csv", "d.parquet"]


def test_several_files_and_a_limit(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", [{"text": f"{i}{j}"} for j in range(3)]) for i in range(2)]
    assert read(paths).dataset["text"][:] == ["00", "01", "02", "10", "11", "12"]
    assert read(paths, limit=4).dataset["text"][:] == ["00", "01", "02", "10"]


def test_trl_masks_the_prompt(tmp_path):
    trl = pytest.importorskip("trl")
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=64,
                                         num_attention_heads=2))  # fmt: skip
    tokenizer = tiny_tokenizer()
    dataset = read(write(tmp_path / "d.jsonl", QA), tokenizer).dataset
    args = trl.SFTConfig(str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False)
    done = trl.SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer).train_dataset
    trained = [t for t in done[0]["labels"] if t != -100]
    assert tokenizer.decode([t for t in trained if t != 4]) == "france </s>"


# Classification


def test_classification_labels(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": "yes"}, {"sentence1": "c", "sentence2": "d", "label": "no"}]
    train = read(write(tmp_path / "d.jsonl", rows), task="classification")
    assert train.labels == ["no", "yes"]
    assert train.dataset[0] == {"text": "a", "text_pair": "b", "label": 1}
    one = read(write(tmp_path / "t.jsonl", rows[:1]), task="classification", like=train)
    assert one.labels == train.labels and one.dataset["label"][:] == [1]
    rows[0]["label"] = "yess"
    with pytest.raises(BadInput, match='line 1.*Did you mean "yes"'):
        read(write(tmp_path / "t.jsonl", rows), task="classification", like=train)


@pytest.mark.parametrize("values, names", [([0, 1, 2], ["0", "1", "2"]), ([1.0, 0.0], ["0", "1"]),
                                           ([10, 9], ["9", "10"]),
                                           ([True, False], ["False", "True"]), (["1", "0"], ["0", "1"])])  # fmt: skip
def test_kinds_of_labels(tmp_path, values, names):
    path = write(tmp_path / "d.jsonl", [{"sentence": "a", "label": value} for value in values])
    rows = read(path, task="classification")
    assert rows.labels == names
    assert [names[i] for i in rows.dataset["label"]] == [str(value).removesuffix(".0") for value in values]


QUOTED = {
    "d.jsonl": [(["007", "7"], ["007", "7"]), (["10", "9"], ["9", "10"]), (["1.0", "1"], ["1", "1.0"])],
    "d.csv": [(["007", "7"], ["007", "7"]), (["10", "9"], ["9", "10"]), (["1.0", "0"], ["0", "1"])],
}


@pytest.mark.parametrize("name, values, names", [(name, *case) for name in QUOTED for case in QUOTED[name]])
def test_quoted_numbers_stay_apart(tmp_path, name, values, names):
    path = tmp_path / name
    if name == "d.csv":
        path.write_text("text,label\n" + "".join(f"a,{value}\n" for value in values))
    else:
        write(path, [{"text": "a", "label": value} for value in values])
    rows = read(str(path), task="classification")
    assert rows.labels == names
    one = write(tmp_path / "one.jsonl", [{"text": "a", "label": values[0]}])
    like = read(one, task="classification", like=rows)
    assert like.dataset["label"][0] == rows.dataset["label"][0]


def test_numbers_in_csv_are_numbers(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\na,1\nb,1.0\nc,2.5\n")
    assert read(str(tmp_path / "d.csv"), task="classification").dataset["label"][:] == [1.0, 1.0, 2.5]


def test_regression(tmp_path):
    pairs = [{"sentence1": "a", "sentence2": "b", "score": score} for score in (5.0, 3.8)]
    train = read(write(tmp_path / "d.jsonl", pairs), task="classification", columns={"label": "score"})
    assert train.regression and train.labels is None and train.dataset["label"][:] == [5.0, 3.8]
    spec = {"task": "classification", "columns": {"label": "score"}, "like": train}
    assert read(write(tmp_path / "t.jsonl", pairs[:1]), **spec).dataset["label"][:] == [5.0]


@pytest.mark.parametrize("values, words", [([0, 0], "every row has the label 0"), ([0, None], "line 2.*null"),
                                           ([0, "x"], "line 2.*unlike"), ([0, -1], "line 2.*without a label"),
                                           ([0, [1]], "line 2.*list"), ([0.5, float("nan")], "finite")])  # fmt: skip
def test_bad_labels(tmp_path, values, words):
    path = write(tmp_path / "d.jsonl", [{"sentence": "a", "label": value} for value in values])
    with pytest.raises(BadInput, match=words):
        read(path, task="classification")


def test_tokenize_classification(tmp_path):
    rows = [{"sentence1": "paris is", "sentence2": "a film", "label": i, "id": i} for i in (0, 1)]
    rows[1]["sentence2"] = "good " * 20
    train = read(write(tmp_path / "d.jsonl", rows), task="classification")
    tokenizer = tiny_tokenizer(None)
    dataset, lengths = tokenize_classification(train, tokenizer)
    assert lengths.longest == 25 and dataset["labels"][:] == [0, 1] and len(dataset[0]["input_ids"]) == 7
    with pytest.raises(BadInput, match="1 of 2 rows .* the longest 25"):
        tokenize_classification(train, tokenizer, 10)
    cut, lengths = tokenize_classification(train, tokenizer, 10, "cut")
    assert lengths.cut == 1 and len(cut[1]["input_ids"]) == 10 and cut[1]["input_ids"][-1] == 4
    dropped, lengths = tokenize_classification(train, tokenizer, 10, "drop")
    assert lengths.dropped == 1 and len(dropped) == 1


# Lengths


def test_lengths():
    ids = {"input_ids": [[1] * 5, [1] * 9, [1] * 7], "name": ["a", "b", "c"]}
    ids["labels"] = [[1] * 5, [1] * 9, [-100] * 6 + [1]]
    dataset = Dataset.from_dict(ids)
    same, lengths = check_lengths(dataset, 9)
    assert same is dataset and (lengths.over, lengths.longest) == (0, 9)
    assert check_lengths(dataset, None)[1].over == 0
    with pytest.raises(BadInput, match="2 of 3 rows have more than 6 tokens, the longest 9"):
        check_lengths(dataset, 6)
    cut, lengths = check_lengths(dataset, 6, "cut")
    assert cut.to_dict() == {"input_ids": [[1] * 5, [1] * 6], "name": ["a", "b"], "labels": [[1] * 5, [1] * 6]}
    assert (lengths.over, lengths.cut, lengths.dropped) == (2, 1, 1)
    assert check_lengths(dataset, 6, "drop")[0]["name"][:] == ["a"]
    with pytest.raises(BadInput, match="no row is left"):
        check_lengths(dataset, 2, "drop")


# Bad input

GOOD = b'{"text": "a"}\n'
FILES = {
    "not JSON": (GOOD + b"{text}\n", "d.jsonl, line 2: it is not JSON"),
    "not an object": (GOOD + b"\n[1]\n", "line 3: it is a list, not an object"),
    "no column": (GOOD + b'{"txt": "b"}\n', "line 2: it has no column text, only txt"),
    "wrong type": (GOOD + b'{"text": 5}\n', "line 2: text is an int .5., not text"),
    "null": (GOOD + b'{"text": null}\n', "line 2: text is null"),
    "not UTF-8": (GOOD + b'{"text": "\xe9"}\n', "line 2: it is not UTF-8"),
    "surrogate": (GOOD + b'{"text": "\\ud800"}\n', "line 2: text has half a surrogate"),
    "deep": (b"[" * 10**5 + b"\n", "line 1: it is not JSON"),
    "huge number": (b'{"text": ' + b"9" * 5000 + b"}\n", "line 1: it is not JSON"),
    "empty": (b"", "has no rows"),
    "blank": (b"\n\n", "has no rows"),
    "no known columns": (b'{"instruction": "a"}\n', "its columns are instruction"),
    "empty object": (b"{}\n", r"its columns are \(none\)"),
    "no role": (b'{"messages": [{"by": "human", "value": "a"}]}\n', "line 1: messages has a message without a role"),
    "no messages": (b'{"messages": []}\n', "line 1: messages is a list"),
    "no answer turn": (b'{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: messages has no assistant turn"),
    "empty text": (GOOD + b'{"text": ""}\n', "line 2: text is empty"),
    "tools no list": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "{x"}\n',
        "line 1: tools is a str",
    ),
    "no answers": (b'{"question": "a", "answer": []}\n', "line 1: answer is an empty list"),
    "answer a number": (b'{"question": "a", "answer": 7}\n', "line 1: answer is an int"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_rows(tmp_path, case):
    content, words = FILES[case]
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=words):
        read(str(tmp_path / "d.jsonl"), tiny_tokenizer())


@pytest.mark.parametrize("name, content, words", [
    ("d.jsonl.gz", GOOD, "not intact gzip"),
    ("d.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-20], "not intact gzip"),
    ("d.csv", b"text\n\xe9\n", "line 2: it is not UTF-8"),
    ("d.csv", b"text,label\na,1\nb,2,3\n", "it is not CSV"),
    ("d.csv", b"", "has no rows"),
    ("d.csv", b"text\n", "has no rows"),
    ("d.parquet", b"PAR1 but no", "not an intact Parquet"),
    ("d.txt", b"text", "ends in none of"),
])  # fmt: skip
def test_bad_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=words):
        read(str(tmp_path / name))


def test_missing_things(tmp_path):
    path = write(tmp_path / "facts.jsonl", QA)
    with pytest.raises(BadInput, match='Did you mean "facts.jsonl"'):
        read(str(tmp_path / "fact.jsonl"))
    with pytest.raises(BadInput, match="it is a folder"):
        read(str(tmp_path))
    with pytest.raises(BadInput, match='has the columns question, answer. Did you mean "question"'):
        read(path, columns={"prompt": "questions", "completion": "answer"})
    with pytest.raises(BadInput, match='Did you mean "completion"'):
        DataSpec(path, columns={"completions": "answer"})
    with pytest.raises(BadInput, match="too_long"):
        DataSpec(path, too_long="skip")
    with pytest.raises(BadInput, match="limit"):
        DataSpec(path, limit=0)
    with pytest.raises(BadInput, match="does not name it"):
        read_rows(DataSpec(path), "test")
    with pytest.raises(BadInput, match="no chat template"):
        read(path, tiny_tokenizer(None), chat=True)
    with pytest.raises(BadInput, match="plain text, not a chat"):
        read(path, tiny_tokenizer(None), system="good")
    with pytest.raises(BadInput, match="text \\+ label is needed"):
        read(path, task="classification")


def test_a_hub_that_does_not_answer(monkeypatch):
    def fail(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.get_dataset_split_names", fail)
    with pytest.raises(BadInput, match="the hub does not return it .*no route"):
        read("nobody/nothing")


def test_hub_splits(monkeypatch):
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *_: ["train", "validation"])
    asked = []

    def load(*args, split):
        asked.append((*args, split))
        return Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    for name, part in [("o/n", "train"), ("o/n", "test"), ("o/n:dev", "test"), ("o/n:c:dev", "train")]:
        read_rows(DataSpec(name, name), part)
    assert asked == [("o/n", None, "train"), ("o/n", None, "validation"), ("o/n", None, "dev"), ("o/n", "c", "dev")]


def test_how_many_lengths_batches_have():
    from trimtab.data.order import batch_lengths

    same, mixed = numpy.full(50, 20), numpy.arange(1, 101)
    assert batch_lengths(same, 4, 16, 1000) == 1
    assert batch_lengths(mixed, 1, 1, 10_000) == 100 and batch_lengths(mixed, 1, 16, 10_000) == 7
    assert batch_lengths(mixed, 1, 1, 10) == 10, "so many batches have so many lengths at most"
    assert batch_lengths(mixed, 25, 16, 10_000) < 7, "the longest of 25 is long"
    assert batch_lengths(mixed[:3], 8, 1, 5) == 1
