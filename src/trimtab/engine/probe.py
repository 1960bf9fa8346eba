"""Compares trimtab's loss and fused operations with the model's own forward, at the start of each run.

The chunked loss, fused operations and packed rows are shortcuts. On a small batch, three things must agree with the
model's own forward: the loss (its own logits and plain cross-entropy, with the router's loss if there is one), the
gradient of the embedded tokens, element by element, and the norms of the trained parameters' gradients. A shortcut that
differs is replaced by the slower, exact form, with a note; if even that differs, the run is refused.

The batch has a few rows of a few tokens, with padding and ignored labels. A probe uses less memory than a training step
(one parameter's gradient at a time). It leaves no gradients, changes and counts no rows of tables, and restores the
random state and every module's mode (model/undisturbed.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..contracts import Objective, Surgery
from ..errors import BadInput, TrimtabError
from ..model.fused_ops import FUSED_OPS
from ..model.head import READ, read_head, router_loss
from ..model.kept_rows import among_kept
from ..model.undisturbed import undisturbed
from ..recipe import Recipe
from .prepare import apply_fused_ops

ROWS, TOKENS = 2, 16
NAMES = {"norm": "norms", "ffn": "gated FFNs", "attention": "attention", "experts": "stacked experts"}
# of the loss (nats) and of gradients (relative to their norm); a wrong form exceeds both by far
TOLERANCE = {torch.float32: (1e-4, 2e-3), torch.float16: (2e-2, 0.1), torch.bfloat16: (5e-2, 0.35)}

HALF = 0.05  # a gradient tolerance of at least this means 16-bit computation
TIMES = 4.0  # largest ratio between the norms of a parameter's gradient in 16 bits

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """Result of a pass: loss (nats), gradients of the embedded tokens (B, T, H), each parameter's gradient norm."""

    loss: float
    inputs: tuple[Tensor, ...] = ()
    norms: dict[str, float] = dataclasses.field(default_factory=dict)


