"""Every reader of files and requests, given what nobody would write: it returns, or says in a sentence what is wrong.

The short form tries the same few inputs each time; `pytest -m long` tries thousands of new ones. An input that once
failed is kept in `FOUND`.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import strategies as st

import trimtab
from conftest import MODELS
from helpers_fuzz import changed, damaged, fuzz, values
from helpers_load import tiny_llama, tiny_tokenizer
from helpers_run import make_world, tree
from test_adapter_files import saved
from trimtab import methods
from trimtab.artifacts import checkpoint_files
from trimtab.artifacts.adapter import CONFIG, OURS, load_adapter, load_into, patches_of
from trimtab.artifacts.adapter_weights import CHECKSUMS, WEIGHTS
from trimtab.artifacts.run_folder import checkpoints, finished_run, open_run
from trimtab.cost import cache_file
from trimtab.data import audit
from trimtab.data.rewards import load_rewards
from trimtab.data.rows import eval_pairs, read_rows, tokenize_classification
from trimtab.data.spec import DataSpec
from trimtab.engine.arguments import time_limit
from trimtab.memory import budget
from trimtab.model import hub
from trimtab.model.load import empty_model
from trimtab.model.spec import ModelSpec
from trimtab.recipe import Recipe, override
from trimtab.report.report import report
from trimtab.serving import protocol
from trimtab.validation import read_yaml
from world import make

pytestmark = pytest.mark.filterwarnings("ignore")
PLACE = trimtab.Place(fast="cpu")
RECIPE = {
    **tree(Path("w"), Path("o"), {"paca": {"r": 4}}, max_steps=2, save_strategy="steps", max_minutes=3),
    "data": {"train": ["a.jsonl"], "test": "b.jsonl", "columns": {"text": "t"}, "chat": True, "limit": 3,
             "metrics": ["contains"], "rewards": [{"regex": "a.*"}, "contains"]},
    "objective": {"causal_lm": {}}, "stepper": "backprop", "budget": {"fast": "6GiB", "slow": "90%"},
    "place": {"fast": "cpu", "slow": "disk", "folder": "f"}, "rehearsal": {"budget": "4MiB", "mix": 0.5},
    "stages": [{"name": "one", "data": {"train": "c.jsonl"}, "carry": "fresh"},
               {"name": "two", "data": "d.jsonl", "training": {"max_steps": 2}, "anchor": {"ewc": {"strength": 2.0}}}],
}  # fmt: skip
NAMES = tuple(sorted({*methods.TABLE, "model.name", "stages", "precision", "nf4", "revision", "calibration"}))
YAML = (b"&a ", b"*a", b"[", b"]", b"{", b"}", b"!!python/object:os.system", b": ", b"- ", b"\t", b"<<: *a", b"|\n",
        b"? ", b"---\n", b"%YAML 9", b"!!set", b"!!binary", b"!!timestamp", b"2026-99-99", b"0x", b"1:2:3", b"\xff",
        b"\xef\xbb\xbf", b"\xed\xa0\x80", b"=", b"!!float ", b"!!int ")  # fmt: skip
EACH = float(os.environ.get("TRIMTAB_FUZZ_SECONDS", "50"))  # of the long form, for each reader


def use(recipe: Recipe) -> None:
    """What every verb reads of a recipe before it loads anything."""
    recipe.load_patches()
    recipe.load_objective()
    recipe.load_stepper()
    recipe.training_values()
    recipe.stage_recipes()
    assert read_yaml(recipe.to_yaml(), "") is not None and recipe.hash and recipe.trains in (True, False)
    recipe.data_files()
    time_limit(recipe)
    budget.Budget.of(recipe.budget, 2**34, 2**34)
    load_rewards(recipe.data.rewards)
    open_run(recipe)
    finished_run(recipe)


# --- the readers, each with the folder that it may write to ----------------------------------------------------------


def recipe_text(folder: Path) -> tuple[Callable, st.SearchStrategy]:
    def reader(content: bytes) -> None:
        (folder / "r.yaml").write_bytes(content)
        use(Recipe.load(folder / "r.yaml"))

    return reader, damaged(yaml.safe_dump(RECIPE).encode(), YAML)


def recipe_tree(folder: Path) -> tuple[Callable, st.SearchStrategy]:
    def reader(content: Any) -> None:
        (folder / "r.yaml").write_text(yaml.dump(content, allow_unicode=False), "utf-8", "surrogatepass")
        use(Recipe.load(folder / "r.yaml"))
        use(Recipe.from_dict(content))

    return reader, changed(RECIPE, NAMES)


def overrides(folder: Path) -> tuple[Callable, st.SearchStrategy]:
    keys = sorted({".".join(map(str, path)) for path in _paths(RECIPE)} | {"patches.lora.r", "model.name", "..", "."})
    texts = st.sampled_from(YAML).map(lambda piece: piece.decode(errors="replace")) | values(list(NAMES)).map(str)
    order = st.builds(lambda key, sign, text: key + sign + text, st.sampled_from(keys) | st.text(max_size=9),
                      st.sampled_from(["=", "=", "=", "", "=="]), texts)  # fmt: skip

    def reader(orders: list[str]) -> None:
        content = json.loads(json.dumps(RECIPE))
        for text in orders:
            override(content, text)
        use(Recipe.from_dict(content))

    return reader, st.lists(order, min_size=1, max_size=3)


def _paths(node: Any) -> list[tuple]:
    items = node.items() if isinstance(node, dict) else ()
    return [(key, *path) for key, value in items for path in [(), *_paths(value)]]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": "a", "tool_calls": [CALL]}]  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"messages": TALK, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}], "system": "s"},
    {"question": "which country is paris in ?", "answer": ["france", "f"]},
    {"question": "q", "answer": {"text": ["a"], "answer_start": [0]}},
    {"instruction": "i", "input": "in", "output": "o", "history": [["q", "a"]], "system": "s"},
    {"prompt": "p", "completion": "c"}, {"prompt": TALK[:2], "completion": TALK[2:]}, {"text": "t"},
    {"text": "a good film", "label": "good"}, {"text": "t", "text_pair": "u", "label": 1.5},
]  # fmt: skip


def use_rows(file: Path) -> None:
    """Read a file of rows as training does, and as the audit does."""
    tokenizer, failed = tiny_tokenizer(), []
    for task in ("causal-lm", "classification"):
        try:
            rows = read_rows(DataSpec(train=str(file)), "train", tokenizer, task)
            if task == "causal-lm":
                eval_pairs(rows) if rows.answers else None
            else:
                tokenize_classification(rows, tokenizer, 8, "cut")
        except trimtab.TrimtabError as error:
            failed.append(error)
    audit.audit([str(file)])
    if failed:
        raise failed[0]


def rows_tree(folder: Path) -> tuple[Callable, st.SearchStrategy]:
    def reader(rows: list[Any]) -> None:
        (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        use_rows(folder / "r.jsonl")

    some = st.sampled_from(ROWS).flatmap(lambda row: st.tuples(changed(row), st.just(row), changed(row)).map(list))
    return reader, some


def rows_bytes(folder: Path) -> tuple[Callable, st.SearchStrategy]:
    def reader(case: tuple[str, bytes]) -> None:
        (folder / case[0]).write_bytes(case[1])
        use_rows(folder / case[0])

    lines = "".join(json.dumps(row) + "\n" for row in ROWS[2:3] * 3).encode()
    csv = b'question,answer\n"which, one",b\nc,"d ""e"""\n'
    made: list[tuple[str, bytes]] = [("r.jsonl", lines), ("r.csv", csv), ("r.jsonl.gz", gzip.compress(lines)),
                                     ("r.csv.gz", gzip.compress(csv)), ("r.parquet", _parquet(folder))]  # fmt: skip
    tokens = (b'"', b",", b"\n", b"\r", b"{", b"[" * 3000, b"NaN", b"1" * 5000, b"\\ud800", b"\0", b"\xff", b"null")
    return reader, st.sampled_from(made).flatmap(lambda one: st.tuples(st.just(one[0]), damaged(one[1], tokens)))


