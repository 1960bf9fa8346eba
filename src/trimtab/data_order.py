"""The order of the rows: the longest one comes in the first step, so that a run which cannot hold it ends at once.

Otherwise the order is the library's own: the same rows in the same places, each once per epoch. Only the first epoch
has two rows exchanged (one pair per process), and none where the first batch holds a longest row already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
from torch.utils.data import RandomSampler, Sampler


def row_lengths(dataset: Any) -> numpy.ndarray:
    """Tokens of each row, read without decoding the table; shape (rows,)."""
    from pyarrow import compute

    parts = [compute.list_value_length(part["input_ids"]) for part in dataset.with_format("arrow").iter(1000)]
    return numpy.concatenate([numpy.asarray(part) for part in parts] or [numpy.zeros(0, dtype=numpy.int64)])


class LongestFirst(Sampler):
    """`inner`'s order, but for the first epoch's first batches of `batch` rows: each of `processes` gets a long row."""

    def __init__(self, inner: Any, lengths: numpy.ndarray, batch: int, processes: int = 1):
        self.inner, self.lengths, self.batch, self.processes = inner, lengths, batch, processes

    def __len__(self) -> int:
        return len(self.inner)

    def set_epoch(self, epoch: int) -> None:
        self.inner.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        if self.inner.epoch:
            yield from self.inner
            return
        order = list(self.inner)
        for start in range(0, min(self.processes * self.batch, len(order)), self.batch):
            rest = self.lengths[order[start:]]
            longest = int(rest.argmax())  # the first of equal ones
            if longest >= self.batch:
                order[start], order[start + longest] = order[start + longest], order[start]
        yield from order


def longest_first(sampler: Any, trainer: Any) -> Any:
    """`sampler` with the longest row in front, where it shuffles; another order is what somebody asked for."""
    if type(sampler) is not RandomSampler or not trainer.accelerator.use_seedable_sampler:
        return sampler
    from accelerate.data_loader import SeedableRandomSampler

    dataset = sampler.data_source
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return sampler
    # what accelerate would have put in the sampler's place
    shuffled = SeedableRandomSampler(dataset, data_seed=trainer.accelerator.dataloader_config.data_seed)
    return LongestFirst(shuffled, row_lengths(dataset), trainer.args.train_batch_size, trainer.args.world_size)
