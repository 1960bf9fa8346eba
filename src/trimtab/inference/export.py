"""`trimtab export RECIPE.yaml --to peft | merged | gguf | gguf-lora`: the result in a format that needs no trimtab.

`peft`: an adapter folder that stock `peft` loads (PaCA becomes a LoRA with a one-hot A). `merged`: a plain model folder
for transformers or vLLM; a 4/8-bit base is dequantised, so that its outputs equal those of the run. `gguf` and
`gguf-lora`: one file for llama.cpp or Ollama, of the merged model or of the adapter (export_gguf.py).
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, methods
from ..artifacts.folder_lock import locked
from ..artifacts.run_folder import lock_run
from ..errors import BadInput, nearest
from ..files import beside, whole_folder, writing
from ..foreign import admit_quantised
from ..model.hub import SHORT_NAMES, cached_folder, ordinary_modes
from ..model.reply import stop_ids
from ..quiet import silence_libraries
from ..recipe import Recipe
from ..validation import read_json

if TYPE_CHECKING:
    from ..artifacts.adapter import Base

FORMS = ("peft", "merged", "gguf", "gguf-lora")
MARK = "trimtab_export.json"  # in an exported folder: its format and its files


@silence_libraries()
def export(recipe: Recipe, to: str, out: str | Path | None = None, adapter: str | Path | None = None,
           overwrite: bool = False, outtype: str = "") -> Path:  # fmt: skip
    """Writes the run's adapter as `to` into `out` (default: `<output>/<to>`); -> the folder. `outtype`: GGUF's."""
    if to not in FORMS:
        raise BadInput(f"export to {to}", "there is no such form", nearest(to, FORMS))
    from .export_gguf import outtype_of
    from .load_run import load_run

    outtype = outtype_of(to, outtype)
    out = Path(out) if out else Path(recipe.output) / to
    with contextlib.ExitStack() as locks:
        if os.access(recipe.output, os.W_OK):  # a read-only run can be exported elsewhere
            locks.enter_context(lock_run(recipe.output, f"export {recipe.output}"))
        locks.enter_context(locked(beside(out, "lock"), f"export to {out}"))
        _replaceable(out, overwrite)
        run = load_run(recipe, adapter, generates=False)
        model, tokenizer, surgeries, base = run.model, run.tokenizer, run.surgeries, run.base
        if not surgeries:
            raise BadInput(f"export to {to}", "the recipe changes no weight of the model", "Use the model itself")
        with writing(f"write {out}", "Free some space, or name another folder"), whole_folder(out) as folder:
            if to.startswith("gguf"):
                _gguf(folder, to, outtype, recipe, model, tokenizer, surgeries, base)
            else:
                {"peft": _peft, "merged": _merged}[to](folder, recipe, model, tokenizer, surgeries, base)
            ordinary_modes(folder)
            mark = {"trimtab": __version__, "to": to, "recipe": recipe.hash, "files": sorted(_names(folder))}
            (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
    return out


def _replaceable(out: Path, overwrite: bool) -> None:
    """BadInput for a folder that exists, unless it is an earlier export and `overwrite` is set."""
    asked = f"export to {out}"
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()) or not (out.exists() or out.is_symlink()):
        return
    other = "Name another folder with --out"
    if not overwrite:
        raise BadInput(asked, "it exists already", f"Use --overwrite, or n{other[1:]}")
    if out.is_symlink() or not out.is_dir():
        raise BadInput(f"{asked} --overwrite", "it is not a folder", other)
    mark = read_json(out / MARK)
    if not mark or not isinstance(mark.get("files"), list):
        have = f"trimtab did not export it (it has no readable {MARK})"
        raise BadInput(f"{asked} --overwrite", have, f"{other}, or remove it yourself")
    if more := sorted({*_names(out)} - {MARK, *map(str, mark["files"])}):
        some = ", ".join(more[:3]) + (f" and {len(more) - 3} more" if len(more) > 3 else "")
        raise BadInput(f"{asked} --overwrite", f"it has files that no export wrote ({some})", f"Move them. {other}")


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]


def _peft(folder: Path, recipe: Recipe, model: Any, tokenizer: Any, surgeries: list, base: Base) -> None:
    from safetensors.torch import save_file

    from ..artifacts.adapter import short_targets
    from ..model.limits import vocabulary
    from ..model.stock_peft import require_loadable

    surgeries = [s for s in surgeries if not s.keeps_outputs] or surgeries
    if len(surgeries) != 1:
        names = ", ".join(type(s.patch).__name__ for s in surgeries)
        raise BadInput("export to peft", f"the adapter has several parts ({names})", "Export it as merged")
    portable = surgeries[0].portable()
    portable.config.base_model_name_or_path = loadable(recipe.model.name)
    portable.config.revision = recipe.model.revision
    portable.config.inference_mode = True
    portable.config.task_type = portable.config.task_type or "CAUSAL_LM"
    if isinstance(portable.config.target_modules, list | set):
        portable.config.target_modules = short_targets(model, portable.config.target_modules)
    require_loadable(model, portable.config, portable.tensors)
    portable.config.save_pretrained(folder)
    save_file(
        {k: t.contiguous() for k, t in portable.tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
    )
    if len(tokenizer) <= (vocabulary(model) or 0):  # else peft would resize the base to it
        tokenizer.save_pretrained(folder)  # with the run's chat template
    _card(folder, "peft", recipe, surgeries, base, model, tokenizer)


def loadable(name: str) -> str:
    """The name of a base for `from_pretrained`: a hub id, or the full path of its folder (of the converted folder for a
    GGUF file or a short name)."""
    path = Path(name).expanduser()
    if path.is_file() or name.lower() in SHORT_NAMES:
        return str(cached_folder(name))
    return str(path.resolve()) if path.is_dir() else name


def _merged(folder: Path, recipe: Recipe, model: Any, tokenizer: Any, surgeries: list, base: Base) -> None:
    from ..model.quant import dense_linear, is_quantised
    from ..model.surgery import Swaps

    for surgery in reversed(surgeries):
        surgery.merge()
    if getattr(model, "is_quantized", False):
        swaps = Swaps(model)
        for name, module in list(model.named_modules()):
            if hasattr(module, "weight") and is_quantised(module):
                swaps.replace(name, dense_linear(module, model.dtype))
        vars(model.config).pop("quantization_config", None)
        model.hf_quantizer, model.is_quantized = None, False
        admit_quantised(model, False)
    if base.task == "causal-lm":
        _reply_as_measured(model, tokenizer, base)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # a path of this machine
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _card(folder, "merged", recipe, surgeries, base, model, tokenizer)


def _gguf(folder: Path, to: str, outtype: str, recipe: Recipe, model: Any, tokenizer: Any, surgeries: list,
          base: Base) -> None:  # fmt: skip
    """One GGUF file, a Modelfile for Ollama, and the card."""
    from .export_gguf import modelfile, write_adapter, write_model

    name = Path(recipe.output).resolve().name
    if to == "gguf":
        file = write_model(folder, name, outtype, model, tokenizer, surgeries, base)
        text = modelfile(file.name, tokenizer, stop_ids(model, tokenizer, base.reply), base.reply)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    else:
        file = write_adapter(folder, name, outtype, model, surgeries)
    _card(folder, to, recipe, surgeries, base, model, tokenizer, file.name)


def _reply_as_measured(model: Any, tokenizer: Any, base: Base) -> None:
    """Makes greedy replies of the exported model equal to those that `eval` measured: writes the ends of a reply into
    each file, and removes settings that change greedy search. The base's sampling settings stay."""
    from transformers import GenerationConfig

    from ..model.sampling import SAMPLED, TOKENS

    own = model.generation_config.to_dict()
    kept = {key: own[key] for key in (*TOKENS, "do_sample", *SAMPLED) if own.get(key) is not None}
    ends = stop_ids(model, tokenizer, base.reply)
    kept["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    model.generation_config = GenerationConfig(**kept)
    model.config.get_text_config().eos_token_id = kept["eos_token_id"]


def _card(folder: Path, form: str, recipe: Recipe, surgeries: list, base: Base, model: Any, tokenizer: Any,
          file: str = "") -> None:  # fmt: skip
    """Writes README.md: how the folder was made, how to load it, and how to prompt the model. `file`: its GGUF file."""
    from ..artifacts.adapter import front_matter
    from .export_gguf import how_to_run

    name = recipe.model.name
    on_hub = "/" in name and loadable(name) == name and not Path(name).exists()
    title = name if on_hub else Path(name).name
    patches = " + ".join(methods.name_of(surgery.patch) for surgery in surgeries)
    library = "peft" if form == "peft" else "gguf" if file else "transformers"
    loader = "AutoPeftModelFor" if form == "peft" else "AutoModelFor"
    loader += "CausalLM" if base.task == "causal-lm" else "SequenceClassification"
    what = "the base with the trained adapter merged into it" if form in ("merged", "gguf") else "an adapter"
    text = front_matter(library, name if on_hub else "")
    text += f"\n# {patches} on {title}\n\nMade by trimtab {__version__}: {what}.\n"
    if file:
        text += f"\n{how_to_run(form, file)}"
    else:
        text += f'\n```python\nfrom {library} import {loader}\n\nmodel = {loader}.from_pretrained("FOLDER")\n```\n'
    if form == "peft" and not on_hub:
        text += "\n`base_model_name_or_path` in adapter_config.json is the base's folder on the machine where this was "
        text += "made. On another machine, change it to the base's folder there.\n"
    if base.task == "causal-lm":
        text += f"\n{_how_to_ask(base, model, tokenizer)}\n"
    if base.labels:
        text += f"\nClasses: {', '.join(base.labels)}.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _how_to_ask(base: Base, model: Any, tokenizer: Any) -> str:
    form = base.reply
    how = {
        None: "The format of its training rows is not known.",
        True: "It was trained on conversations: format prompts with the tokenizer's chat template.",
        False: "It was trained on plain text: use plain prompts" + ", each with a line end." * bool(form.after),
    }[form.chat].rstrip(".")
    tokens = tokenizer.convert_ids_to_tokens(stop_ids(model, tokenizer, form))
    ends = ", ".join(f"`{token}`" for token in [*tokens, *map(repr, form.stop)])
    longest = f" The longest answer in its training rows has {form.longest} tokens." if form.longest else ""
    return f"{how}. A reply ends at {ends}.{longest}"
