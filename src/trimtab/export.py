"""`trimtab export RECIPE.yaml --to peft | merged`: the result in a form that needs no trimtab.

`peft`: an adapter folder that stock `peft` loads (PaCA becomes a LoRA with a one-hot A). `merged`: a plain folder for
transformers, vLLM or llama.cpp; a 4/8-bit base is written de-quantised, so that its outputs stay those of the run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import BadInput, nearest
from .model.quiet import hushed
from .recipe import Recipe

FORMS = ("peft", "merged")


@hushed()
def export(recipe: Recipe, to: str, out: str | Path | None = None, adapter: str | Path | None = None,
           overwrite: bool = False) -> Path:  # fmt: skip
    """Write the run's adapter as `to` into `out` (default: beside it, `<output>/peft` or `<output>/merged`)."""
    if to not in FORMS:
        raise BadInput(f"export to {to}", "there is no such form", nearest(to, FORMS))
    from .runs import load_run

    out = Path(out) if out else Path(recipe.output) / to
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]) and not overwrite:
        raise BadInput(f"export to {out}", "it is there already", "Say --overwrite, or name another folder with --out")
    model, tokenizer, surgeries, base = load_run(recipe, adapter)
    write = {"peft": _peft, "merged": _merged}[to]
    _whole(out, lambda folder: write(folder, model, tokenizer, surgeries, base))
    return out


def _peft(folder: Path, model: Any, tokenizer: Any, surgeries: list, base: Any) -> None:
    from safetensors.torch import save_file

    if len(surgeries) != 1:
        names = ", ".join(type(s.patch).__name__ for s in surgeries)
        raise BadInput("export to peft", f"the adapter has several parts ({names})", "Export it as merged")
    portable = surgeries[0].portable()
    portable.config.base_model_name_or_path = base.name
    portable.config.inference_mode = True
    portable.config.task_type = portable.config.task_type or "CAUSAL_LM"
    portable.config.save_pretrained(folder)
    save_file(
        {k: t.contiguous() for k, t in portable.tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
    )


def _merged(folder: Path, model: Any, tokenizer: Any, surgeries: list, base: Any) -> None:
    from .model.quant import dense_linear, is_quantised
    from .model.surgery import Swaps

    for surgery in reversed(surgeries):
        surgery.merge()
    if getattr(model, "is_quantized", False):
        swaps = Swaps(model)
        for name, module in list(model.named_modules()):
            if hasattr(module, "weight") and is_quantised(module):
                swaps.replace(name, dense_linear(module, model.dtype))
        for attribute in ("quantization_config",):
            if hasattr(model.config, attribute):
                delattr(model.config, attribute)
        model.hf_quantizer, model.is_quantized = None, False
        vars(model).pop("_hf_peft_config_loaded", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # a path of this machine tells a stranger nothing
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _whole(out: Path, write: Callable[[Path], None]) -> None:
    """The folder appears complete or not at all."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    except OSError as error:
        raise BadInput(
            f"write {out}", error.strerror or str(error), "Free some space, or name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
