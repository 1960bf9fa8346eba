"""Where a run computes and where its tables are. Plain data: importing it loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic.dataclasses import dataclass

from ..errors import BadInput
from ..validation import Block, FileName

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place(Block):
    """The two tiers of memory. `fast`: the device that computes: auto (CUDA if there is one, else the CPU), cpu, cuda,
    or one of several, as cuda:1. `slow`: the larger memory below it (auto, ram, disk). `folder`: where the slow tier's
    files are. `shard`: under torchrun, each process keeps a share of every weight (FSDP2); `offload`: in host memory.
    """

    short: ClassVar[str] = "fast"

    fast: str = "auto"
    slow: Literal["auto", "ram", "disk"] = "auto"
    folder: FileName | None = None
    shard: bool | Literal["offload"] = False

    @property
    def device(self) -> torch.device:
        import torch

        if self.fast == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.device(self.fast)
        except RuntimeError:
            raise BadInput(f'place: fast: "{self.fast}"', "no such device", 'Use "auto", "cpu" or "cuda"') from None
