"""The only file that knows transformers' attribute names: where a model keeps its blocks, FFNs, linears and norms.

Models are never named here. Parts are found by their structure (the longest list of equal blocks, a linear inside a
block) and by the few leaf names that families share (q_proj, query, gate_proj, intermediate).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BadInput
from .surgery import is_patch

# Leaf names of linears that read the same input tensor, family by family.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q", "k", "v"),
                 ("w1", "w3"))  # fmt: skip


def is_linear(module: nn.Module | None) -> bool:
    """nn.Linear and its quantised kin (bitsandbytes' Linear4bit and Linear8bitLt are subclasses)."""
    return isinstance(module, nn.Linear)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head: token ids -> hidden states (batch, tokens, hidden)."""
    return model.base_model


def fresh_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Name -> parameter of a classifier's head: what lies outside the pretrained backbone."""
    inside = {id(parameter) for parameter in backbone(model).parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in inside}


def blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The stack of transformer blocks: the longest ModuleList, with its path."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not found:
        raise BadInput(f"patch {type(model).__name__}", "it has no list of blocks", "Use a transformer model")
    return max(found, key=lambda item: len(item[1]))


def target_linears(model: PreTrainedModel, targets: str) -> dict[str, nn.Module]:
    """Path -> linear for each linear inside the blocks that `targets` names (the head and the pooler are not)."""
    prefix = blocks(model)[0] + "."
    inside, patched = {}, []
    for name, module in model.named_modules():
        if not name.startswith(prefix) or name.startswith(tuple(f"{path}." for path in patched)):
            continue
        if is_patch(module):
            patched.append(name)
        if is_linear(module) or (is_patch(module) and _wraps_linear(module)):
            inside[name] = module
    chosen = _chosen(list(inside), targets)
    if not chosen:
        leaves = sorted({n.rpartition(".")[2] for n in inside})
        raise BadInput(
            f'targets: "{targets}"',
            f"no linear of {type(model).__name__} has such a name; there are {', '.join(leaves)}",
            'Say "all-linear", or name some of these',
        )
    if taken := [name for name in chosen if name in patched]:
        raise BadInput(
            f'targets: "{targets}"',
            f"{len(taken)} of these linears are patched already, {taken[0]} among them",
            "Give each patch linears of its own",
        )
    return {name: inside[name] for name in chosen}


def _chosen(names: list[str], targets: str) -> list[str]:
    """Which of `names` are meant: by ending first, by regex where no ending fits."""
    if targets == "all-linear":
        return names
    endings = tuple("." + part.strip() for part in targets.split(","))
    if chosen := [name for name in names if name.endswith(endings)]:
        return chosen
    try:
        return [name for name in names if re.search(targets, name)]
    except re.error:
        return []


def _wraps_linear(module: nn.Module) -> bool:
    return any(is_linear(getattr(module, name, None)) for name in ("base", "base_layer"))


def tied(model: nn.Module, linears: list[nn.Module]) -> tuple[str, str] | None:
    """-> two paths of one weight, where one of `linears` shares its weight with another module; else None."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first != name and any(linear.weight is parameter for linear in linears):
            return name, first
    return None


def shared_input_groups(names: list[str]) -> list[list[str]]:
    """Paths of linears, grouped where they read the same tensor (q/k/v, gate/up); each path is in one group."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        family = next((group[0] for group in SHARED_INPUTS if leaf in group), leaf)
        groups.setdefault((parent, family), []).append(name)
    return list(groups.values())


@dataclass(frozen=True)
class Ffn:
    """One block's feed-forward network: the module that a companion network lives in, and what width it has."""

    name: str
    host: nn.Module  # the whole FFN, or, in BERT-type blocks, the module that adds the FFN's output to its input
    whole: bool
    width: int  # hidden size, in and out

    def beside(self, add: Callable[[Tensor, Tensor], Tensor]) -> Any:
        """From now on `add(h, y)` stands where `y` stood: h (..., width) is the FFN's input, y what to add to.

        Returns the hook's handle. A whole FFN gives its own output as y; a BERT-type block its residual (which is h).
        Neither keeps a tensor after the forward pass, and no linear is hooked, so other patches may replace those.
        """
        if self.whole:

            def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
                h = args[0] if args else next(iter(kwargs.values()))
                return (add(h, output[0]), *output[1:]) if isinstance(output, tuple) else add(h, output)

            return self.host.register_forward_hook(after, with_kwargs=True)

        def before(module: nn.Module, args: tuple) -> tuple:
            inner, h = args
            return inner, add(h, h)

        return self.host.register_forward_pre_hook(before)


def ffns(model: PreTrainedModel) -> list[Ffn]:
    """Each block's FFN. `mlp`-type modules hold it whole; BERT-type blocks have `intermediate` and `output`."""
    path, stack = blocks(model)
    hidden = model.config.get_text_config().hidden_size
    found = []
    for index, block in enumerate(stack):
        whole = next((leaf for leaf in ("mlp", "feed_forward", "ffn") if hasattr(block, leaf)), None)
        if whole:
            found.append(Ffn(f"{path}.{index}.{whole}", getattr(block, whole), True, hidden))
        elif hasattr(block, "intermediate") and hasattr(getattr(block, "output", None), "dense"):
            found.append(Ffn(f"{path}.{index}.output", block.output, False, hidden))
        else:
            raise BadInput(
                f"find the FFN of {type(block).__name__}",
                f"its parts are {', '.join(name for name, _ in block.named_children())}",
                "Use a model of the Llama, Qwen, Gemma, Mistral or BERT kind",
            )
    return found
