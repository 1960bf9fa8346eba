"""KV-cache policies: patches that choose which tokens of a text stay in the cache while the model generates."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..contracts import Patch, Place, Surgery, When
from ..errors import BadInput
from ..memory.budget import gib, parse
from ..model import anatomy
from ..model.kv_cache import KeptCache, require_exact
from ..model.kv_rows import Row

AUTO, UNLIMITED = "auto", 10**14  # bytes


class CacheSurgery(Surgery):
    """Changes nothing in the model: each call of `generate` gets a new cache."""

    def __init__(self, patch: CachePolicy, model: PreTrainedModel):
        self.patch = patch
        self.layers = len(anatomy.blocks(model)[1])

    def revert(self) -> None:
        pass

    def own_tensors(self) -> dict[str, Tensor]:
        return {}

    def merge(self) -> None:
        asked = f"merge {type(self.patch).__name__}"
        raise BadInput(asked, "it acts only during generation and changes no weights", "Remove it from the recipe")

    def cache(self) -> Cache:
        return KeptCache(self.layers, self.patch)


@dataclass(frozen=True)
class CachePolicy(Patch):
    """Chooses the tokens that each layer keeps of a text (`model.kv_cache.Policy`)."""

    when: ClassVar[When] = When.INFER
    exclusive_reason: ClassVar[str] = "a model generates with one KV cache"
    bounded: ClassVar[bool] = True
    floor: ClassVar[int] = 0
    slack: ClassVar[int] = 0
    queries: ClassVar[int] = 0

    shrinkable: ClassVar[tuple[str, ...]] = ("chunk",)

    bits: Literal[16, 8, 4] = 16  # of a cached number; 16: as the model computes it
    chunk: int = 4096  # tokens of a prompt that are read at a time; 0: all at once

    @abstractmethod
    def tokens(self, row: Row, layers: int) -> int: ...

    @abstractmethod
    def judge(self, row: Row, scale: float) -> tuple[Tensor, Tensor | float]: ...

    def shares(self, layers: int) -> Sequence[float] | None:
        return [1.0] * layers

    def apply(self, model: PreTrainedModel, place: Place) -> CacheSurgery:
        name = type(self).__name__
        if self.bits not in (16, 8, 4):
            raise BadInput(f"{name}: bits: {self.bits}", "keys and values are stored in 16, 8 or 4", "Set one of these")
        if self.chunk < 0 or self.chunk == 1:
            raise BadInput(f"{name}: chunk: {self.chunk}", "a chunk has two tokens or more", "Set 4096, or 0 for all")
        surgery = CacheSurgery(self, model)
        if not any(p.is_meta for p in model.parameters()):
            probed = require_exact(model, name, surgery.layers)
            row = Row(self.bits)
            row.append(probed.keys[:, :1], probed.values[:, :1])
            row.queries = probed.queries
            self.tokens(row, surgery.layers)
        return surgery


@dataclass(frozen=True)
class BudgetedPolicy(CachePolicy):
    """A policy whose budget is stated in tokens, in bytes or as a share of the prompt."""

    shrinkable: ClassVar[tuple[str, ...]] = ("chunk", "budget")

    budget: int | str = 1024  # tokens per layer, bytes (64MiB), a share of the prompt (10%), or auto (budget.fast)

    @property
    @abstractmethod
    def window(self) -> int: ...

    def __post_init__(self) -> None:
        _ = self._share, self._bytes  # refuse what is no budget
        if isinstance(self.budget, int) and self.budget < self.least:
            self._too_small(f"{self.budget} tokens per layer", self.least)

    @property
    def least(self) -> int:
        """The fewest tokens that a layer can keep."""
        return self.window + self.floor

    @property
    def _share(self) -> float | None:
        text = str(self.budget).strip()
        if not text.endswith("%"):
            return None
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise BadInput(
                f"{self._name}: budget: {self.budget}", "a share is above 0 and at most 100 %", 'Write "10%"'
            )
        return share

    @property
    def _bytes(self) -> int | None:
        if isinstance(self.budget, int) or self._share is not None:
            return None
        if self.budget == AUTO:
            return UNLIMITED
        return parse(self.budget, None, f"{self._name}: budget")

    def within(self, size: int) -> BudgetedPolicy | None:
        return dataclasses.replace(self, budget=f"{size}B") if self.budget == AUTO else None

    @property
    def _name(self) -> str:
        return type(self).__name__

    def tokens(self, row: Row, layers: int) -> int:
        """A share is that of the prompt (of what was read, if that is unknown), and never less than the least."""
        if self._share is not None:
            return max(layers * self.least, int(self._share * layers * (row.prompt or row.seen)))
        if self._bytes is None:
            return layers * int(self.budget)
        rings = 0 if row.queries is None else layers * row.queries[:, :1].nbytes * self.queries
        tokens = (self._bytes - rings) // row.token_bytes - layers  # each layer has room for the next token
        if tokens < layers * self.least:
            self._too_small(f"{gib(self._bytes)}", gib(layers * (self.least + 1) * row.token_bytes + rings))
        return tokens

    def _too_small(self, what: str, least: int | str) -> None:
        unit = " tokens" if isinstance(least, int) else ""
        have = f"the window and {self.floor} tokens before it use {least}{unit} at least"
        raise BadInput(f"{self._name}: budget: {what}", have, "Allow more, or set a smaller window")


@dataclass(frozen=True)
class WindowPolicy(BudgetedPolicy):
    """Keeps the newest tokens, and of those before them the ones that these attend to most."""

    floor: ClassVar[int] = 4

    window: int = 32  # newest tokens that always stay, and whose queries judge the others
    kernel: int = 5  # scores are averaged over so many neighbouring tokens; odd

    def __post_init__(self) -> None:
        for name in ("window", "kernel"):
            if (value := getattr(self, name)) < 1 or (name == "kernel" and value % 2 == 0):
                have = "it must be odd and 1 or more" if name == "kernel" else "it must be 1 or more"
                raise BadInput(f"{self._name}: {name}: {value}", have, f"Set {name}: {getattr(WindowPolicy, name)}")
        super().__post_init__()

    @property
    def queries(self) -> int:  # type: ignore[override]
        return self.window

    @property
    def slack(self) -> int:  # type: ignore[override]
        """While text is generated, so many tokens of each layer are evicted at a time: scores cost an attention."""
        return max(1, min(self.window, self.budget // 16)) if isinstance(self.budget, int) else max(1, self.window // 4)
