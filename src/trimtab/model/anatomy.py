"""Finds the blocks, FFNs and linears of a model; the only file that depends on transformers' attribute names.

No model is recognised by its name. Parts are found by their structure (the longest list of equal blocks, a linear
inside a block) and by the few leaf names that families share (q_proj, query, gate_proj, intermediate).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import BadInput
from ..foreign import AnyConvolution
from ..memory.budget import gib
from .surgery import is_patch

# Leaf names of linears that read the same input tensor, family by family.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q", "k", "v"),
                 ("w1", "w3"))  # fmt: skip


# Paths of modules beside a text model: encoders of images and sound, a patcher of bytes.
BESIDE_TEXT = re.compile(r"vision|visual|image|audio|patcher")
# Leaf names of a block's whole FFN; if a block has two, the first name counts.
FFNS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "mlp_block", "shared_mlp")
NO_FFN = "Use a model of the Llama, Qwen, Gemma, Mistral or BERT family, or train its linears (lora, paca)"


def is_linear(module: nn.Module | None) -> bool:
    """True for nn.Linear, its quantised forms, and GPT-2's Conv1D, a linear with transposed weight.

    False for a subclass whose forward computes something else (a router that returns its choice, a grouped linear).
    """
    if isinstance(module, nn.Linear):
        return type(module).__module__.startswith("bitsandbytes") or _multiplies(type(module))
    return isinstance(module, Conv1D)


@functools.cache
def _multiplies(kind: type[nn.Linear]) -> bool:
    """Whether the class's forward computes x W^T + b, tested with a toy weight and bias."""
    if kind.forward is nn.Linear.forward:
        return True
    toy = nn.Linear(3, 2, device="meta")
    toy.weight, toy.bias = nn.Parameter(torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 9.0]])), nn.Parameter(torch.ones(2))
    x = torch.tensor([[[2.0, 7.0, 1.0]]])
    try:
        with torch.no_grad():
            return torch.allclose(kind.forward(toy, x), F.linear(x, toy.weight, toy.bias))
    except Exception:  # its forward needs other parts too
        return False


def dense_view(linear: nn.Module) -> Tensor:
    """The weight of an unquantised linear, (out, in): the parameter itself, or a view of it."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight  # type: ignore[operator, return-value]


def widths(linear: nn.Module) -> tuple[int, int]:
    """-> (in, out)."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features  # type: ignore[return-value]


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head: token ids -> hidden states (batch, tokens, hidden)."""
    return model.base_model


def fresh_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Name -> parameter of a classifier's head: the parameters outside the pretrained backbone."""
    inside = {id(parameter) for parameter in backbone(model).parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in inside}


def blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """-> (path, stack of transformer blocks): the longest ModuleList of the text model that is not inside another."""
    named = dict(model.named_modules())
    text = model.get_decoder() if hasattr(model, "get_decoder") else model
    path = next((name for name, module in named.items() if module is text and module is not model), "")
    lists = {name: m for name, m in named.items() if isinstance(m, nn.ModuleList) and len(m)}
    found = {name: m for name, m in lists.items() if name.startswith(f"{path}.")} if path else lists
    found = {name: m for name, m in found.items() if not BESIDE_TEXT.search(name)} or found or lists
    found = {name: m for name, m in found.items() if not name.startswith(tuple(f"{outer}." for outer in found))}
    if not found:
        raise BadInput(f"patch {type(model).__name__}", "it has no list of blocks", "Use a transformer model")
    return max(found.items(), key=lambda item: len(item[1]))


def target_linears(model: PreTrainedModel, targets: str) -> dict[str, nn.Module]:
    """Path -> linear for each linear inside the blocks that matches `targets` (not the head or the pooler)."""
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
            'Use "all-linear", or name some of these',
        )
    if taken := [name for name in chosen if name in patched]:
        raise BadInput(
            f'targets: "{targets}"',
            f"{len(taken)} of these linears are patched already, {taken[0]} among them",
            "Give each patch its own linears",
        )
    return {name: inside[name] for name in chosen}


def _chosen(names: list[str], targets: str) -> list[str]:
    """The `names` that match: by their endings, or by regex if no ending matches."""
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


