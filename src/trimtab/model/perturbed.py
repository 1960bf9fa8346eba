"""A loss at several points near the trained parameters, without changing them.

Each point is a function (number of a parameter, parameter) -> its values there. Two ways, with the same results:

- Stacked. If all that is trained in the blocks are sparse changes (sparse_linear.py), one forward pass computes up to
  16 points: from the first block with a change on, the batch is repeated once for each point, and each linear adds each
  repetition's own values to the shared weight. The blocks before are computed once for all points.
- One after another. A block's parameters are replaced while the block runs, so that only one block's are there twice.

At the first batch both ways are compared; if they differ, as for a model that mixes the rows of a batch, the second is
used. Dropout is off in both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import anatomy
from .sparse_linear import SparseLinear

Point = Callable[[int, Tensor], Tensor]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # relative, of a loss; 16-bit products differ more
HALF = 2e-2
MOST = 16  # points that are stacked at a time
STEP = 0.02  # of the check: as large as a usual weight


class Points:
    """Evaluates losses of `model` at points near its trained parameters."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        path, self.stack = anatomy.blocks(model)
        self.owner = model.get_submodule(path.rpartition(".")[0])  # its forward runs the blocks
        self.trained = [p for p in model.parameters() if p.requires_grad]
        numbers = {id(p): number for number, p in enumerate(self.trained)}
        self.sparse: list[tuple[SparseLinear, int]] = []
        self.inside: list[list[int]] = []  # of each block: the numbers of its trained parameters
        seen: set[int] = set()
        for block in self.stack:
            own = [p for p in block.parameters() if id(p) in numbers]
            self.inside.append([numbers[id(p)] for p in own])
            seen.update(id(p) for p in own)
            plain = [m for m in block.modules() if isinstance(m, SparseLinear) and _plain(m)]
            self.sparse += [(layer, numbers[id(layer.values)]) for layer in plain if id(layer.values) in numbers]
        self.outside = [number for key, number in numbers.items() if key not in seen]
        behind = {id(p) for p in anatomy.fresh_parameters(model).values()}  # a new head, which reads what blocks return
        self.stacks = bool(self.sparse) and len(self.sparse) == sum(map(len, self.inside))
        self.stacks = self.stacks and all(id(self.trained[number]) in behind for number in self.outside)
        self.first = next((n for n, own in enumerate(self.inside) if own), len(self.inside))
        self.checked = False

    @torch.no_grad()
    def losses(self, loss: Callable[[], Tensor], points: Sequence[Point]) -> list[Tensor]:
        """`loss` at each point. It is called once for each, and must run one forward pass of the model on one batch."""
        with self._without_dropout():
            if self.stacks and not self.checked:
                self._check(loss)
            if not self.stacks:
                return self._one_by_one(loss, points)
            some = (points[start : start + MOST] for start in range(0, len(points), MOST))
            return [value for part in some for value in self._stacked(loss, part)]

    def _check(self, loss: Callable[[], Tensor]) -> None:
        """Computes two losses in both ways, at points far enough from each other that mixed rows show."""
        far = [lambda number, p, g=g: p + (1 + g) * STEP * _alternating(p, number + g) for g in range(2)]
        try:
            found = self._stacked(loss, far)
        except SeveralPasses:  # a loss that generates
            self.stacks, self.checked = False, True
            return
        wanted = self._one_by_one(loss, far)
        if type(wanted[0]) is not Tensor:  # a plan, without values
            return
        self.checked = True
        tolerance = TOLERANCE.get(self.model.dtype, HALF)
        for one, other in zip(wanted, found, strict=True):
            if one.isfinite() and not float((one - other).abs()) <= tolerance * max(1.0, float(one.abs())):
                self.stacks = False

    @contextlib.contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """The parts of the model are in eval mode; the model itself stays in its mode, by which the trainer counts."""
        training = [module for module in self.model.modules() if module.training and module is not self.model]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    # --- one after another ---------------------------------------------------------------------------------------

    def _one_by_one(self, loss: Callable[[], Tensor], points: Sequence[Point]) -> list[Tensor]:
        found = []
        for point in points:
            with self._at(point):
                found.append(loss())
        return found

    @contextlib.contextmanager
    def _at(self, point: Point) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._replaced(self.outside, point))
            for block, numbers in zip(self.stack, self.inside, strict=True):
                if numbers:
                    swap = contextlib.ExitStack()
                    enter = lambda *_, s=swap, n=numbers: s.enter_context(self._replaced(n, point)) and None  # noqa: E731
                    stack.callback(block.register_forward_pre_hook(enter).remove)
                    stack.callback(block.register_forward_hook(lambda *_, s=swap: s.close()).remove)
                    stack.push(swap)  # a block that raises leaves nothing behind
            yield

    @contextlib.contextmanager
    def _replaced(self, numbers: Sequence[int], point: Point) -> Iterator[bool]:
        originals = [self.trained[number].data for number in numbers]
        try:
            for number in numbers:
                self.trained[number].data = point(number, self.trained[number].data)
            yield True
        finally:
            for number, original in zip(numbers, originals, strict=True):
                self.trained[number].data = original

    # --- stacked -------------------------------------------------------------------------------------------------

    def _stacked(self, loss: Callable[[], Tensor], points: Sequence[Point]) -> list[Tensor]:
        found: list[Tensor] = []
        with _Stack(self.owner, self.stack[self.first :], len(points)) as stack:
            for layer, number in self.sparse:
                layer.variants = [point(number, layer.values.data) for point in points]
            try:
                for stack.part, point in enumerate(points):
                    with self._replaced(self.outside, point):
                        found.append(loss())
            finally:
                for layer, _ in self.sparse:
                    layer.variants = None
        return found