def _parquet(folder: Path) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS[5:6] * 2), folder / "p.parquet")
    return (folder / "p.parquet").read_bytes()


def adapter(folder: Path) -> tuple[Callable, st.SearchStrategy]:
    """Adapter folders: the JSON files with parts exchanged, the tensors' file with another header or other bytes."""
    good = [saved(folder / name, name) for name in ("paca", "lora", "meft", "edora")]
    model = MODELS["llama"]()

    def reader(case: tuple[Path, str, Any, bool]) -> None:
        where, name, content, checked = case
        copy = Path(shutil.copytree(where, folder / "copy", dirs_exist_ok=False))
        try:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            if name == "header":
                data, name = struct.pack("<Q", len(data)) + data + (where / WEIGHTS).read_bytes()[-4096:], WEIGHTS
            (copy / name).write_bytes(data)
            if not checked:
                (copy / CHECKSUMS).unlink(missing_ok=True)
            patches_of(copy)
            for surgery in reversed(load_adapter(model, copy, PLACE)):
                surgery.revert()
        finally:
            shutil.rmtree(copy)

    def case(where: Path, name: str) -> st.SearchStrategy:
        raw = (where / (WEIGHTS if name == "header" else name)).read_bytes()
        head = raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]] if name == "header" else raw
        content = damaged(raw) if name == WEIGHTS else changed(json.loads(head), ("F64", "I8", "BOOL")) | damaged(head)
        return st.tuples(st.just(where), st.just(name), content, st.booleans())

    made = [case(where, name) for where in good for name in (CONFIG, OURS, CHECKSUMS, WEIGHTS, "header")]
    return reader, st.one_of(made)


