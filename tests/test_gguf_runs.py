"""Exports of whole runs as GGUF: every patch's merge, the adapter alone, memory, full disks, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from helpers_gguf import make_folder
from helpers_reply import SKY, learned
from trimtab.artifacts.adapter import Base
from trimtab.cli import main
from trimtab.contracts import Place
from trimtab.errors import BadInput
from trimtab.inference.export import MARK, export
from trimtab.inference.export_gguf import write_adapter, write_model
from trimtab.memory.meter import Meter
from trimtab.methods import find
from trimtab.model.load import load_model
from trimtab.model.spec import ModelSpec
from trimtab.process.call import subprocess_call

gguf = pytest.importorskip("gguf")
MERGED = {
    "lora": {"r": 4}, "paca": {"r": 4}, "edora": {"r": 4}, "senszoq": {"density": 0.05}, "full": {},
    "pruning": {"sparsity": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama in bf16, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny llama"
    path = make_folder(folder, "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return path


def patched(folder, name, precision="auto", **fields):
    """-> (model, tokenizer, [surgery with random values])."""
    model, tokenizer = load_model(ModelSpec(folder, precision=precision))
    surgery = find(name)(**fields).apply(model, Place(fast="cpu"))
    torch.manual_seed(3)
    with torch.no_grad():
        for key, tensor in surgery.own_tensors().items():
            if tensor.is_floating_point() and name != "full" and "magnitude" not in key:
                tensor.data.add_(0.05 * torch.randn_like(tensor))
            elif name == "full":
                tensor.data.mul_(1.5)
    return model.eval(), tokenizer, [surgery]


def tensors(path):
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name, precision", [*((name, "auto") for name in MERGED), ("lora", "nf4"), ("paca", "int8"),
                                             ("lora-dora", "auto"), ("lora-pissa", "fp32")])  # fmt: skip
def test_weights_are_those_that_merging_leaves(name, precision, folder, tmp_path):
    """Bit for bit, one at a time; the model is as before until then."""
    name, _, kind = name.partition("-")
    fields = {**MERGED[name], **({"dora": True} if kind == "dora" else {"init": "pissa"} if kind else {})}
    model, tokenizer, surgeries = patched(folder, name, precision, **fields)
    before = str(model), [tensor.clone() for tensor in surgeries[0].own_tensors().values()]
    path = write_model(tmp_path, "a b", "f32", model, tokenizer, surgeries, Base(folder, "", "causal-lm"))
    assert path.name == "a-b-F32.gguf"
    if surgeries[0].merges_apart:
        assert str(model) == before[0]
        assert all(map(torch.equal, surgeries[0].own_tensors().values(), before[1]))
        surgeries[0].merge()
    found, blocks = tensors(path), model.model.layers
    for index, block in enumerate(blocks):
        for linear, key in ((block.mlp.down_proj, "ffn_down"), (block.self_attn.v_proj, "attn_v")):
            assert torch.equal(found[f"blk.{index}.{key}.weight"], linear.weight.float()), key
    if precision in ("nf4", "int8"):
        return
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model.float()(ids).logits, atol=1e-4)


@pytest.mark.parametrize("name, fields", [
    ("lora", {"r": 4}), ("lora", {"r": 4, "rslora": True, "alpha": 3.0}), ("paca", {"r": 4}),
    ("lora", {"r": 2, "targets": "q_proj,down_proj"}),
])  # fmt: skip
def test_an_adapter_file_is_the_change_of_the_weights(name, fields, folder, tmp_path):
    """W + alpha / r B A in llama.cpp's order of rows, as its adapters are computed, is the merged weight."""
    model, tokenizer, surgeries = patched(folder, name, "fp32", **fields)
    path = write_adapter(tmp_path, "tiny", "f32", model, surgeries)
    base, _ = load_model(ModelSpec(folder, precision="fp32"))
    plain = tensors(write_model(tmp_path, "base", "f32", base, tokenizer, [], Base(folder, "", "causal-lm")))
    whole = tensors(write_model(tmp_path, "whole", "f32", model, tokenizer, surgeries, Base(folder, "", "causal-lm")))
    reader, changes = gguf.GGUFReader(path), tensors(path)
    key = lambda name: reader.fields[name].contents()  # noqa: E731
    assert key("general.type") == "adapter" and key("adapter.type") == "lora" and key("general.architecture") == "llama"
    stems = {change.rpartition(".")[0] for change in changes}
    assert len(stems) == (4 if "targets" in fields else 14)
    for stem in stems:
        a, b = changes[f"{stem}.lora_a"], changes[f"{stem}.lora_b"]
        made = plain[stem] + key("adapter.lora.alpha") / b.shape[1] * (b @ a)
        assert torch.allclose(made, whole[stem], atol=1e-5) and not torch.allclose(plain[stem], whole[stem], atol=1e-3)
    assert all(torch.equal(plain[name], whole[name]) for name in plain.keys() - stems)


@pytest.mark.parametrize("name, fields, said", [
    ("lora", {"dora": True}, "magnitude"), ("lora", {"init": "pissa"}, "init"), ("edora", {"r": 4}, "magnitude"),
    ("senszoq", {"density": 0.05}, "no LoRA but"), ("full", {}, "no adapter"), ("meft", {}, "no tuner of peft"),
])  # fmt: skip
def test_what_is_no_lora_is_refused(name, fields, said, folder, tmp_path):
    model, _, surgeries = patched(folder, name, **fields)
    with pytest.raises(BadInput, match=said):
        write_adapter(tmp_path, "tiny", "f32", model, surgeries)
    if name == "meft":
        with pytest.raises(BadInput, match="depends on its input"):
            write_model(tmp_path, "tiny", "f32", model, None, surgeries, Base(folder, "", "causal-lm"))
    with pytest.raises(BadInput, match="a classifier"):
        write_model(tmp_path, "tiny", "f32", model, None, surgeries, Base(folder, "", "classification"))
    assert not list(tmp_path.iterdir())


