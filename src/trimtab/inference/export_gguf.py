"""`export --to gguf` and `--to gguf-lora`: one file for llama.cpp and what is built on it (Ollama, LM Studio).

`gguf`: the merged model. `gguf-lora`: the adapter alone, for llama.cpp's `--lora` beside a GGUF file of the base. A
merged weight exists only while it is written, so that the base may stay mapped from its file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..model import anatomy, quant
from ..model.gguf_file import TYPES, Entry, checked_type, write_file
from ..model.gguf_shape import Shape
from ..model.gguf_vocab import Vocabulary
from ..model.reply import ReplyForm, stop_ids, through_template
from ..model.surgery import is_patch

if TYPE_CHECKING:
    from ..artifacts.adapter import Base
    from ..contracts import Surgery

LORA_TYPES = ("f32", "f16", "bf16")
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")  # peft's inits that do not change the base's weights


def outtype_of(to: str, outtype: str) -> str:
    """The type of the tensors for an export `to`; "" is f16 for a model and f32 for an adapter."""
    if not to.startswith("gguf"):
        if outtype:
            raise BadInput(f"export to {to} with --outtype {outtype}", "only GGUF files have one", "Leave it out")
        return ""
    types = TYPES if to == "gguf" else LORA_TYPES
    return checked_type(outtype or ("f16" if to == "gguf" else "f32"), types)


def write_model(
    folder: Path, name: str, outtype: str, model: Any, tokenizer: Any, surgeries: list[Surgery], base: Base
) -> Path:
    """Write the merged model as `NAME-TYPE.gguf` into `folder`; -> the file."""
    if base.task != "causal-lm":
        raise BadInput("export to gguf", "the run is a classifier", "Use --to merged")
    shape = Shape(model.config)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is table.weight
    if shape.family.tied and not tied:
        have = f"its head is not its embeddings, and llama.cpp's {shape.family.arch} has no head of its own"
        raise BadInput("export to gguf", have, "Use --to merged")
    for surgery in reversed(surgeries):
        if not surgery.merges_apart:
            surgery.merge()
    vocabulary = Vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    apart = [surgery for surgery in surgeries if surgery.merges_apart]
    entries = [*_entries(model, shape, apart, tied)]
    entries += [Entry(key, tuple(value.shape), lambda value=value: value) for key, value in shape.extra().items()]
    path = folder / f"{_file_name(name)}-{outtype.upper()}.gguf"
    writer = _writer(path, shape.family.arch, name)
    writer.add_type("model")
    shape.describe(writer)
    vocabulary.describe(writer, stop_ids(model, tokenizer, base.reply))
    write_file(path, writer, entries, outtype)
    return path


def write_adapter(folder: Path, name: str, outtype: str, model: Any, surgeries: list[Surgery]) -> Path:
    """Write the adapter as `NAME-lora-TYPE.gguf` into `folder`; -> the file. llama.cpp computes x A^T B^T alpha / r."""
    asked = "export to gguf-lora"
    surgeries = [surgery for surgery in surgeries if not surgery.keeps_outputs] or surgeries
    if len(surgeries) != 1:
        names = ", ".join(type(surgery.patch).__name__ for surgery in surgeries)
        raise BadInput(asked, f"the adapter has several parts ({names})", "Export it as gguf")
    portable, shape = surgeries[0].portable(), Shape(model.config, asked)
    config, names, do = portable.config, shape.names(), "Export it as gguf"
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise BadInput(asked, f"it is no LoRA but {config.peft_type}", do)
    if config.use_dora:
        raise BadInput(asked, "it has a magnitude for each row (DoRA), which llama.cpp's adapters have not", do)
    if config.init_lora_weights not in KEEPS_BASE:
        have = f"its init ({config.init_lora_weights}) changed the base's weights, and the base's file has its own"
        raise BadInput(asked, have, do)
    alpha, entries = float(config.lora_alpha), []
    for key in sorted(portable.tensors):
        path, a_or_b = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        if a_or_b not in ("lora_A", "lora_B") or path.startswith("lm_head") or "embed" in path:
            raise BadInput(asked, f"llama.cpp's adapters have no tensor for {key}", do)
        values, order = portable.tensors[key], None
        if a_or_b == "lora_B":
            order = shape.order(path, values.shape[0])
            if config.use_rslora:  # alpha / sqrt(r) = sqrt(r) alpha / r
                values = values * values.shape[1] ** 0.5
        stem = names.of(path, "weight")
        entries.append(Entry(f"{stem}.{a_or_b.lower()}", tuple(values.shape), lambda v=values: v, order))
    file = folder / f"{_file_name(name)}-lora-{outtype.upper()}.gguf"
    writer = _writer(file, shape.family.arch, name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    write_file(file, writer, entries, outtype)
    return file


def how_to_run(form: str, file: str) -> str:
    """The part of README.md on running `file`."""
    if form == "gguf-lora":
        text = "Run it with llama.cpp, beside a GGUF file of the base:\n\n"
        return f"{text}```bash\nllama-cli -m BASE.gguf --lora {file}\nllama-server -m BASE.gguf --lora {file}\n```\n"
    text = f"Run it with llama.cpp:\n\n```bash\nllama-cli -m {file}\nllama-server -m {file}\n```\n"
    return (
        f"{text}\nOr with Ollama, in this folder:\n\n```bash\nollama create NAME -f Modelfile\nollama run NAME\n```\n"
    )


def modelfile(file: str, tokenizer: Any, stops: list[int], reply: ReplyForm) -> str:
    """Ollama's description of the model: how prompts are formatted, and what ends a reply.

    Ollama has templates of its own kind. That of a chat template is written if a conversation shows that the template
    puts a fixed text before and after each turn.
    """
    lines = [f"FROM ./{file}"]
    if reply.chat is False:
        lines += [f'TEMPLATE """{{{{ .Prompt }}}}{reply.after}"""']
    elif found := _turns(tokenizer):
        lines += [f'{key} """{text}"""' for key, text in zip(("TEMPLATE", "SYSTEM"), found, strict=False) if text]
    else:
        lines += ["# Ollama reads the chat template in the GGUF file if it knows it. If not, add a TEMPLATE."]
    texts = [*tokenizer.convert_ids_to_tokens(stops), *reply.stop] if reply.chat is not False else reply.stop
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in dict.fromkeys(texts)]
    return "\n".join(lines) + "\n"


def _turns(tokenizer: Any) -> tuple[str, str] | None:
    """-> (the chat template in Ollama's language, the system message that it adds to a conversation without one); None
    if it does more than put fixed texts around each turn."""
    system, first, reply, second = ("Be brief.", "Who was it?", "Ada it was.", "And when?")
    turns = [("system", system), ("user", first), ("assistant", reply), ("user", second)]
    render = lambda some, ask: through_template(  # noqa: E731
        tokenizer, [{"role": role, "content": text} for role, text in some], tokenize=False, add_generation_prompt=ask
    )
    around: dict[str, tuple[str, str]] = {}
    try:
        whole, bare, start = render(turns, True), render(turns[1:], True), ""
        for count, (role, text) in enumerate(turns[:3], 1):
            until = render(turns[:count], False)
            before, _, after = until.removeprefix(start).partition(text)
            around[role], start = (before, after), until
        rest = whole.removeprefix(render(turns, False))
    except Exception:  # a template may raise anything, as for a role that it does not know
        return None
    made = lambda some: "".join(around[role][0] + text + around[role][1] for role, text in some) + rest  # noqa: E731
    odd = any(mark in text for pair in (*around.values(), (rest,)) for text in pair for mark in ('"""', "{{"))
    usual = ""
    if made(turns[1:]) != bare and around["system"][1]:
        usual = bare.removeprefix(around["system"][0]).partition(around["system"][1])[0]
    if made(turns) != whole or made([("system", usual)] * bool(usual) + turns[1:]) != bare or odd or '"""' in usual:
        return None
    parts = [
        f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
        for role, (before, after) in around.items()
    ]
    return "{{ range .Messages }}" + "".join(parts) + "{{ end }}" + rest, usual


def _entries(model: nn.Module, shape: Shape, surgeries: list[Surgery], tied: bool) -> list[Entry]:
    """The tensors of a model as llama.cpp names them; those of patched linears are merged when they are read."""
    names, found, patched = shape.names(), [], []
    for path, module in model.named_modules():
        if path.startswith(tuple(f"{outer}." for outer in patched)) or "vision" in path or "multi_modal" in path:
            continue
        if path.endswith("lm_head") and tied:
            continue
        linear = is_patch(module) or anatomy.is_linear(module)
        if is_patch(module):
            patched.append(path)
        own = {"weight", "bias"} if linear else {key for key, value in module._parameters.items() if value is not None}
        for kind in sorted(own, reverse=True):
            if kind == "bias" and (bias := getattr(module, "bias", None)) is None:
                continue
            if kind == "weight" and linear:
                size: tuple[int, ...] = (module.out_features, module.in_features)  # type: ignore[assignment]
                values = lambda path=path, module=module: _weight(path, module, model, surgeries)  # noqa: E731
            else:
                held = bias if kind == "bias" else getattr(module, kind)
                size, values = tuple(held.shape), lambda held=held: held
            order = shape.order(path, size[0]) if linear else None
            shift = shape.shift(path) if kind == "weight" else 0.0
            found.append(Entry(names.of(path, kind), size, values, order, shift))
    return found


def _weight(path: str, module: nn.Module, model: Any, surgeries: list[Surgery]) -> Tensor:
    """The weight (out, in) of a linear with its patch merged."""
    with torch.no_grad():
        for surgery in surgeries:
            if (merged := surgery.merged_weight(path)) is not None:
                return merged
        if is_patch(module):
            raise AssertionError(f"no patch merges {path}")
        return quant.dense_weight(module, model.dtype)


def _writer(path: Path, arch: str, name: str) -> Any:
    import gguf

    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name(name)
    return writer


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
