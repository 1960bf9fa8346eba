"""Files that never end, models that are damaged, templates that loop: each is a sentence, soon."""

from __future__ import annotations

import gzip
import json
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers_run import make_world, tree
from trimtab.data import files
from trimtab.data.files import read_table
from trimtab.errors import BadInput
from trimtab.inference.session import Inference
from trimtab.model import reply
from trimtab.planning.plan import plan
from trimtab.process.time_limit import TookTooLong, time_limit
from trimtab.recipe import Recipe

LOOP = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def recipe(world, output, **changes) -> Recipe:
    return Recipe.from_dict({**tree(world, output, {"lora": {"r": 4}}, max_steps=1), **changes})


# --- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_a_chat_template_that_does_not_end(world, tmp_path, monkeypatch, verb):
    monkeypatch.setattr(reply, "RENDERING", 0.5)
    (tmp_path / "loop.jinja").write_text(LOOP)
    talk = [{"role": "user", "content": "paris"}, {"role": "assistant", "content": "france"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    data = {"train": str(tmp_path / "chat.jsonl"), "chat_template": str(tmp_path / "loop.jinja")}
    made = recipe(world, tmp_path / "run", data=data)
    began = time.monotonic()
    with pytest.raises(BadInput, match="did not end within 0.5 seconds"):
        if verb == "train":
            made.train()
        else:
            from trimtab.model.sampling import prompt_ids

            session = Inference(made, base_only=True)
            session.tokenizer.chat_template = LOOP
            prompt_ids(session.tokenizer, talk[:1])
    assert time.monotonic() - began < 30
    assert not (tmp_path / "run").exists()


def test_the_limit_holds_in_any_thread_and_only_within():
    ends = []

    def work() -> None:
        try:
            with time_limit(0.2):
                while True:
                    pass
        except TookTooLong as error:
            ends.append(str(error))
        time.sleep(0.3)
        ends.append("goes on")

    thread = threading.Thread(target=work)
    thread.start()
    with time_limit(0.1):
        fast = sum(range(1000))
    time.sleep(0.3)
    thread.join()
    assert fast == 499500 and ends == ["it did not end within 0.2 seconds", "goes on"]


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(world, tmp_path):
    """(changes the file's bytes or tensors) -> a copy of the tiny Llama."""
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(world / "llama", folder)
    return folder


@pytest.mark.parametrize("size", [0, 5, 20_000])
def test_a_truncated_base_is_refused_by_plan_and_train(world, tmp_path, damaged, size):
    with (damaged / "model.safetensors").open("r+b") as file:
        file.truncate(size)
    made = recipe(world, tmp_path / "run", model=str(damaged))
    for call in (lambda: plan(made), made.train):
        with pytest.raises(BadInput, match=r"model.safetensors is damaged .* Fetch the model again"):
            call()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_with_nan_is_not_trained(world, tmp_path, damaged, value):
    tensors = load_file(damaged / "model.safetensors")
    name = next(key for key in tensors if "q_proj" in key)
    tensors[name][0, 0] = value
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="a weight is NaN or infinite"):
        recipe(world, tmp_path / "run", model=str(damaged)).train()
    assert torch.isfinite(load_file(world / "llama" / "model.safetensors")[name]).all()


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_file_of_newlines(tmp_path, monkeypatch):
    path = tmp_path / "empty.jsonl.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(300):
            file.write(b"\n" * 1_000_000)  # 300 MB in some 300 KB
    began = time.monotonic()
    with pytest.raises(BadInput, match="more than 1,000,000 empty lines"):
        read_table([str(path)], None, "train")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("content", [b" " * 3000 + b"\n", b'{"text": "' + b"a" * 3000 + b'"}\n', b"x" * 3000])
def test_a_line_without_end(tmp_path, monkeypatch, content):
    monkeypatch.setattr(files, "LONGEST_LINE", 2**11)
    (tmp_path / "long.jsonl").write_bytes(b'{"text": "good"}\n' + content)
    with pytest.raises(BadInput, match="longer than|empty lines"):
        read_table([str(tmp_path / "long.jsonl")], None, "train")


def test_a_csv_that_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_CSV", 2**12)
    with gzip.open(tmp_path / "big.csv.gz", "wb") as file:
        file.write(b"text\n" + b"good\n" * 2000)
    with pytest.raises(BadInput, match="unpacked, which are read at once"):
        read_table([str(tmp_path / "big.csv.gz")], None, "train")