def test_a_run_through_the_command_line(folder, tmp_path, monkeypatch, capsys):
    """Trained, exported in both forms, and read; an earlier export stays unless --overwrite is said."""
    recipe = learned(tmp_path, folder, SKY, patches=[{"lora": {"r": 4}}], training={"max_steps": 3})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.to_dict()))

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["trimtab", "export", str(tmp_path / "r.yaml"), *arguments])
        try:
            main()
        except SystemExit as done:
            return done.code or 0
        return 0

    assert run("--to", "gguf", "--outtype", "q8_0") == 0
    out = tmp_path / "run" / "gguf"
    assert {path.name for path in out.iterdir()} == {"run-Q8_0.gguf", "Modelfile", "README.md", MARK}
    assert (out / "Modelfile").read_text().startswith("FROM ./run-Q8_0.gguf\nTEMPLATE")
    said = (out / "README.md").read_text()
    assert "llama-server -m run-Q8_0.gguf" in said and "ollama create" in said and "<|im_end|>" in said
    fields = gguf.GGUFReader(out / "run-Q8_0.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2 and "tokenizer.chat_template" in fields
    assert run("--to", "gguf") == 2 and "--overwrite" in capsys.readouterr().err
    assert run("--to", "gguf", "--overwrite") == 0 and (out / "run-F16.gguf").is_file()
    assert not (out / "run-Q8_0.gguf").exists()
    assert run("--to", "gguf-lora") == 0
    beside = tmp_path / "run" / "gguf-lora"
    assert (beside / "run-lora-F32.gguf").is_file() and "--lora run-lora-F32.gguf" in (beside / "README.md").read_text()
    assert not (beside / "Modelfile").exists()
    assert run("--to", "merged", "--outtype", "f16") == 2 and "only GGUF" in capsys.readouterr().err
    assert json.loads((beside / MARK).read_text())["to"] == "gguf-lora"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    """The writes fail as they do on a full disk, after the check of free space."""
    recipe = learned(tmp_path, folder, SKY, patches=[{"lora": {"r": 4}}], training={"max_steps": 1})
    there = {path.name for path in (tmp_path / "run").iterdir()}
    whole = gguf.GGUFWriter.open_output_file

    def full(writer, path=None):
        whole(writer, path)
        for file in writer.fout:
            file.close()
        writer.fout = [open("/dev/full", "wb")]

    monkeypatch.setattr(gguf.GGUFWriter, "open_output_file", full)
    for to in ("gguf", "gguf-lora"):
        with pytest.raises(BadInput, match="No space left") as raised:
            export(recipe, to)
        assert raised.value.exit_code == 2
    left = {path.name for path in (tmp_path / "run").iterdir()} - there
    assert not any("gguf" in name and "lock" not in name for name in left)


def grown(path, out, outtype) -> tuple[int, list[int]]:
    """Bytes by which writing a patched model into `out` grows the process, and the sizes of its linears."""
    model, tokenizer, surgeries = patched(path, "lora", r=4)
    sizes = [module.base_layer.weight.numel() for module in surgeries[0].layers.values()]
    write_model(Path(out), "warm", outtype, *patched(path, "lora", r=4), Base(path, "", "causal-lm"))
    meter = Meter(seconds=0.001).start()
    write_model(Path(out), "tiny", outtype, model, tokenizer, surgeries, Base(path, "", "causal-lm"))
    meter.stop()
    return meter.result()["fast_growth_bytes"], sizes


@pytest.mark.parametrize("outtype", ["f32", "q4_0"])
def test_memory_grows_by_one_tensor_at_most(outtype, tmp_path):
    """The merged weights, in all, would take more than four times the growth. In a process of its own, whose malloc
    returns large tensors when they are freed, as those that trimtab runs under do."""
    path = make_folder(tmp_path / "m", "llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=8)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.save_pretrained(path)
    growth, sizes = subprocess_call(grown, str(path), str(tmp_path), outtype, MALLOC_MMAP_THRESHOLD_="131072")
    largest, whole = (4 * weigh(sizes) for weigh in (max, sum))
    assert growth < largest + 2**25 < whole / 4


def test_several_patches_of_a_run(folder, tmp_path):
    """A pruned vocabulary and pruned weights under a LoRA: the file is the merged folder, logit for logit."""
    patches = ["embedding_pruning", {"pruning": {"targets": "up_proj"}}, {"lora": {"targets": "q_proj,v_proj"}}]
    recipe = learned(tmp_path, folder, SKY, patches=patches, training={"max_steps": 2})
    file = next(export(recipe, "gguf", outtype="f32").glob("*.gguf"))
    auto = transformers.AutoModelForCausalLM
    again = auto.from_pretrained(file.parent, gguf_file=file.name).eval()
    merged = auto.from_pretrained(export(recipe, "merged"), dtype=torch.float32).eval()
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        assert torch.equal(again(ids).logits, merged(ids).logits)
    assert (merged.model.layers[0].mlp.up_proj.weight == 0).any()