def checkpoint(folder: Path) -> tuple[Callable, st.SearchStrategy]:
    """A checkpoint's own files. What torch wrote is damaged with checksums made right, as a stranger would."""
    model = MODELS["llama"]()
    surgery = make("paca").apply(model, PLACE)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    sum((p.float() ** 2).sum() for p in trained).backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    good = folder / "run" / "checkpoint-1"
    shutil.copytree(saved(folder / "a", "paca"), good)
    torch.save(optimizer.state_dict(), good / "optimizer.pt")
    torch.save(schedule.state_dict() | {"last_epoch": 1}, good / "scheduler.pt")
    (good / checkpoint_files.STATE).write_text(json.dumps({"global_step": 1, "epoch": 1.0, "log_history": [{"a": 1}]}))
    checkpoint_files.write_sums(good)
    recipe = Recipe.from_dict({**tree(folder, folder / "copy", {"paca": {"r": 4}}), "resume": True})

    def reader(case: tuple[str, Any, bool]) -> None:
        name, content, right = case
        copy = Path(shutil.copytree(good, folder / "copy" / good.name))
        try:
            (copy / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            if right and name != checkpoint_files.SUMS:
                checkpoint_files.write_sums(copy)
            checkpoint_files.check_files(copy)
            finished_run(recipe, checkpoints(folder / "copy")[-1])
            checkpoint_files.check_optimizer(copy / "optimizer.pt", optimizer)
            checkpoint_files.check_scheduler(copy / "scheduler.pt", schedule, 1)
            load_into([surgery], copy)
        finally:
            shutil.rmtree(copy)

    def case(name: str) -> st.SearchStrategy:
        raw = (good / name).read_bytes()
        content = damaged(raw) if name.endswith(".pt") else changed(json.loads(raw)) | damaged(raw)
        return st.tuples(st.just(name), content, st.booleans())

    names = (checkpoint_files.STATE, checkpoint_files.SUMS, OURS, "optimizer.pt", "scheduler.pt")
    return reader, st.one_of([case(name) for name in names])


def run_page(folder: Path) -> tuple[Callable, st.SearchStrategy]:
    """The files of a run, with what a run of several stages has besides."""
    world = make_world(folder / "world")
    Recipe.from_dict(tree(world, folder / "run", {"paca": {"r": 2}}, max_steps=2)).train()
    good = {path.name: path.read_text() for path in (folder / "run").iterdir() if path.suffix in (".json", ".jsonl")}
    files = {name: [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
             for name, text in good.items()}  # fmt: skip
    row, reply = {"acc": [0.5, None], "bwt": 0.1}, {"prompt": "p", "reply": "r", "answers": ["a"], "correct": True}
    files["run.json"] |= {
        "tasks": {"names": ["one", "two"], "metric": "acc", "matrix": {"acc": [[0.5, None], [0.4, 1.0]]},
                  "figures": row, "switched": {"row": row}, "change": {"one": [1, 2]}, "rows": [2, 3],
                  "general": {"perplexity": [1.5, 2.0], "file": "f",
                              "change_of_loss": {"change": 0.1, "low": 0, "high": 1}}},
        "baselines": {"joint": {"row": row, "acc": row, "figures": {"acc": row}}, "frozen": {"row": row}},
    }  # fmt: skip
    files["completions.jsonl"] = [{"step": 1, "prompt": "p", "completion": "c", "reward": 0.5, "rewards": {"a": 1}}]
    files["eval.json"] = files["eval_base.json"] = {"metrics": {"exact_match": 0.5}, "rows": 2, "replies": [reply]}
    files["recipe.yaml"] = RECIPE
    shutil.rmtree(folder / "run")
    (folder / "run").mkdir()

    def reader(case: dict[str, Any]) -> None:
        for name in files:
            content = case.get(name)
            rows = content if name.endswith("l") and isinstance(content, list) else [content]
            (folder / "run" / name).write_text("\n".join(map(json.dumps, rows)))
        report([folder / "run"])

    return reader, changed(files, ("joint", "loss", "stages", "eval_loss"), most=4, whole=False)


def request(folder: Path) -> tuple[Callable, st.SearchStrategy]:
    chat = {"messages": TALK[:2], "model": "m", "max_tokens": 5, "temperature": 0.5, "stop": ["a"], "seed": 1, "n": 1,
            "stream": True, "stream_options": {"include_usage": True}, "tools": [], "logit_bias": {}}  # fmt: skip
    plain = {"prompt": ["a", "b"], "model": "m", "top_p": 0.5, "stop": "x", "echo": False, "prompt_": [1, 2]}
    fields = tuple(sorted({*protocol.SUPPORTED, *protocol.NEUTRAL}))

    def reader(case: tuple[bytes, bool]) -> None:
        try:
            ask = protocol.read_ask(protocol.read_body(case[0]), "m", case[1])
            json.dumps(protocol.Form(ask, "m").whole([]), allow_nan=False).encode()
        except trimtab.TrimtabError as error:
            assert 400 <= protocol.status_of(error) < 500
            json.dumps(protocol.error_body(error), allow_nan=False, ensure_ascii=False).encode()
            raise

    bodies = [changed(body, fields).map(json.dumps).map(str.encode) | damaged(json.dumps(body).encode())
              for body in (chat, plain)]  # fmt: skip
    return reader, st.one_of([st.tuples(body, st.just(body is bodies[0])) for body in bodies])


def model_folder(folder: Path) -> tuple[Callable, st.SearchStrategy]:
    """A base's config.json and its files' headers, as far as a plan reads them."""
    good = tiny_llama(folder / "m")
    files = {name: (good / name).read_bytes() for name in ("config.json", "model.safetensors")}

    def reader(case: tuple[str, Any]) -> None:
        for name, content in (*files.items(), case):
            (good / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        hub.check_folder(good)
        empty_model(ModelSpec(str(good)), task="causal-lm")

    config = json.loads(files["config.json"])
    cases = [("config.json", changed(config)), ("config.json", damaged(files["config.json"])),
             ("model.safetensors.index.json", changed({"weight_map": {"a": "model.safetensors"}})),
             ("model.safetensors", damaged(files["model.safetensors"][:4000]))]  # fmt: skip
    return reader, st.one_of([st.tuples(st.just(name), content) for name, content in cases])


def small_files(folder: Path) -> tuple[Callable, st.SearchStrategy]:
    """Sizes, and the cache's files of measurements."""

    def reader(value: Any) -> None:
        (folder / "c.json").write_text(json.dumps(value))
        cache_file.read(folder / "c.json", 1, {"cpu": "c"})
        budget.Budget.of(value if isinstance(value, dict) else {"fast": value}, 2**34, 2**34)

    sizes = st.from_regex(r"-?[0-9]{1,30}(\.[0-9]{1,3})? ?(%|[kKmMgGtT]i?B|B)?", fullmatch=True)
    return reader, sizes | changed({"fast": "6GiB", "form": 1, "machine": {"cpu": "c"}})


FOUND: dict[str, list[Any]] = {  # inputs that once failed
    "overrides": [[".=!!int "], [".=!!float "]],
    "recipe_tree": [{**RECIPE, "budget": {"a": {"": 1, "1e5": 2}}}],  # keys of two kinds, once it is YAML
    "rows_tree": [[{**ROWS[4], "history": True}] * 3],
    "rows_bytes": [("r.jsonl.gz", bytes.fromhex("1f8b0800008f470e6b02ffab562a2c4d2d2ec9cccf53b252"))],  # a broken block
    "run_page": [{"run.json": {"model": "\ud800"}}],
    "model_folder": [("config.json", {"model_type": "llama", "architectures": [{"a": "b"}]})],
}
READERS = {  # how many inputs the short form tries
    "recipe_text": (recipe_text, 40), "recipe_tree": (recipe_tree, 40), "overrides": (overrides, 60),
    "rows_tree": (rows_tree, 40), "rows_bytes": (rows_bytes, 40), "adapter": (adapter, 25),
    "checkpoint": (checkpoint, 40), "run_page": (run_page, 10), "request": (request, 100),
    "model_folder": (model_folder, 30), "small_files": (small_files, 60),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_readers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_reader, count = READERS[name]
    fuzz(*make_reader(tmp_path), count, FOUND.get(name, []))


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_readers_long(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_reader, count = READERS[name]
    fuzz(*make_reader(tmp_path), count, FOUND.get(name, []), EACH)
