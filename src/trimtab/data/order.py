"""The order of the rows: the longest come in the first two steps, so that a run that cannot fit them fails at once.

It takes two steps, since the optimizer's state exists only from the second one on. Otherwise the order is the library's
own, with each row once per epoch. Rows are swapped only in the first epoch, one pair for each of the two steps, and not
if the batch has a longest row already. The rows of a step do not depend on its micro-batches and processes; the first
process gets the long row.
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


def filled(lengths: numpy.ndarray, batch: int, step: int = 1) -> float:
    """The share of tokens in shuffled batches that are not padding, if each row is padded to the longest of its batch,
    rounded up to `step`."""
    order = numpy.random.default_rng(0).permutation(len(lengths))
    batch = min(batch, len(lengths))
    rows = lengths[order[: len(order) // batch * batch]].reshape(-1, batch)
    padded = -(-rows.max(1) // step) * step * batch
    return float(rows.sum() / padded.sum())


def batch_lengths(lengths: numpy.ndarray, batch: int, step: int, batches: int) -> int:
    """The number of different lengths of `batches` shuffled batches, each padded to its longest row, rounded up to
    `step`."""
    random, seen = numpy.random.default_rng(0), set()
    batch = min(batch, len(lengths))
    while batches > 0:
        rows = lengths[random.permutation(len(lengths))[: len(lengths) // batch * batch]].reshape(-1, batch)[:batches]
        seen |= set((-(-rows.max(1) // step)).tolist())
        batches -= max(1, len(rows))
        if len(seen) == len(set((-(-lengths // step)).tolist())):
            break
    return max(1, len(seen))


class LongestFirst(Sampler):
    """`inner`'s order, except that in the first two steps of the first epoch the first micro-batch has a longest row.

    `batch`: rows per micro-batch; `times`: micro-batches per step, over all processes.
    """

    def __init__(self, inner: Any, lengths: numpy.ndarray, batch: int, times: int = 1):
        self.inner, self.lengths, self.batch = inner, lengths, batch
        self.starts = 0, times * batch

    def __len__(self) -> int:
        return len(self.inner)

    def set_epoch(self, epoch: int) -> None:
        self.inner.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        if self.inner.epoch:
            yield from self.inner
            return
        order = list(self.inner)
        for start in (at for at in self.starts if at < len(order)):
            rest = self.lengths[order[start:]]
            longest = int(rest.argmax())  # the first of equal ones
            if longest >= self.batch:
                order[start], order[start + longest] = order[start + longest], order[start]
        yield from order


class Mixed(Sampler):
    """Each of the first `own` rows once per epoch, in a random order, and among them rows of the `more` behind them.

    Of any n rows in a row `mix` n are of these, to within one. They come in a random order, each once before any comes
    again; the next epoch goes on with a new order.
    """

    def __init__(self, own: int, more: int, mix: float, seed: int):
        self.own, self.more, self.mix, self.seed, self.epoch = own, more, mix, seed, 0

    def __len__(self) -> int:
        return int(self.own / (1 - self.mix))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = numpy.random.default_rng((self.seed, self.epoch))
        own, more = iter(random.permutation(self.own).tolist()), iter(())
        drawn = 0
        for place in range(1, len(self) + 1):
            if int(place * self.mix) > drawn:
                drawn += 1
                if (index := next(more, None)) is None:
                    more = iter((self.own + random.permutation(self.more)).tolist())
                    index = next(more)
                yield index
            else:
                yield next(own)


def longest_first(sampler: Any, trainer: Any) -> Any:
    """`sampler` with the longest rows first, if it shuffles; any other order was requested and is kept."""
    if type(sampler) is not RandomSampler or not trainer.accelerator.use_seedable_sampler:
        return sampler
    from accelerate.data_loader import SeedableRandomSampler

    dataset = sampler.data_source
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return sampler
    # what accelerate would have replaced the sampler by
    shuffled: Any = SeedableRandomSampler(dataset, data_seed=trainer.accelerator.dataloader_config.data_seed)
    args = trainer.args
    if trainer.rehearsed is not None:
        own, mix = trainer.rehearsed
        shuffled = Mixed(own, len(dataset) - own, mix, args.seed if args.data_seed is None else args.data_seed)
    times = args.gradient_accumulation_steps * args.world_size
    return LongestFirst(shuffled, row_lengths(dataset), args.train_batch_size, times)