def stacked_experts(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Path -> parameter, for each tensor in the blocks with the weights of several experts."""
    prefix, found = blocks(model)[0] + ".", {}
    for path, module in model.named_modules():
        if path.startswith(prefix) and not isinstance(module, AnyConvolution) and not is_linear(module):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 or (parameter.dim() == 2 and ".experts." in f"{path}."):
                    found[f"{path}.{leaf}"] = parameter
    return found


def unreached(model: PreTrainedModel, targets: str) -> tuple[str, ...]:
    """A note on the weights that "all-linear" does not include, if there are any."""
    experts = stacked_experts(model).values() if targets == "all-linear" else ()
    if not experts:
        return ()
    size = gib(sum(parameter.nbytes for parameter in experts))
    return (f"{len(experts)} stacked expert tensors ({size}) are not linears: all-linear does not include them",)


def tied(model: nn.Module, linears: list[nn.Module]) -> tuple[str, str] | None:
    """-> two paths of one weight, if one of `linears` shares its weight with another module; else None."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first != name and any(linear.weight is parameter for linear in linears):
            return name, first
    return None


def shared_input_groups(names: list[str]) -> list[list[str]]:
    """Groups of paths of linears that read the same tensor (q/k/v, gate/up); each path is in one group."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        family = next((group[0] for group in SHARED_INPUTS if leaf in group), leaf)
        groups.setdefault((parent, family), []).append(name)
    return list(groups.values())


@dataclass(frozen=True)
class Ffn:
    """One block's feed-forward network, to which a companion network can be added."""

    name: str
    host: nn.Module  # gets the companion as a child: the FFN, or the block (or BERT's `output`) if that is not possible
    module: nn.Module  # gets the hooks: the FFN, BERT's `output` that adds its own input, or the block
    kind: str  # "whole"; "bert"; "pair": two linears of the block, fc1 and fc2
    width: int  # in and out
    reader: nn.Module  # the module that reads the input (BERT: `intermediate`)

    def beside(self, add: Callable[[Tensor, Tensor], Tensor]) -> Any:
        """Replaces y with `add(h, y)`, where h (..., width) is the FFN's input. Returns a handle with `remove`.

        y is the output of a whole FFN or of the second of a pair of linears, or the residual of a BERT-type block. The
        hooks keep no tensor after the forward pass, and follow linears that other patches replace.
        """
        if self.kind == "whole":

            def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
                h = args[0] if args else next(iter(kwargs.values()))
                y, *rest = output if isinstance(output, tuple) else (output,)
                y = add(h.reshape(y.shape), y)  # some FFNs flatten the tokens
                return (y, *rest) if isinstance(output, tuple) else y

            return self.module.register_forward_hook(after, with_kwargs=True)
        if self.kind == "pair":
            return _Pair(self.module, add)

        return _Residual(self.module, self.reader, add)


class _Residual:
    """Hooks on a BERT-type block: h is the input of `intermediate`, y the residual that `output` adds to."""

    def __init__(self, output: nn.Module, intermediate: nn.Module, add: Callable[[Tensor, Tensor], Tensor]):
        self.add, self.read = add, []  # type: ignore[var-annotated]
        self.handles = [
            intermediate.register_forward_pre_hook(self._reads),
            output.register_forward_pre_hook(self._adds),
        ]

    def _reads(self, module: nn.Module, args: tuple) -> None:
        self.read[:] = args[:1]

    def _adds(self, module: nn.Module, args: tuple) -> tuple:
        inner, y, *rest = args
        return inner, self.add(self.read.pop(), y), *rest

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class _Pair:
    """Hooks on a block's current fc1 and fc2, checked before each pass by a hook on its first submodule.

    Hooks on the block would not run when activation checkpointing recomputes its forward.
    """

    def __init__(self, block: nn.Module, add: Callable[[Tensor, Tensor], Tensor]):
        self.block, self.add, self.read = block, add, []  # type: ignore[var-annotated]
        self.hooked: tuple[nn.Module, ...] = ()
        self.inner: list[Any] = []
        first = next(child for child in block.children() if not is_linear(child))
        self.outer = first.register_forward_pre_hook(self._follow)

    def _follow(self, *_: Any) -> None:
        self.read.clear()
        if self.hooked == (there := (self.block.fc1, self.block.fc2)):
            return
        self._remove_inner()
        self.inner = [
            there[0].register_forward_pre_hook(lambda module, args: self.read.append(args[0])),
            there[1].register_forward_hook(lambda module, args, y: self.add(self.read.pop().view(y.shape), y)),
        ]
        self.hooked = there

    def _remove_inner(self) -> None:
        for handle in self.inner:
            handle.remove()
        self.inner, self.hooked = [], ()

    def remove(self) -> None:
        self._remove_inner()
        self.outer.remove()


def ffns(model: PreTrainedModel) -> list[Ffn]:
    """Each block's FFN: one module, `intermediate` and `output` (BERT), or fc1 and fc2 (OPT)."""
    path, stack = blocks(model)
    hidden = model.config.get_text_config().hidden_size
    found = []
    for index, block in enumerate(stack):
        whole = next((leaf for leaf in FFNS if isinstance(getattr(block, leaf, None), nn.Module)), None)
        if whole:
            module = getattr(block, whole)
            host = block if isinstance(module, nn.Sequential) else module  # a Sequential would run an added child
            found.append(Ffn(f"{path}.{index}.{whole}", host, module, "whole", _width(module, hidden), module))
        elif hasattr(block, "intermediate") and hasattr(getattr(block, "output", None), "dense"):
            found.append(Ffn(f"{path}.{index}.output", block.output, block.output, "bert", hidden, block.intermediate))
        elif hasattr(block, "fc1") and hasattr(block, "fc2"):
            found.append(Ffn(f"{path}.{index}.fc2", block, block, "pair", hidden, block))
        else:
            have = f"none of its parts is a known FFN: {', '.join(name for name, _ in block.named_children())}"
            raise BadInput(f"find the FFN of {type(block).__name__}", have, NO_FFN)
    return found


def _width(ffn: nn.Module, hidden: int) -> int:
    """The input width of an FFN: the model's hidden size, unless none of its linears reads that."""
    read = [widths(module)[0] for module in ffn.modules() if is_linear(module)]
    return hidden if hidden in read or not read else read[0]
