"""`trimtab export RECIPE.yaml --to peft | merged`: the result in a form that needs no trimtab.

`peft`: an adapter folder that stock `peft` loads (PaCA becomes a LoRA with a one-hot A). `merged`: a plain folder for
transformers, vLLM or llama.cpp; a 4/8-bit base is written de-quantised, so that its outputs stay those of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__
from .errors import BadInput, nearest
from .folder_lock import beside, locked
from .model.quiet import hushed
from .recipe import Recipe

FORMS = ("peft", "merged")
MARK = "trimtab_export.json"  # in what export writes: what it is, and its files


@hushed()
def export(recipe: Recipe, to: str, out: str | Path | None = None, adapter: str | Path | None = None,
           overwrite: bool = False) -> Path:  # fmt: skip
    """Write the run's adapter as `to` into `out` (default: beside it, `<output>/peft` or `<output>/merged`)."""
    if to not in FORMS:
        raise BadInput(f"export to {to}", "there is no such form", nearest(to, FORMS))
    from .runs import load_run, lock_run

    out = Path(out) if out else Path(recipe.output) / to
    with contextlib.ExitStack() as locks:
        if os.access(recipe.output, os.W_OK):  # others may read a run, and write elsewhere
            locks.enter_context(lock_run(recipe.output, f"export {recipe.output}"))
        locks.enter_context(locked(beside(out), f"export to {out}"))
        _replaceable(out, overwrite)
        model, tokenizer, surgeries, base = load_run(recipe, adapter)
        write = {"peft": _peft, "merged": _merged}[to]
        _whole(out, lambda folder: write(folder, model, tokenizer, surgeries, base), {"to": to, "recipe": recipe.hash})
    return out


def _replaceable(out: Path, overwrite: bool) -> None:
    """Refuse what is there already, but for an earlier export of ours where the user says so: it is removed whole."""
    asked = f"export to {out}"
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()) or not (out.exists() or out.is_symlink()):
        return
    other = "Name another folder with --out"
    if not overwrite:
        raise BadInput(asked, "it is there already", f"Say --overwrite, or n{other[1:]}")
    if out.is_symlink() or not out.is_dir():
        raise BadInput(f"{asked} --overwrite", "it is no folder", other)
    try:
        written = {MARK, *json.loads((out / MARK).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise BadInput(
            f"{asked} --overwrite", f"it is no export of trimtab's (it has no readable {MARK})",
            f"{other}, or remove it yourself",
        ) from None  # fmt: skip
    if more := sorted(set(_names(out)) - written):
        some = ", ".join(more[:3]) + (f" and {len(more) - 3} more" if len(more) > 3 else "")
        raise BadInput(f"{asked} --overwrite", f"it holds what no export wrote ({some})", f"Move that away. {other}")


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]


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


def _whole(out: Path, write: Callable[[Path], None], mark: dict[str, str]) -> None:
    """The folder appears complete or not at all; what it replaces goes once it is in place.

    `mark` is left in it, with the names of its files: by it a later export knows what it may replace.
    """
    from .adapter import unwritten

    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        content = {"trimtab": __version__, **mark, "files": sorted(_names(partial))}
        (partial / MARK).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if had := out.exists():
            os.replace(out, old)
        try:
            os.replace(partial, out)
        except OSError:
            if had:
                os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if (why := unwritten(error)) is None:
            raise
        raise BadInput(f"write {out}", why, "Free some space, or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
