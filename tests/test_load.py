"""Loading: precisions, mapping, the base's hash, the cache, and each thing that may be wrong with a model's files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from helpers_load import tiny_bert, tiny_llama
from trimtab.errors import BadInput
from trimtab.model import hub
from trimtab.model.load import base_hash, cached_folder, load_model
from trimtab.model.spec import ModelSpec


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def llama(tmp_path):
    return tiny_llama(tmp_path / "llama")


IDS = torch.arange(1, 9)[None]


def test_a_spec_loads_no_torch():
    code = "import sys, trimtab.model.spec, trimtab.model.hub, trimtab.data.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32", "fp16", "nf4", "int8"])
def test_each_precision_computes_the_same_model(llama, precision):
    plain, _ = load_model(str(llama))
    model, tokenizer = load_model(ModelSpec(str(llama), precision))
    assert not model.training and tokenizer.pad_token is not None
    with torch.no_grad():
        wanted, found = plain(IDS).logits.float(), model(IDS).logits.float()
    close = {"nf4": 0.15, "int8": 0.05}.get(precision, 0.02)
    assert (wanted - found).norm() / wanted.norm() < close
    assert model.trimtab_base == plain.trimtab_base == base_hash(llama)


def test_a_4_bit_base_gives_gradients_after_it_has_generated(llama):
    model, _ = load_model(ModelSpec(str(llama), "nf4"))
    linear = model.model.layers[0].mlp.up_proj
    x = torch.randn(1, 3, 64, dtype=torch.bfloat16, requires_grad=True)
    grads = []
    for _ in range(2):
        (grad,) = torch.autograd.grad(linear(x).float().sum(), x)
        grads.append(grad)
        with torch.no_grad():
            linear(x.detach())  # where bitsandbytes would re-pack the weight
    assert torch.equal(*grads)


def test_a_base_at_its_files_precision_stays_mapped(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    big = {"hidden_size": 512, "intermediate_size": 8192}
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder, **big)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    weights = (folder / "model.safetensors").stat().st_size
    code = (
        "import sys; from trimtab.model.load import load_model\n"
        "def anon():\n"
        "    return next(int(l.split()[1]) << 10 for l in open('/proc/self/status') if 'RssAnon' in l)\n"
        "load_model(sys.argv[2]); before = anon(); model, _ = load_model(sys.argv[1]); print(anon() - before)"
    )
    small = tiny_llama(tmp_path / "small")
    out = subprocess.run([sys.executable, "-c", code, folder, small], capture_output=True, text=True, check=True).stdout
    assert int(out) < weights / 3


def test_the_hash_tells_bases_apart(tmp_path, llama):
    same = tiny_llama(tmp_path / "fp32", dtype=torch.float32)
    other = tiny_llama(tmp_path / "other", seed=1)
    assert base_hash(llama) == base_hash(same)
    assert base_hash(llama) != base_hash(other)
    model, _ = load_model(str(llama))
    del model.trimtab_base
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.5)
    assert base_hash(model) != base_hash(llama)


def test_a_classifier_and_a_causal_lm_share_a_base(llama):
    classifier, tokenizer = load_model(str(llama), task="classification", labels=3)
    assert classifier.config.num_labels == 3
    assert classifier.config.pad_token_id == tokenizer.pad_token_id
    assert classifier(IDS).logits.shape == (1, 3)
    assert classifier.trimtab_base == base_hash(llama)


def test_encoders(tmp_path):
    folder = tiny_bert(tmp_path / "bert")
    model, _ = load_model(str(folder), task="classification", labels=1)
    assert model.config.problem_type == "regression" and model(IDS).logits.shape == (1, 1)
    assert model.trimtab_base == base_hash(folder)
    with pytest.raises(BadInput, match="no such head"):
        load_model(str(folder))


@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("tiny", [tiny_llama, tiny_bert])
def test_heads_are_not_quantised(tmp_path, tiny, precision):
    model, _ = load_model(ModelSpec(str(tiny(tmp_path / "m")), precision), task="classification", labels=2)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert {kinds.get("score"), kinds.get("classifier")} == {"Linear", None}
    assert {kind for name, kind in kinds.items() if name.endswith(("q_proj", "query"))} <= {
        "Linear4bit",
        "Linear8bitLt",
    }
    assert model(IDS).logits.shape == (1, 2)


def test_a_tokenizer_without_pad_gets_one(tmp_path):
    _, tokenizer = load_model(str(tiny_llama(tmp_path / "m", pad=False)))
    assert tokenizer.pad_token == tokenizer.eos_token


# Bad input


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\xff"), "config.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "unknown type": (lambda f: edit(f, model_type="nonesuch"), "config.json cannot be read"),
    "wrong value": (lambda f: edit(f, hidden_size="wide"), "cannot be read"),
    "wrong shape": (lambda f: edit(f, intermediate_size=256), "do not have the shape"),
    "endless layers": (lambda f: edit(f, num_hidden_layers=10**9), "layers and the files have"),
    "more layers": (lambda f: edit(f, num_hidden_layers=3), "missing"),
    "cut weights": (lambda f: truncate(f / "model.safetensors"), "model.safetensors is damaged"),
    "garbage weights": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "is damaged"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer cannot be read"),
    "remote code": (lambda f: edit(f, model_type="x", auto_map={"AutoConfig": "evil.Config"}), "config.json cannot be"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder(llama, damage):
    spoil, words = DAMAGES[damage]
    spoil(llama)
    with pytest.raises(BadInput, match=words):
        load_model(str(llama))


def test_an_index_that_points_outside(llama):
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    with pytest.raises(BadInput, match="outside the folder"):
        cached_folder(str(llama))


def test_names_that_lead_nowhere(tmp_path, llama, monkeypatch):
    with pytest.raises(BadInput, match='Did you mean "llama"'):
        cached_folder(str(tmp_path / "lama"))
    with pytest.raises(BadInput, match="no such file"):
        cached_folder("./nowhere.gguf")
    with pytest.raises(BadInput, match='Did you mean "smollm2-135m"'):
        cached_folder("smollm-135m")
    with pytest.raises(BadInput, match="cannot be reached"):
        cached_folder("nobody/at-all")
    with pytest.raises(BadInput, match="neither a folder nor a hub id"):
        cached_folder("what is this?")
    with pytest.raises(BadInput, match='Did you mean "bf16"'):
        ModelSpec("x", "bf61")
    with pytest.raises(BadInput, match='Did you mean "classification"'):
        load_model(str(llama), task="clasification")


# The cache


def fake_wheel(tmp_path, monkeypatch, digest=None, files=None):
    """A short name whose wheel is a tiny Llama, and a `pip` that serves it."""
    model = tiny_llama(tmp_path / "source")
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in model.iterdir():
            archive.write(file, f"tiny/{file.name}")
    digests = {f"tiny/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in model.iterdir()}
    if digest:
        digests["tiny/model.safetensors"] = digest
    monkeypatch.setattr(hub, "SHORT_NAMES", {"tiny": hub.Short("tiny==1", "nobody/tiny", files or digests)})
    calls = []

    def pip(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(hub.subprocess, "run", pip)
    return calls


def left() -> list[str]:
    return [p.name for p in hub.cache_root().iterdir() if not p.name.endswith(".lock")]


def test_a_short_name_is_fetched_once(tmp_path, monkeypatch):
    calls = fake_wheel(tmp_path, monkeypatch)
    said = []
    first = cached_folder("tiny", say=said.append)
    assert cached_folder("Tiny") == first and len(calls) == 1 and len(said) == 1
    assert left() == [first.name]
    os.truncate(first / "model.safetensors", 1000)  # damaged in the cache: made again
    load_model("tiny")
    assert len(calls) == 2


@pytest.mark.parametrize("files", [None, {"tiny/absent": "0" * 64}])
def test_a_wheel_that_is_not_what_it_should_be(tmp_path, monkeypatch, files):
    fake_wheel(tmp_path, monkeypatch, digest="0" * 64, files=files)
    with pytest.raises(BadInput, match="has SHA-256|cannot be read from it"):
        cached_folder("tiny")
    assert left() == []


def test_no_network(tmp_path, monkeypatch):
    fake_wheel(tmp_path, monkeypatch)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution")
    monkeypatch.setattr(hub.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(BadInput, match="No matching distribution.*cannot be reached"):
        cached_folder("tiny")
    assert left() == []


def test_what_a_killed_process_left_is_cleared(tmp_path, monkeypatch):
    fake_wheel(tmp_path, monkeypatch)
    done = cached_folder("tiny")
    done.rename(done.with_name(f".{done.name}.partial"))
    cached_folder("tiny")
    assert left() == [done.name]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    fake_wheel(tmp_path, monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BadInput, match="cache folder cannot be written"):
        cached_folder("tiny")


def test_gguf_files_that_are_not(tmp_path):
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\x01" * 30)
    with pytest.raises(BadInput, match="not a GGUF file"):
        cached_folder(str(tmp_path / "text.gguf"))
    with pytest.raises(BadInput, match="cannot be read"):
        cached_folder(str(tmp_path / "cut.gguf"))
    assert left() == []


def test_a_gguf_file_is_converted_once(tmp_path, monkeypatch):
    source = tiny_llama(tmp_path / "source")
    calls = []

    def convert(gguf, folder, say):
        calls.append(gguf)
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(hub, "_convert", convert)
    gguf, moved = tmp_path / "a.gguf", tmp_path / "b.gguf"
    gguf.write_bytes(b"GGUF, in truth not")
    first = cached_folder(str(gguf))
    gguf.rename(moved)
    assert cached_folder(str(moved)) == first == cached_folder(str(moved)) and len(calls) == 1


def test_a_conversion_tells_how_far_it_is(tmp_path, monkeypatch):
    def convert(work, *arguments, on_line):
        for done in (0, 10, 26, 30, 49, 51, 80, 99, 100):
            on_line(f"Converting and de-quantizing GGUF tensors...: {done:3}%|##   | 1/9 [00:01<00:02, 4.1it/s]\n")
        on_line("Writing model shards:  50%|##  | 1/2 [00:01<00:02, 4.1it/s]\n")

    monkeypatch.setattr(hub, "subprocess_call", convert)
    said: list[str] = []
    hub._convert(tmp_path / "a.gguf", tmp_path, said.append)
    assert said[1:] == [f"converting a.gguf: {done} %" for done in (25, 50, 75)]


@pytest.mark.real
def test_smollm2_from_its_wheel(users_cache):
    model, tokenizer = load_model("smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()).strip() == "Paris"
    assert model.dtype == torch.bfloat16


@pytest.mark.real
def test_minilm_from_its_wheel(users_cache):
    model, tokenizer = load_model("minilm-l6", task="classification", labels=2)
    assert model(**tokenizer("a good film", return_tensors="pt")).logits.shape == (1, 2)
