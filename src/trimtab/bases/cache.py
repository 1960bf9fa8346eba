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
    """Changes nothing in the model: each call of `generate` gets a new cache."""

    def __init__(self, patch: CacheScorer, model: PreTrainedModel):
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
        return BoundedCache(self.layers, self.patch.limit, self.patch.scores)


@dataclass(frozen=True)
class CacheScorer(Patch):
    """Each layer keeps the `limit` tokens with the highest `scores`. A whole prompt is read before any is evicted."""

    when: ClassVar[When] = When.INFER
    exclusive_reason: ClassVar[str] = "a model generates with one KV cache"

    @property
    @abstractmethod
    def limit(self) -> int:
        """The number of tokens that a layer keeps."""

    @abstractmethod
    def scores(self, layer: BoundedLayer) -> Tensor:
        """Scores (B, N) of the tokens in `layer`, from its keys, values and positions; padding counts as -inf."""

    def apply(self, model: PreTrainedModel, place: Place) -> CacheSurgery:
        surgery = CacheSurgery(self, model)
        if not any(p.is_meta for p in model.parameters()):
            require_exact(model, type(self).__name__, surgery.layers)
        return surgery
