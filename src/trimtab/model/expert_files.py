"""Loads a mixture without its experts, and reads these from the checkpoint's files one expert at a time.

A checkpoint mostly has one tensor for each expert. transformers stacks them, so a loaded model holds copies. Here the
model is built without its stacked parameters, so that the library passes over their tensors. `ExpertFiles` then makes
one expert's tensors with the library's own conversion, applied to that expert alone.
"""

from __future__ import annotations

import copy
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import WeightConverter, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from .experts import leaves, mixtures, take_out
from .hub import opened

FILES = "trimtab_expert_files"  # attribute of a model that was loaded without its experts
PIECES, PIECE = 64, 64  # of each file in its fingerprint: so many pieces of so many bytes


def without_experts(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class whose models have no stacked parameters of experts. `whole` makes one of them a model of `kind`."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        self.trimtab_left_out = []
        for module in mixtures(self).values():
            self.trimtab_left_out.append(take_out(module))
            module._is_hf_initialized = True  # there is nothing to initialise

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def whole(model: Any, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """The model with its stacked parameters, on `meta`."""
    for put_back in vars(model).pop("trimtab_left_out"):
        put_back()
    for module in mixtures(model).values():
        vars(module).pop("_is_hf_initialized", None)
    model.__class__ = kind
    return model


class ExpertFiles:
    """The experts of `model` (its stacked parameters may be on `meta`) in the safetensors files of `folder`.

    `complete`: whether each can be read alone.
    """

    def __init__(self, model: PreTrainedModel, folder: Path):
        self.model, self.files = model, sorted(folder.glob("*.safetensors"))
        self.stacked: dict[str, nn.Parameter] = {
            f"{path}.{leaf}": parameter
            for path, module in mixtures(model).items() for leaf, parameter in leaves(module).items()
        }  # fmt: skip
        self._open: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            self._file_of |= dict.fromkeys(self._opened(file).keys(), file)
        self._sources = self._found()
        self.complete = all(self._readable(name) for name in self.stacked)

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = opened(file)
        return self._open[file]

    def _found(self) -> dict[str, tuple[Any, dict[str, list[str]]]]:
        """Stacked parameter -> (its converter, or None; pattern -> keys in the files, in the order of the experts)."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        found: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        for key in sorted(self._file_of, key=_natural):
            name, pattern = rename_source_key(
                key, renamings, converters, self.model.base_model_prefix, dict(self.stacked)
            )
            if name not in self.stacked:
                name, pattern = (key, None) if key in self.stacked else (name, pattern)
            if name in self.stacked:
                _, sources = found.setdefault(name, (by_pattern.get(pattern or ""), {}))
                sources.setdefault(pattern or key, []).append(key)
        return found

    def _readable(self, name: str) -> bool:
        converter, sources = self._sources.get(name, (None, {}))
        stacked = self.stacked[name]
        if not sources:
            return False
        if converter is None:
            (keys,) = sources.values()
            return len(keys) == 1 and tuple(self._shape(keys[0])) == tuple(stacked.shape)
        if any(len(keys) != len(stacked) and not self._is_stack(keys, stacked) for keys in sources.values()):
            return False
        try:
            return self.expert(name, 0).shape == stacked.shape[1:]
        except Exception:  # a conversion that needs all experts at once can raise anything
            return False

    def _shape(self, key: str) -> list[int]:
        return self._opened(self._file_of[key]).get_slice(key).get_shape()

    def _is_stack(self, keys: list[str], stacked: Tensor) -> bool:
        return len(keys) == 1 and self._shape(keys[0])[:1] == [len(stacked)]

    def expert(self, name: str, expert: int) -> Tensor:
        """One expert of the stacked parameter `name`, in the file's precision."""
        converter, sources = self._sources[name]
        if converter is None:
            ((key,),) = sources.values()
            return self._opened(self._file_of[key]).get_slice(key)[expert : expert + 1][0]
        alone = copy.deepcopy(converter)
        for pattern, keys in sources.items():
            stack = self._is_stack(keys, self.stacked[name])
            key = keys[0] if stack else keys[expert]
            found = self._opened(self._file_of[key])
            tensor = found.get_slice(key)[expert : expert + 1] if stack else found.get_tensor(key)
            alone.add_tensor(name, key, pattern, tensor)
        made = alone.convert(name, model=self.model, config=self.model.config)[name]
        return (made[0] if isinstance(made, list) else made)[0]

    def values(self, name: str, positions: range) -> Tensor:
        """The values at these positions of a flattened stacked parameter, rising."""
        size = self.stacked[name][0].numel()
        found = []
        for expert in sorted({at // size for at in positions}):
            flat = self.expert(name, expert).reshape(-1)
            found.append(flat[torch.tensor([at % size for at in positions if at // size == expert])])
        return torch.cat(found)

    def fingerprint(self) -> str:
        """32 hex digits of the files: their names, sizes, and pieces of their bytes."""
        digest = hashlib.sha256()
        for file in self.files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as opened:
                for at in range(0, size, max(1, size // PIECES)):
                    opened.seek(at)
                    digest.update(opened.read(PIECE))
        return digest.hexdigest()[:32]

    def close(self) -> None:
        self._open.clear()


def _natural(key: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