def batch_of(model: PreTrainedModel, rows: int = ROWS, tokens: int = TOKENS) -> Batch:
    """Ids, attention mask and labels, (rows, tokens); the first row starts with ignored labels, the last is padded."""
    config = model.config.get_text_config()
    words = config.vocab_size
    most = getattr(config, "max_position_embeddings", None)
    tokens = min(tokens, most) if isinstance(most, int) and most > 3 else tokens
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(words // 4, max(words // 2, words // 4 + 1), (rows, tokens), generator=random)
    ids = among_kept(model, ids)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[-1, tokens - tokens // 4 :] = 0
    labels[mask == 0] = -100
    labels[0, : tokens // 4] = -100
    device = model.get_input_embeddings().weight.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def own_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The mean loss of the logits from the model's own forward; shape ()."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    output = model.forward(**inputs, use_cache=False)
    logits = output.logits[:, :-1].flatten(0, 1).float()
    loss = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100)
    balance = router_loss(model, output) if torch.is_grad_enabled() else None
    return loss if balance is None else loss + balance


def read(
    model: PreTrainedModel, loss: Callable[[], Tensor], gradients: bool = True, autocast: torch.dtype | None = None
) -> Reading:
    """Runs `loss` once, with a backward pass if `gradients`. Measures and drops parameter gradients one by one."""
    inputs: list[Tensor] = []
    norms: dict[str, float] = {}

    def embedded(module: Any, args: Any, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1].clone()  # some models modify it in place

    def measured(name: str, parameter: Tensor) -> None:
        norms[name] = float(torch.linalg.vector_norm(parameter.grad.float()))  # type: ignore[union-attr]
        parameter.grad = None

    device = model.get_input_embeddings().weight.device.type
    half = contextlib.nullcontext() if autocast is None else torch.autocast(device, dtype=autocast)
    with undisturbed(model), contextlib.ExitStack() as stack:
        if not gradients:
            with torch.no_grad(), half:
                return Reading(float(loss()))
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
        stack.callback(model.get_input_embeddings().register_forward_hook(embedded).remove)
        for name, parameter in trained.items():
            hook = lambda p, name=name: measured(name, p)  # noqa: E731
            stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        with torch.enable_grad():
            with half:
                value = loss()
            value.backward(inputs=[*inputs, *trained.values()])
        found = tuple(torch.zeros_like(x) if x.grad is None else x.grad.float() for x in inputs)
        return Reading(float(value.detach()), found, norms)


def tolerance(model: PreTrainedModel, autocast: torch.dtype | None = None) -> tuple[float, float]:
    """-> the differences that rounding alone explains: of the loss (nats), of gradients (relative to their norm)."""
    quantised = getattr(model, "is_quantized", False)
    kind = torch.bfloat16 if quantised else autocast or model.dtype
    return TOLERANCE.get(kind, TOLERANCE[torch.bfloat16])


def difference(ours: Reading, own: Reading, within: tuple[float, float]) -> str:
    """How `ours` differs from `own`, in a few words; "" if they agree."""
    loss, slope = within
    if not abs(ours.loss - own.loss) <= loss * max(1.0, abs(own.loss)):
        return f"its loss is {ours.loss:.4g} instead of {own.loss:.4g}"
    if len(ours.inputs) != len(own.inputs):
        return f"it embeds the tokens {len(ours.inputs)} times instead of {len(own.inputs)}"
    errors = [_relative_error(a, b, median=slope >= HALF) for a, b in zip(ours.inputs, own.inputs, strict=True)]
    if not max(errors, default=0.0) <= slope:
        return f"the gradient of its inputs is {max(errors):.0%} off"
    whole = sum(norm**2 for norm in own.norms.values()) ** 0.5
    for name in own.norms.keys() | ours.norms.keys():
        a, b = ours.norms.get(name, 0.0), own.norms.get(name, 0.0)
        slack = 0.02 * whole + 1e-7
        same = b / TIMES - slack <= a <= b * TIMES + slack if slope >= HALF else abs(a - b) <= slope * (b + slack)
        if not same:
            return f"the gradient of {name} has the norm {a:.4g} instead of {b:.4g}"
    return ""


def _relative_error(a_BTH: Tensor, b_BTH: Tensor, median: bool) -> float:
    """|a - b| / |b|; `median`: its median over tokens. In 16 bits, gradients of the first tokens of a row are mostly
    rounding (SmolLM2's are 117 % off those of fp32, a later token's 7 %); a wrong form changes all of them."""
    if not median:
        return float((a_BTH - b_BTH).norm() / (b_BTH.norm() + 1e-7))
    size_BT = b_BTH.norm(dim=-1)
    if not size_BT.any():
        return float(a_BTH.norm())
    return float(((a_BTH - b_BTH).norm(dim=-1)[size_BT > 0] / size_BT[size_BT > 0]).median())


@dataclass(frozen=True)
class Found:
    """The recipe without the shortcuts that failed, and notes on them for the user."""

    recipe: Recipe
    notes: tuple[str, ...] = ()

    @property
    def objective(self) -> Objective:
        return self.recipe.load_objective()


def probe(
    model: PreTrainedModel, recipe: Recipe, *, gradients: bool = True, autocast: torch.dtype | None = None,
    batch: Batch | None = None,
) -> Found:  # fmt: skip
    """Compares the recipe's loss and fused operations with the model's own forward, on `batch` (default: `batch_of`).

    `model`: patched, without fused operations. The returned recipe omits what differs: operations from
    `engine.fused_ops`, and the chunked head in favour of `whole` logits. BadInput if those differ too. Each process of
    a distributed run must call it; they decide together.
    """
    objective = recipe.load_objective()
    if not hasattr(objective, "whole"):  # the loss is not that of a language-model head
        return Found(recipe)
    batch, within, name = batch or batch_of(model), tolerance(model, autocast), type(model).__name__

    with head_read(model):
        with _own_forward(name):
            own = read(model, lambda: own_loss(model, batch), gradients, autocast)

        def mismatch(recipe: Recipe) -> str:
            how = recipe.load_objective().cross_entropy()
            with _fused(model, recipe):
                try:
                    ours = read(model, lambda: how.loss(model, batch).value, gradients, autocast)
                except TrimtabError:
                    raise
                except Exception as error:  # a fused operation in a module that it does not fit
                    return _agreed(f"it fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})")
            return _agreed(difference(ours, own, within))

        return _without_mismatches(recipe, mismatch, name)


def _without_mismatches(recipe: Recipe, mismatch: Callable[[Recipe], str], name: str) -> Found:
    """The recipe without what makes `mismatch` return a difference."""
    if not mismatch(recipe):
        return Found(recipe)
    notes, plain = [], _with_fused_ops(recipe, [])
    if why := mismatch(plain):
        plain = dataclasses.replace(plain, objective=_whole(recipe))
        if still := mismatch(plain):
            raise BadInput(f"the loss of {name}", f"compared with the model's own, {still}", "Use another model")
        notes.append(f"{name}: the chunked head is not used, since {why}; all logits are in memory at once")
    recipe = dataclasses.replace(recipe, objective=plain.objective)
    kept: list[str] = []
    for op in _fused_ops(recipe):
        if why := mismatch(_with_fused_ops(recipe, [*kept, op])):
            notes.append(f"{name}: fused {NAMES[op]} are not used, since with them {why}")
        else:
            kept.append(op)
    return Found(_with_fused_ops(recipe, kept), tuple(notes))


@contextlib.contextmanager
def _own_forward(name: str) -> Iterator[None]:
    """Within it, any exception of the model's own forward becomes BadInput."""
    try:
        yield
    except TrimtabError:
        raise
    except Exception as error:
        why = f"its own forward fails on a small batch ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        raise BadInput(f"the loss of {name}", why, "Use another model, or another precision") from error


def require_unchanged(
    model: PreTrainedModel, before: float, surgeries: list[Surgery], autocast: torch.dtype | None = None
) -> None:
    """BadInput if patches that should not change the model before training changed its loss (`before`, `loss_now`)."""
    after, (loss, _) = loss_now(model, autocast), tolerance(model, autocast)
    if _agreed("" if abs(after - before) <= loss * max(1.0, abs(before)) else "it differs"):
        patches = " + ".join(type(surgery.patch).__name__ for surgery in surgeries if surgery.starts_at_zero)
        raise BadInput(
            f"patch {type(model).__name__} with {patches}",
            f"the loss of a test batch should not change before training, but went from {before:.4g} to {after:.4g}",
            "Use another patch, or other targets",
        )


def loss_now(model: PreTrainedModel, autocast: torch.dtype | None = None) -> float:
    """The model's own loss on a test batch, with rows of tables; the pass leaves no trace."""
    batch = batch_of(model)
    device = batch["input_ids"].device.type
    half = contextlib.nullcontext() if autocast is None else torch.autocast(device, dtype=autocast)
    with _own_forward(type(model).__name__), undisturbed(model, tables=True), half:
        return float(own_loss(model, batch))


# --- the parts of a recipe -------------------------------------------------------------------------------------------


def _fused_ops(recipe: Recipe) -> list[str]:
    chosen = recipe.engine.fused_ops
    return list(FUSED_OPS if chosen else ()) if isinstance(chosen, bool) else list(chosen)


def _with_fused_ops(recipe: Recipe, ops: list[str]) -> Recipe:
    return dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, fused_ops=ops))


def _whole(recipe: Recipe) -> dict[str, dict[str, Any]]:
    chosen = recipe.objective if isinstance(recipe.objective, dict) else {recipe.objective: {}}
    return {name: {**(options or {}), "whole": True} for name, options in chosen.items()}


@contextlib.contextmanager
def head_read(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the model's head is read once for all losses."""
    if hasattr(model, READ):
        yield
        return
    setattr(model, READ, read_head(model))
    try:
        yield
    finally:
        delattr(model, READ)


@contextlib.contextmanager
def _fused(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    swaps = apply_fused_ops(model, recipe)
    try:
        yield
    finally:
        swaps.undo()


def _agreed(why: str) -> str:
    """`why`, or a note that another process found a difference, so that all processes decide alike."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return why
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    found = torch.tensor(float(bool(why)), device=device)
    torch.distributed.all_reduce(found)
    return why or ("another process found a difference" if found else "")
