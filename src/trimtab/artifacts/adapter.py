"""The adapter folder: write it, read it, check it against the base.

    adapter/adapter_config.json         what PEFT reads (a LoRA is a plain PEFT LoRA)
    adapter/adapter_model.safetensors   the patch's tensors, `base_model.model.<path>`, without the base's; in several
                                        files if they are large (artifacts/adapter_weights.py)
    adapter/checksums.json              their checksums
    adapter/trimtab.json                the patch, its fields, the base's name and hash, labels, the format of replies
    adapter/README.md                   a model card

Several patches are in sub-folders, `adapter/0-paca`, `adapter/1-head`, each as above. All files are JSON or
safetensors; files from others are checked and never executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import __version__, methods
from ..contracts import Patch, Place, Surgery, When
from ..errors import BadInput
from ..files import whole_folder, writing
from ..model.hub import ordinary_modes
from ..model.reply import ReplyForm
from ..tiered.checkpoint import load_rows, save_rows
from ..validation import build, read_json
from .adapter_weights import read_weights, write_weights

CONFIG, OURS = "adapter_config.json", "trimtab.json"
ROWS = "rows"  # in a checkpoint: the changed rows of the tables
PREFIX = "base_model.model."
RANK = 4096  # larger ranks are checked against the tensors


@dataclass(frozen=True)
class Base:
    """The base that an adapter was trained on: its name as the user wrote it, hash, task, precision and class labels,
    and the format of replies that it was trained on."""

    name: str
    hash: str
    task: str = "causal-lm"
    precision: str = "auto"
    labels: list[str] = field(default_factory=list)
    reply: ReplyForm = field(default_factory=ReplyForm)


@dataclass(frozen=True)
class Meta:
    """The content of trimtab.json: the base, and the patch with its fields or the sub-folders of several patches."""

    base: Base
    trimtab: str = ""  # the version that wrote it
    patch: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)


def save_adapter(folder: str | Path, surgeries: Sequence[Surgery], base: Base) -> Path:
    """Write the surgeries' own tensors. The folder appears complete or not at all, and replaces an earlier one."""
    folder = Path(folder)
    with writing(f"write the adapter to {folder}", "Free some space and resume"), whole_folder(folder) as partial:
        write_adapter(partial, surgeries, base)
    return folder


def write_adapter(
    folder: Path, surgeries: Sequence[Surgery], base: Base, before: tuple[Path | None] | None = None
) -> None:
    """Write into `folder` in place, as a part of a folder that itself appears complete or not at all.

    `before`: for a checkpoint, a tuple of the previous one (or None); only rows that changed since then are saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    surgeries = _saved(surgeries)
    if len(surgeries) == 1:
        _write_one(folder, surgeries[0], base, before)
        return
    parts = [f"{index}-{methods.name_of(surgery.patch)}" for index, surgery in enumerate(surgeries)]
    for part, surgery in zip(parts, surgeries, strict=True):
        _write_one(folder / part, surgery, base, (before[0] and before[0] / part,) if before else None)
    _write_json(folder / OURS, {"trimtab": __version__, "parts": parts, "base": dataclasses.asdict(base)})


def _saved(surgeries: Sequence[Surgery]) -> list[Surgery]:
    """Those that an adapter folder has: all but those that only say where the base's weights are, and an anchor."""
    return [surgery for surgery in surgeries if surgery.patch.when is not When.LOAD and surgery.saved]


