"""GGUF files: read back by transformers they are the model and the tokenizer that were written."""

from __future__ import annotations

import json
import shutil

import numpy
import pytest
import torch
import transformers
from tokenizers import normalizers, pre_tokenizers

from helpers_gguf import FAMILIES, PROBES, bpe_on_bytes, make, pieces
from trimtab.artifacts.adapter import Base
from trimtab.errors import BadInput
from trimtab.inference.export_gguf import modelfile, outtype_of, write_model
from trimtab.model.gguf_file import TYPES, Entry, write_file
from trimtab.model.gguf_shape import Shape
from trimtab.model.gguf_vocab import Vocabulary
from trimtab.model.reply import ReplyForm

gguf = pytest.importorskip("gguf")
BASE = Base("tiny", "", "causal-lm")


def write(folder, family, outtype="f32", **changed):
    model, tokenizer = make(family, **changed)
    return model, tokenizer, write_model(folder, "tiny", outtype, model, tokenizer, [], BASE)


def read(path, kind=transformers.AutoModelForCausalLM, **more):
    return kind.from_pretrained(path.parent, gguf_file=path.name, **more)


def keys(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_model_and_its_tokenizer(family, tmp_path):
    model, tokenizer, path = write(tmp_path, family)
    unread = "biased" in family or "gemma" in family  # transformers reads no biases, caps and scales of queries
    again = read(path, **({"config": model.config} if unread else {})).eval()
    ids = torch.randint(4, len(tokenizer), (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        apart = (again(ids).logits - model(ids).logits).abs().max()
    assert apart <= (1e-4 if "gemma" in family else 0)  # Gemma's norms are written plus one
    other = read(path, transformers.AutoTokenizer)
    for text in PROBES:
        assert other(text)["input_ids"] == tokenizer(text)["input_ids"], text
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(other, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")
    assert other.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("outtype", TYPES)
def test_each_type_reads_back_as_its_quantiser_writes(outtype, tmp_path):
    model, _, path = write(tmp_path, "qwen2", outtype)
    found, wanted = keys(path)[1], model.state_dict()
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    types = {name: tensor.tensor_type for name, tensor in found.items()}
    assert types["blk.1.ffn_up.weight"] == kind and types["blk.0.attn_q.bias"] == types["output_norm.weight"] == 0
    assert types["token_embd.weight"] == (gguf.GGMLQuantizationType.Q8_0 if outtype[:2] in ("q4", "q5") else kind)
    up = wanted["model.layers.1.mlp.up_proj.weight"].numpy()
    alone = gguf.dequantize(gguf.quantize(up, kind), kind)
    read_back = gguf.dequantize(found["blk.1.ffn_up.weight"].data, kind)
    assert numpy.array_equal(read_back, alone)
    assert numpy.abs(read_back - up).max() <= {"f": 1e-3, "b": 4e-3, "q": 0.1}[outtype[0]] * numpy.abs(up).max()
    assert keys(path)[0]["general.file_type"] == gguf.LlamaFileType[
        "ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"
    ]  # fmt: skip


def test_rows_that_no_block_divides_are_f16(tmp_path):
    _, _, path = write(tmp_path, "llama", "q8_0", intermediate_size=80)
    types = {name: tensor.tensor_type.name for name, tensor in keys(path)[1].items()}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"


def test_keys_of_the_architecture(tmp_path):
    found, tensors = keys(write(tmp_path, "gemma3", sliding_window=24)[2])
    assert found["general.architecture"] == "gemma3" and found["gemma3.attention.sliding_window"] == 24
    assert found["gemma3.rope.freq_base"] == 1e6 and found["gemma3.rope.freq_base_swa"] == 1e4
    assert found["gemma3.attention.key_length"] == found["gemma3.attention.value_length"] == 32
    assert "output.weight" not in tensors and "blk.5.post_ffw_norm.weight" in tensors
    found, _ = keys(write(tmp_path, "gemma2")[2])
    assert found["gemma2.attn_logit_softcapping"] == 30 and found["gemma2.final_logit_softcapping"] == 20
    found, tensors = keys(write(tmp_path, "mistral", sliding_window=100)[2])
    assert found["llama.context_length"] == 100 and found["tokenizer.ggml.model"] == "llama"  # one window
    assert "output.weight" in tensors and found["tokenizer.ggml.add_bos_token"] and found["llama.rope.freq_base"] == 1e6
    assert found["tokenizer.ggml.tokens"][-1].startswith("[PAD") and found["tokenizer.ggml.token_type"][-1] == 5


def test_frequencies_of_llama_3(tmp_path):
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    model, _, path = write(tmp_path, "llama", rope_parameters=scaling)
    plain = 1 / 5e5 ** (torch.arange(0, 16, 2) / 16)
    factors = torch.from_numpy(keys(path)[1]["rope_freqs.weight"].data.copy())
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq) and factors.max() > 7.9
    for kind, more in (("linear", {}), ("yarn", {"original_max_position_embeddings": 64})):
        found, tensors = keys(write(tmp_path, "qwen2", rope_parameters={"rope_type": kind, "rope_theta": 1e4,
                                                                        "factor": 4.0, **more})[2])  # fmt: skip
        assert found["qwen2.rope.scaling.type"] == kind and found["qwen2.rope.scaling.factor"] == 4
        assert "rope_freqs.weight" not in tensors


@pytest.mark.parametrize("family, changed, said", [
    ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling"),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 8}}, "rope"),
    ("gemma2", {"query_pre_attn_scalar": 17}, "query_pre_attn_scalar is 17"),
    ("gemma2", {"layer_types": ["full_attention"] * 2}, "every 2th layer"),
    ("gemma2", {"tie_word_embeddings": False}, "head is not its embeddings"),
    ("qwen3", {"attention_bias": True}, "o_proj.bias"),
])  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, changed, said, tmp_path):
    with pytest.raises(BadInput, match=said):
        write(tmp_path, family, **changed)
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size]


def test_other_architectures_are_refused():
    with pytest.raises(BadInput, match="its architecture is gpt2.*convert_hf_to_gguf"):
        Shape(transformers.GPT2Config())


def _spoiled(kind):
    tokenizer = pieces() if kind in ("merges", "bytes") else bpe_on_bytes()
    inner = tokenizer.backend_tokenizer
    if kind == "split":
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    elif kind == "lower":
        inner.normalizer = normalizers.Lowercase()
    else:
        form = json.loads(inner.to_str())
        if kind == "merges":
            at = next(i for i, (a, b) in enumerate(form["model"]["merges"]) if len(a + b) > 2)
            del form["model"]["merges"][at]
        else:
            form["model"]["vocab"] = {
                token if token != "<0x41>" else "<0y41>": index for token, index in form["model"]["vocab"].items()
            }
        tokenizer._tokenizer = type(inner).from_str(json.dumps(form))
    return tokenizer


@pytest.mark.parametrize("kind, said", [("split", "splits text"), ("lower", "normalises text"),
                                        ("merges", "not SentencePiece's"), ("bytes", "256 bytes")])  # fmt: skip
def test_tokenizers_whose_ids_would_differ_are_refused(kind, said):
    tokenizer = _spoiled(kind)
    with pytest.raises(BadInput, match=said):
        vocabulary = Vocabulary(tokenizer, len(tokenizer))
        vocabulary.scores()


def test_names_of_splits():
    three = bpe_on_bytes
    from helpers_gguf import DIGITS, QWEN, split

    wide = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    named = {"gpt-2": three(), "smollm": three(DIGITS), "qwen2": three(split(QWEN)),
             "llama-bpe": three(split(wide), True), "smaug-bpe": three(split(wide))}  # fmt: skip
    assert {name: Vocabulary(tokenizer, 400).pre for name, tokenizer in named.items()} == {name: name for name in named}
    with pytest.raises(BadInput, match="more tokens than the model has embeddings"):
        Vocabulary(three(), 200)


def test_values_out_of_range_and_full_disks(tmp_path, monkeypatch):
    def entry(values):
        return [Entry("token_embd.weight", tuple(values.shape), lambda: values)]

    def new():
        return gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")

    with pytest.raises(BadInput, match="beyond its range.*bf16"):
        write_file(tmp_path / "a.gguf", new(), entry(torch.full((2, 32), 7e4)), "f16")
    with pytest.raises(BadInput, match="NaN or infinity"):
        write_file(tmp_path / "a.gguf", new(), entry(torch.full((2, 32), torch.nan)), "q8_0")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(BadInput, match="GiB are free"):
        write_file(tmp_path / "a.gguf", new(), entry(torch.ones(2, 32)), "f32")


def test_types_by_name():
    assert (
        outtype_of("gguf", "") == "f16"
        and outtype_of("gguf-lora", "") == "f32"
        and outtype_of("gguf", "Q8_0") == "q8_0"
    )
    for to, given, said in (("gguf", "q4_k", "q4_0"), ("gguf-lora", "q8_0", "none of"), ("merged", "f16", "only GGUF")):
        with pytest.raises(BadInput, match=said):
            outtype_of(to, given)


def test_a_modelfile_formats_as_the_template():
    tokenizer = bpe_on_bytes()
    said = modelfile("a.gguf", tokenizer, [2], ReplyForm(chat=True, stop=["END"]))
    assert said.startswith("FROM ./a.gguf\nTEMPLATE") and 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "END"' in said
    assert '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ end }}' in said
    assert said.count("{{ end }}{{ end }}<|im_start|>assistant\n") == 1 and "SYSTEM" not in said
    usual = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    tokenizer.chat_template = usual + tokenizer.chat_template
    assert 'SYSTEM """Be kind"""' in modelfile("a.gguf", tokenizer, [2], ReplyForm(chat=True))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    assert 'TEMPLATE "' not in modelfile("a.gguf", tokenizer, [2], ReplyForm(chat=True))
    assert '{{ .Prompt }}\n"""' in modelfile("a.gguf", tokenizer, [2], ReplyForm(chat=False, after="\n"))