class SeveralPasses(Exception):
    """The loss runs the model more than once."""


class _Stack:
    """Within it the first call of `owner` runs `blocks` on the batch repeated `count` times; each call returns what
    belongs to repetition `part`."""

    def __init__(self, owner: nn.Module, blocks: Sequence[nn.Module], count: int):
        self.owner, self.blocks, self.count = owner, blocks, count
        self.part, self.rows, self.output = 0, 0, None
        self.served: set[int] = set()
        self.whole: Any = None

    def __enter__(self) -> _Stack:
        self.had, self.whole = vars(self.owner).get("forward"), self.owner.forward
        self.owner.forward = self._forward  # type: ignore[method-assign]
        self.handles = [
            block.register_forward_pre_hook(
                lambda module, args, kwargs, first=n == 0: self._enter(args, kwargs, first), with_kwargs=True
            )
            for n, block in enumerate(self.blocks)
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        if self.had is None:
            del self.owner.forward
        else:
            self.owner.forward = self.had  # type: ignore[method-assign]
        for handle in self.handles:
            handle.remove()
        self.output = None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.output is None:
            self.output = self.whole(*args, **kwargs)
        elif self.part in self.served:
            raise SeveralPasses
        self.served.add(self.part)
        return self._each(self.output, lambda t: t.chunk(self.count)[self.part], self.rows * self.count)

    def _enter(self, args: tuple, kwargs: dict[str, Any], first: bool) -> tuple[tuple, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.rows = hidden.shape[0] if first else self.rows
        args, kwargs = self._each((args, kwargs), self._repeated, self.rows)
        return args, kwargs

    def _repeated(self, tensor: Tensor) -> Tensor:
        return tensor.repeat(self.count, *[1] * (tensor.dim() - 1))

    def _each(self, value: Any, make: Callable[[Tensor], Tensor], rows: int) -> Any:
        """`value` with `make` applied to its tensors of so many rows."""
        if isinstance(value, Tensor):
            return make(value) if value.dim() > 1 and value.shape[0] == rows else value
        if isinstance(value, dict):  # a ModelOutput too
            made = {key: self._each(item, make, rows) for key, item in value.items()}
            return made if type(value) is dict else type(value)(**made)
        if isinstance(value, tuple | list):
            return type(value)(self._each(item, make, rows) for item in value)
        return value


def _alternating(like: Tensor, shift: int) -> Tensor:
    """+1 and -1 in turn."""
    return 1.0 - 2.0 * ((torch.arange(like.numel(), device=like.device) + shift) % 2).view(like.shape).to(like.dtype)


def _plain(layer: SparseLinear) -> bool:
    """Whether the values that are added are the trained parameter itself."""
    return type(layer).effective is SparseLinear.effective