def _write_one(folder: Path, surgery: Surgery, base: Base, before: tuple[Path | None] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = methods.name_of(surgery.patch)
    tensors = {PREFIX + key: t.detach() for key, t in surgery.own_tensors().items()}
    stays = tensors if before is None else {key: t for key, t in tensors.items() if not _in_store(surgery, t)}
    write_weights(folder, stays, lambda tensor: _in_store(surgery, tensor))
    for store in surgery.stores if before is not None else ():
        last = before[0] / ROWS / store.name if before and before[0] else None
        save_rows(store, folder / ROWS / store.name, last if last and last.is_dir() else None)
    config = {**surgery.adapter_config(), "base_model_name_or_path": base.name}
    if config.get("target_modules") and (model := getattr(surgery, "model", None)) is not None:
        config["target_modules"] = short_targets(model, config["target_modules"])
    _write_json(folder / CONFIG, config)
    ours = {"trimtab": __version__, "patch": name, "config": surgery.patch.config(),
            "base": dataclasses.asdict(base)}  # fmt: skip
    _write_json(folder / OURS, ours)
    (folder / "README.md").write_text(_card(name, surgery, base, tensors), encoding="utf-8")
    ordinary_modes(folder)


def short_targets(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The shortest names by which peft finds exactly the modules `names`: last parts, if no others share them."""
    wanted = set(names)
    leaves: dict[str, set[str]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            leaves.setdefault(path.rpartition(".")[2], set()).add(path)
    found = set()
    for name in wanted:
        leaf = name.rpartition(".")[2]
        found.add(leaf if leaves.get(leaf, {name}) <= wanted else name)
    return sorted(found)


def _card(name: str, surgery: Surgery, base: Base, tensors: dict[str, Tensor]) -> str:
    count = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    row = methods.TABLE[name]
    fields = "\n".join(f"- {key}: {value}" for key, value in surgery.patch.config().items())
    tag = base.name if "/" in base.name and not Path(base.name).exists() else ""
    paper = f" (arXiv {row.paper})" if row.paper else ""
    return f"""{front_matter("peft", tag, name)}
# A {row.title} adapter for {base.name}

{row.title}{paper}: {row.summary}. {count:,} parameters; base hash `{base.hash}`.

{fields}

Load it with `trimtab.load_adapter(model, folder)`, or convert it with `trimtab export`.
"""


def front_matter(library: str, base: str, *tags: str) -> str:
    """The front matter of a model card. `base`: its hub id, or ""."""
    lines = [f"base_model: {base}"] * bool(base) + [f"library_name: {library}", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in ("trimtab", *tags)), "---", ""])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_meta(folder: str | Path) -> Meta:
    """The content of trimtab.json; BadInput unless trimtab wrote it."""
    path = Path(folder) / OURS
    if not path.is_file():
        raise BadInput(f"adapter {folder}", f"it has no {OURS}", "Name the adapter/ folder of a trimtab run")
    meta = read_json(path, Meta)
    if meta is None or not (meta.patch or meta.parts):
        raise BadInput(f"adapter {folder}", f"its {OURS} is damaged", "Train the adapter again, or use an intact copy")
    return meta


def load_adapter(
    model: PreTrainedModel, folder: str | Path, place: Place | None = None, hash_of_base: str | None = None
) -> list[Surgery]:
    """Apply the adapter's patches to `model` and load their tensors; returns the surgeries, in order.

    BadInput unless `model` has the hash of the base that the adapter was trained on (`hash_of_base`: the hash, if
    known).
    """
    from ..model.load import base_hash

    folder = Path(folder)
    meta = read_meta(folder)
    _require_base(f"adapter {folder}", meta.base, hash_of_base or base_hash(model))
    with contextlib.ExitStack() as undo:  # if one part fails, the others are reverted
        surgeries = [_load_one(model, part, place or Place(), undo) for part in _parts(folder, meta)]
        undo.pop_all()
    return surgeries


def _parts(folder: Path, meta: Meta) -> list[Path]:
    parts = [folder / part for part in meta.parts] or [folder]
    for part in parts:
        if part != folder and part.resolve().parent != folder.resolve():
            raise BadInput(f"adapter {folder}", f"it names {part}, outside its folder", "Do not use this adapter")
    return parts


def patches_of(folder: str | Path) -> list[Patch]:
    """The patches that an adapter folder names, in order."""
    folder = Path(folder)
    return [_patch_of(part) for part in _parts(folder, read_meta(folder))]


def _patch_of(folder: Path) -> Patch:
    meta = read_meta(folder)
    if not meta.patch:
        raise BadInput(f"adapter {folder}", f"its {OURS} names no patch", "Use an intact copy")
    return build(methods.find(meta.patch), meta.config, f"adapter {folder}")


def _load_one(model: PreTrainedModel, folder: Path, place: Place, undo: contextlib.ExitStack) -> Surgery:
    patch, tensors = _patch_of(folder), read_tensors(folder)
    has_rows = (folder / ROWS).is_dir()
    widest = max([RANK, *(max(*t.shape, t.numel() // t.shape[-1]) for t in tensors.values() if t.dim() and t.numel())])
    if not has_rows and (rank := getattr(patch, "r", 0)) > widest:  # before anything of that size is made
        raise BadInput(f"adapter {folder} of r {rank}", f"its tensors are at most {widest} wide", "Do not use it")
    surgery = patch.apply(model, place)
    undo.callback(surgery.revert)
    _fill(surgery, folder, tensors)
    return surgery


def load_into(
    surgeries: Sequence[Surgery], folder: str | Path, base: Base | None = None, what: str = "resume from"
) -> None:
    """Load saved tensors into patches that are already applied (resume). `base`: that of the patches, if known."""
    folder = Path(folder)
    meta = read_meta(folder)
    asked = f"{what} {folder}"
    if base is not None and meta.base.labels != base.labels:
        have = f"it has the classes {', '.join(meta.base.labels)}"
        raise BadInput(asked, have, f"Give rows with the same classes: these have {', '.join(base.labels)}")
    if base is not None:
        _require_base(asked, meta.base, base.hash)
    parts, surgeries = _parts(folder, meta), _saved(surgeries)
    if len(parts) != len(surgeries):
        raise BadInput(asked, f"it has {len(parts)} patches", f"The recipe has {len(surgeries)}: use the same patches")
    for surgery, part in zip(surgeries, parts, strict=True):
        _fill(surgery, part, read_tensors(part))


def _require_base(asked: str, made_for: Base, actual: str) -> None:
    if made_for.hash != actual:
        raise BadInput(
            f"{asked}, made for {made_for.name} (hash {made_for.hash})", f"this model is another one (hash {actual})",
            f"Load {made_for.name}, or train the adapter again on this model",
        )  # fmt: skip


def _fill(surgery: Surgery, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Load `tensors` into the patched model, and a checkpoint's rows into its tables."""
    if not (folder / ROWS).is_dir():
        surgery.load_tensors(tensors)
        return
    held = {key: t for key, t in surgery.own_tensors().items() if _in_store(surgery, t)}
    surgery.load_tensors({**held, **tensors})
    for store in surgery.stores:
        load_rows(store, folder / ROWS / store.name)


def _in_store(surgery: Surgery, tensor: Tensor) -> bool:
    return any(store.holds(tensor) for store in surgery.stores)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return {key.removeprefix(PREFIX): tensor for key, tensor in read_weights(folder).items()}
