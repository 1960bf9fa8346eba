"""What `export` leaves needs no trimtab: it loads, says what it is, and its files are ordinary ones."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from torch import nn

from helpers_reply import SKY, byte_folder, learned, write_gguf
from helpers_run import make_world, tree
from trimtab.artifacts.adapter import short_targets
from trimtab.inference.export import export
from trimtab.model.hub import cached_folder
from trimtab.model.sampling import sample
from trimtab.recipe import Recipe


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


def test_an_adapter_on_a_gguf_file_loads_by_peft_alone(tmp_path):
    peft = pytest.importorskip("peft")
    gguf = write_gguf(tmp_path / "tiny.gguf", byte_folder(tmp_path / "m"))
    said: list[str] = []
    folder = cached_folder(str(gguf), say=said.append)
    assert "converting tiny.gguf" in said[0] and str(tmp_path / "cache") in said[0]
    assert said[-1].startswith(f"{folder}: tiny.gguf as a model folder")
    assert cached_folder(str(gguf), say=said.append) == folder and len(said) == len(set(said))
    recipe = learned(tmp_path, str(gguf), SKY, patches=["lora"], training={"learning_rate": 0.02})
    out = export(recipe, "peft")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(out))
    turn = [[{"role": "user", "content": text}] for text in ("sky", "coal")]
    replies = sample(model.base_model.model, transformers.AutoTokenizer.from_pretrained(out), turn)
    assert list(replies) == ["blue", "black"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    told = (out / "README.md").read_text()
    assert "lora on tiny.gguf" in told and "AutoPeftModelForCausalLM" in told and "`<|im_end|>`" in told


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_files_are_ordinary(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        recipe = learned(tmp_path, byte_folder(tmp_path / "m"), SKY, patches=["paca"], training={"max_steps": 1})
        folders = [export(recipe, "merged"), export(recipe, "peft"), tmp_path / "run" / "adapter"]
    finally:
        os.umask(before)
    for folder in folders:
        files = [path for path in folder.iterdir() if path.is_file()]
        assert {path.stat().st_mode & 0o777 for path in files} == {mode}
        assert (folder / "README.md").is_file() and any(path.suffix == ".safetensors" for path in files)


def test_a_card_of_a_merged_model(tmp_path):
    recipe = learned(tmp_path, byte_folder(tmp_path / "m"), SKY, training={"max_steps": 1}, data={"chat": False})
    told = (export(recipe, "merged") / "README.md").read_text()
    assert "AutoModelForCausalLM" in told and "plain text" in told and "with a line end" in told
    assert str(tmp_path) not in told


def test_short_targets():
    block = lambda: nn.ModuleDict({"q": nn.Linear(2, 2), "o": nn.Linear(2, 2)})  # noqa: E731
    model = nn.ModuleDict({"a": block(), "b": block(), "head": nn.ModuleDict({"o": nn.Embedding(2, 2)})})
    assert short_targets(model, ["a.q", "b.q"]) == ["q"]
    assert short_targets(model, ["a.q"]) == ["a.q"]  # another one has the name, too
    assert short_targets(model, ["a.o", "b.o", "a.q", "b.q"]) == ["a.o", "b.o", "q"]  # as has an embedding


def test_short_targets_find_the_same_modules(tmp_path):
    """By peft's own rule, on the stock model."""
    from peft import LoraConfig, get_peft_model

    recipe = learned(tmp_path, byte_folder(tmp_path / "m"), SKY, patches=[{"lora": {"targets": r".*\.0\..*proj"}}],
                     training={"max_steps": 1})  # fmt: skip
    names = json.loads((export(recipe, "peft") / "adapter_config.json").read_text())["target_modules"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    found = get_peft_model(model, LoraConfig(target_modules=names)).base_model.targeted_module_names
    assert len(found) == 7 and all(".0." in name for name in found)
    assert torch.is_tensor(model.lm_head.weight)


def test_a_sparse_change_is_exported_as_shira(tmp_path):
    peft = pytest.importorskip("peft")
    world = make_world(tmp_path)
    keys = tree(world, tmp_path / "run", {"senszoq": {"density": 0.02}}, max_steps=2)
    recipe = Recipe.from_dict(keys)
    recipe.train()
    folder = export(recipe, "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "SHIRA" and "q_proj" in str(config["target_modules"])
    auto = transformers.AutoModelForCausalLM
    stock = peft.PeftModel.from_pretrained(auto.from_pretrained(world / "llama"), folder).eval()
    merged = auto.from_pretrained(export(recipe, "merged")).eval()
    ids = torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        assert torch.allclose(stock(ids).logits, merged(ids).logits, atol=1e-5)
