"""Loads a model and its tokenizer from a hub id, a folder, a GGUF file or a short name, at the requested precision.

A base loaded at its file's own precision stays memory-mapped: transformers returns views of the safetensors file, and
the process's anonymous memory hardly grows. Any conversion (fp32 of a bf16 file, nf4, int8) allocates a copy.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import BadInput, TrimtabError, nearest
from ..memory.budget import gib
from ..memory.meter import drop_clean_mappings
from ..quiet import quiet
from . import anatomy
from .expert_files import FILES, ExpertFiles, whole, without_experts
from .experts import mixtures, taken_out
from .hub import Say, cached_folder, opened
from .quant import quantise_empty
from .spec import ModelSpec
from .vocabulary import TOKENIZER

__all__ = ["base_hash", "cached_folder", "empty_model", "load_model", "load_tokenizer"]

TASKS = {"causal-lm": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "nf4": torch.bfloat16,
          "int8": torch.bfloat16}  # fmt: skip
ESSENTIALS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "vocab_size", "num_local_experts", "tie_word_embeddings")  # fmt: skip
SAMPLES = 32  # values of each tensor in the hash


def load_model(
    spec: ModelSpec | str,
    *,
    task: str = "causal-lm",
    labels: int | None = None,
    names: Sequence[str] = (),
    device: torch.device | str | None = None,
    say: Say | None = None,
    experts: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """-> (model in eval mode, tokenizer with a pad token). Sets `model.trimtab_base` to its `base_hash`, and keeps the
    tokenizer on the model (vocabulary.TOKENIZER).

    `task`: "causal-lm" or "classification" (a sequence head of `labels` classes; 1 is regression). `names`: of the
    classes. `device`: None is the CPU. `experts`: False leaves the stacked experts of a mixture on `meta`, and puts
    their files on the model (expert_files.FILES), if each can be read alone. BadInput for a wrong name and for missing
    or damaged files.
    """
    spec = ModelSpec(spec) if isinstance(spec, str) else spec
    if task not in TASKS:
        raise BadInput(f'task: "{task}"', "there is no such task", nearest(task, TASKS))
    folder = cached_folder(spec.name, revision=spec.revision, code=spec.trust_remote_code, say=say)
    device = torch.device(device or "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"place: {device}", "this machine, or its PyTorch, has no such device", "Set place: cpu")
    config = _config(folder, spec, task, labels)
    tokenizer = load_tokenizer(folder, trust_remote_code=spec.trust_remote_code)
    model = _from_pretrained(folder, spec, task, config, {"dtype": "auto"}, experts)
    base = base_hash(model)  # of the file's values, before any conversion
    if spec.precision != "auto":
        options = _precision(spec.precision, device, heads=_outside_blocks(model))
        del model
        model = _from_pretrained(folder, spec, task, config, options, experts)
        _release_freed()
    if device.type != "cpu" and not getattr(model, "is_quantized", False):
        with contextlib.nullcontext() if experts else taken_out(model):
            model.to(device)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    for module in model.modules():
        # bitsandbytes would repack 4-bit weights into a layout that does not support training (model/freeze.py)
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    if names:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}
    model.trimtab_base = base
    setattr(model, TOKENIZER, tokenizer)
    for note in left_dense(model) if say is not None else ():
        say(note)
    return model, tokenizer


def empty_model(
    spec: ModelSpec, *, task: str, labels: int | None = None, blocks: int | None = None
) -> tuple[Any, bool]:
    """-> (the model on the `meta` device, whether loading it on a CPU would map its plain weights from the file).

    Needs config.json but no weights. `blocks`: builds only so many of its blocks.
    """
    folder = config_folder(spec)
    config = _config(folder, spec, task, labels)
    text = config.get_text_config()
    if blocks is not None:
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:blocks]
        text.num_hidden_layers = blocks
    if text.pad_token_id is None:
        text.pad_token_id = 0  # load_model takes the tokenizer's; shapes do not depend on it
    stored = _stored_dtype(folder)
    dtype = DTYPES.get(spec.precision) or getattr(config, "dtype", None) or stored or torch.float32
    try:
        with quiet(), torch.device("meta"):
            model = TASKS[task].from_config(config, dtype=dtype, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # a bad value in a config can raise anything
        raise _unreadable(folder, "its config.json", error) from None
    if spec.precision in ("nf4", "int8"):
        packing = _precision(spec.precision, torch.device("meta"), _outside_blocks(model))["quantization_config"]
        quantise_empty(model, packing, packing.llm_int8_skip_modules)
        model.is_quantized, model.is_loaded_in_4bit = True, packing.load_in_4bit
        model.is_loaded_in_8bit = packing.load_in_8bit
    return model.eval(), stored in (None, dtype)


def left_dense(model: PreTrainedModel) -> list[str]:
    """A note on weights that quantising left unchanged, if they are a large part of the model."""
    if not getattr(model, "is_quantized", False):
        return []
    inside, experts = anatomy.blocks(model)[0] + ".", anatomy.stacked_experts(model)
    matrices = {n: p for n, p in model.named_parameters() if n.startswith(inside) and p.dim() > 1}
    dense = {name: p for name, p in matrices.items() if p.is_floating_point()}
    size, whole = (sum(p.nbytes for p in found) for found in (dense.values(), model.parameters()))
    if size < 0.1 * whole:
        return []
    of_experts = sum(p.nbytes for name, p in dense.items() if name in experts)
    what = "experts" if of_experts > 0.9 * size else "weights of the blocks"
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(next(iter(dense.values())).dtype, "fp32")
    return [f"the {what} ({gib(size)} of {gib(whole)}) stay in {dtype}: bitsandbytes quantises plain linears only"]


def config_folder(spec: ModelSpec, say: Say | None = None) -> Path:
    """The folder of config.json; it need not have the weights."""
    here = Path(spec.name).expanduser()
    if (here / "config.json").is_file():
        return here
    return cached_folder(spec.name, revision=spec.revision, code=spec.trust_remote_code, say=say)


def assembled(model: PreTrainedModel, spec: ModelSpec) -> list[torch.nn.Parameter]:
    """The parameters that loading assembles from several tensors of the file (mostly stacked experts): they are copies,
    not mapped."""
    from transformers.conversion_mapping import WeightConverter, get_model_conversion_mapping

    made = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    targets = [re.compile(".*".join(map(re.escape, p.split("*")))) for c in made for p in c.target_patterns]
    if not targets:
        return []
    there: set[str] = set()
    for file in config_folder(spec).glob("*.safetensors"):
        with opened(file) as tensors:
            there.update(tensors.keys())
    return [
        parameter for name, parameter in model.named_parameters()
        if name not in there and any(target.search(name) for target in targets)
    ]  # fmt: skip


def weights_at_hand(spec: ModelSpec) -> bool:
    return any(config_folder(spec).glob("*.safetensors"))


def has_tokenizer(spec: ModelSpec) -> bool:
    """Whether a model folder has the files of a tokenizer; True for a name that is not a folder."""
    folder = Path(spec.name).expanduser()
    return not folder.is_dir() or any(folder.glob("tokenizer*"))


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of the floating-point tensors in a model's first file; None if there is no file."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    for file in sorted(folder.glob("*.safetensors")):
        with opened(file) as tensors:
            kinds = (names.get(tensors.get_slice(key).get_dtype()) for key in tensors.keys())
            return next((kind for kind in kinds if kind is not None), None)
    return None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; without a pad token, it pads with the eos token."""
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # tokenizers raises bare Exception
        raise _unreadable(folder, "its tokenizer", error) from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BadInput(
                f"model: {folder}", "its tokenizer has neither a pad nor an eos token", "Set one and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_hash(source: PreTrainedModel | str | Path) -> str:
    """-> 32 hex digits that identify a base, so that an adapter of another base can be refused.

    Covers the essential config values and a sample of the embeddings and of every tensor in the blocks, in bf16, so
    that bf16 and fp32 loads of one file agree. Heads are left out: a causal LM and a classifier on one base agree.
    Quantised values do not agree; so `load_model` computes the hash before it quantises and stores it on the model, as
    `trimtab_base`. Call this on a model before any patch writes into it.
    """
    if isinstance(source, (str, Path)):
        folder = cached_folder(str(source))
        spec = ModelSpec(str(folder))
        source = _from_pretrained(folder, spec, "base", _config(folder, spec, "base", None), {"dtype": "auto"})
    known = getattr(source, "trimtab_base", None)
    if known:
        return known
    if getattr(source, "is_quantized", False) and Path(source.name_or_path).is_dir():
        if "quantization_config" not in json.loads((Path(source.name_or_path) / "config.json").read_text()):
            return base_hash(source.name_or_path)
    config = source.config.get_text_config()
    digest = hashlib.sha256(repr([(key, getattr(config, key, None)) for key in ESSENTIALS]).encode())
    path, stack = anatomy.blocks(source)
    files = getattr(source, FILES, None)
    tensors = [("embeddings", source.get_input_embeddings().weight), *sorted(stack.named_parameters())]
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(_sample(tensor.detach(), files, f"{path}.{name}"))
    return digest.hexdigest()[:32]


def _sample(tensor: torch.Tensor, files: ExpertFiles | None, name: str) -> bytes:
    """SAMPLES values spread evenly over a tensor, as bf16 bytes (integers are not converted). A tensor on `meta` is
    `name` in `files`."""
    at = range(0, tensor.numel(), max(1, tensor.numel() // SAMPLES))[:SAMPLES]
    if tensor.is_meta and files is not None:
        values = files.values(name, at)
    else:
        values = tensor.reshape(-1)[at.start : at.stop : at.step].cpu()
    if values.is_floating_point():
        values = values.to(torch.bfloat16).view(torch.int16)
    return values.contiguous().numpy().tobytes()


def _release_freed() -> None:
    """Returns freed memory to the system: glibc keeps 15 to 560 MiB that quantising SmolLM2-135M freed.

    Also drops the mapped pages of the converted file; weights still mapped (embeddings) are read again when used.
    """
    drop_clean_mappings()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def _outside_blocks(model: PreTrainedModel) -> list[str]:
    """Paths of the linears that are never quantised: language-model head, classifier, pooler."""
    inside = anatomy.blocks(model)[0] + "."
    return [n for n, m in model.named_modules() if anatomy.is_linear(m) and not n.startswith(inside)]


def _precision(precision: str, device: torch.device, heads: list[str]) -> dict[str, Any]:
    """The arguments of from_pretrained for `precision`; `heads` stay unquantised."""
    options: dict[str, Any] = {"dtype": DTYPES[precision]}
    if precision == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=heads,  # also applies to 4 bits
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif precision == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    if "quantization_config" in options and device.type != "cpu":
        options["device_map"] = {"": device}
    return options


def _config(folder: Path, spec: ModelSpec, task: str, labels: int | None) -> Any:
    extra = {"num_labels": labels} if task == "classification" and labels else {}
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=spec.trust_remote_code, **extra
            )
    except Exception as error:  # a bad value in a config can raise anything
        raise _unreadable(folder, "its config.json", error) from None
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(
            f"model: {spec.name}", "it is an encoder-decoder", "Use a decoder-only model or a BERT-type encoder"
        )
    classes = config.architectures or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise _unreadable(folder, "its config.json", TypeError("architectures is no list of names"))
    heads = [name for name in classes if name.endswith(("CausalLM", "LMHeadModel", "Generation"))]
    if task == "causal-lm" and classes and not heads:
        raise BadInput(
            f"model: {spec.name} as a causal language model",
            f"its weights are of {', '.join(classes)}, which has no such head",
            "Use a decoder-only model, or train a classifier on this one",
        )
    if task == "classification" and getattr(config, "quantization_config", None) is None:
        config.problem_type = "regression" if labels == 1 else config.problem_type
    return config


def _from_pretrained(
    folder: Path, spec: ModelSpec, task: str, config: Any, options: dict[str, Any], experts: bool = True
) -> PreTrainedModel:
    auto = TASKS.get(task, AutoModel)
    kind = None if experts else _kind_without(auto, config, folder, spec)
    try:
        with quiet():
            model, report = (auto if kind is None else without_experts(kind)).from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=spec.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # checked below; a classifier's head may differ
                **options,
            )
    except (MemoryError, torch.OutOfMemoryError, TrimtabError):
        raise
    except Exception as error:
        raise _unreadable(folder, "its weights", error) from None
    bad = {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]} | set(report["missing_keys"])
    inside = anatomy.blocks(model)[0] + "."
    if task != "causal-lm":  # a new head or a pooler is expected to be missing
        bad = {name for name in bad if name.startswith(inside) or "embed" in name}
    if bad:
        raise BadInput(
            f"model: {folder}",
            f"{len(bad)} tensors are missing or do not have the shape that config.json says ({sorted(bad)[0]})",
            "Fetch the model again",
        )
    if kind is not None:
        model = whole(model, kind)
        setattr(model, FILES, ExpertFiles(model, folder))
    return model


def _kind_without(auto: Any, config: Any, folder: Path, spec: ModelSpec) -> Any:
    """The model's class, if it is a mixture whose experts can be read from the files one at a time; else None."""
    with quiet(), torch.device("meta"):
        empty = auto.from_config(copy.deepcopy(config), trust_remote_code=spec.trust_remote_code)
    packed = getattr(config, "quantization_config", None) is not None
    return type(empty) if mixtures(empty) and not packed and ExpertFiles(empty, folder).complete else None


def _unreadable(folder: Path, part: str, error: Exception) -> BadInput:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return BadInput(
        f"model: {folder}", f"{part} cannot be read ({type(error).__name__}: {reason})", "Fetch the model again"
    )
