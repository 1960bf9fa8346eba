"""KV-cache policies: patches that choose which tokens of a text stay in the cache while the model generates."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..contracts import Patch, Place, Surgery, When
from ..errors import BadInput
from ..model import anatomy
from ..model.kv_cache import BoundedCache, BoundedLayer, require_exact


class CacheSurgery(Surgery):
    """Nothing is changed in the model: each call of `generate` gets a cache of its own."""

    def __init__(self, patch: CacheScorer, model: PreTrainedModel):
        self.patch = patch
        self.layers = len(anatomy.blocks(model)[1])

    def revert(self) -> None:
        pass

    def own_tensors(self) -> dict[str, Tensor]:
        return {}

    def merge(self) -> None:
        asked = f"merge {type(self.patch).__name__}"
        raise BadInput(asked, "it is a way to generate and changes no weight", "Leave it out of the recipe")

    def cache(self) -> Cache:
        return BoundedCache(self.layers, self.patch.limit, self.patch.scores)


@dataclass(frozen=True)
class CacheScorer(Patch):
    """Keeps the `limit` tokens of a layer with the highest `scores`. A prompt is read whole before any is evicted."""

    when: ClassVar[When] = When.INFER
    exclusive_reason: ClassVar[str] = "a model generates with one KV cache"

    @property
    @abstractmethod
    def limit(self) -> int:
        """How many tokens a layer keeps."""

    @abstractmethod
    def scores(self, layer: BoundedLayer) -> Tensor:
        """(B, N), of the tokens in `layer`, whose keys, values and positions it may read; padding counts as -inf."""

    def apply(self, model: PreTrainedModel, place: Place) -> CacheSurgery:
        surgery = CacheSurgery(self, model)
        if not any(p.is_meta for p in model.parameters()):
            require_exact(model, type(self).__name__, surgery.layers)
        return surgery
