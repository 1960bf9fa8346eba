"""MEFT (arXiv 2406.04984): a sparse adapter larger than fast memory, of which only needed experts are fetched."""

from .patch import Meft

__all__ = ["Meft"]
