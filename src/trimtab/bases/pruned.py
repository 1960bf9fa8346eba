"""Base of patches that set weights of linears to zero: which linears they take, and how the originals come back."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contracts import Patch, Surgery
from ..errors import BadInput
from ..model import anatomy, quant
from ..model.surgery import Swaps

PATTERNS = {"unstructured": 0, "2:4": 4, "4:8": 8}  # -> neighbouring weights of a row, half of which become zero


def prunable(model: PreTrainedModel, patch: str, targets: str, pattern: str) -> dict[str, nn.Module]:
    """Path -> linear for each of `targets`. BadInput for wrapped or quantised ones, and where the pattern cannot be."""
    linears, group = anatomy.target_linears(model, targets), PATTERNS[pattern]
    for name, linear in linears.items():
        if not anatomy.is_linear(linear):
            raise BadInput(f"{patch}: {name}", "another patch wraps it", f"Name {patch} before the other patch")
        if quant.is_quantised(linear):
            have = "its base is stored in 4 or 8 bits, which cannot represent zero exactly"
            raise BadInput(f"{patch}: {name}", have, "Load the base in bf16")
        if group and anatomy.widths(linear)[0] % group:
            have = f"{name} has {anatomy.widths(linear)[0]} inputs, not a multiple of {group}"
            raise BadInput(f'{patch}: pattern: "{pattern}"', have, "Leave it out of targets")
    return linears


def check_share(patch: str, sparsity: float, pattern: str) -> None:
    """BadInput unless `sparsity` is a share that the pattern allows."""
    if not 0 < sparsity < 1:
        raise BadInput(f"{patch}: sparsity: {sparsity}", "it must be above 0 and below 1", "Set it to 0.5")
    if PATTERNS[pattern] and sparsity != 0.5:
        asked = f'{patch}: pattern: "{pattern}" with sparsity: {sparsity}'
        have = {"2:4": "two of four are one half", "4:8": "four of eight are one half"}[pattern]
        raise BadInput(asked, have, "Set sparsity: 0.5")


class PrunedSurgery(Surgery):
    """Linears whose weights are replaced. `originals`: path -> the weight as it was loaded."""

    starts_at_zero = False

    def __init__(self, patch: Patch, model: PreTrainedModel, linears: dict[str, nn.Module]):
        self.patch, self.model, self.linears = patch, model, linears
        self.swaps = Swaps(model)
        self.originals: dict[str, Tensor] = {name: linear.weight.data for name, linear in linears.items()}  # type: ignore[operator, union-attr]
        self.swaps.on_undo(self._put_back)

    def _put_back(self) -> None:
        for name, linear in self.linears.items():
            linear.weight.data = self.originals[name]  # type: ignore[union-attr]

    def revert(self) -> None:
        self.swaps.undo()

    def merge(self) -> None:
        """Keeps the pruned weights in the model."""
        kept = {name: linear.weight.data for name, linear in self.linears.items()}  # type: ignore[operator, union-attr]
        self.swaps.undo()
        for name, linear in self.linears.items():
            linear.weight.data = kept[name]  # type: ignore[union-attr]
