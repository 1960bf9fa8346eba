"""Whether our forms compute what the model itself computes: asked once, at the start of each run, on a small batch.

The loss over a chunked head, the fused norms, FFNs and attention, and packed rows are shortcuts. Each is compared with
the model's own forward: the loss (its own logits and plain cross-entropy, with the router's loss where the library adds
one), the gradient of the embedded tokens, element by element, and the norms of the trained parameters' gradients. What
differs is replaced by what is slower and right, with a note, or refused in a sentence before training starts.

The batch is a few rows of a few tokens, with padding, and with labels that do not count. A probe holds less than a step
of training (one parameter's gradient at a time), and leaves nothing behind: no gradient, no row of a table changed or
counted, the random state and every module's mode as they were (model/undisturbed.py).
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
from ..model.efficient import FORMS
from ..model.head import READ, read_head, router_loss
from ..model.undisturbed import undisturbed
from ..recipe import Recipe
from .arguments import unweighed
from .prepare import lean_forms

ROWS, TOKENS = 2, 16
NAMES = {"norm": "norms", "ffn": "gated FFNs", "attention": "attention", "experts": "stacked experts"}
# of the loss (nats) and, relative to their norm, of gradients; a fault of form is far above both
TOLERANCE = {torch.float32: (1e-4, 2e-3), torch.float16: (2e-2, 0.1), torch.bfloat16: (5e-2, 0.35)}

HALF = 0.05  # tolerances of gradients from which on it is 16 bits that are compared
TIMES = 4.0  # there: between the norms of a parameter's gradient

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """What a pass gave: its loss in nats, the gradients of the embedded tokens, and each parameter's gradient norm."""

    loss: float
    inputs: tuple[Tensor, ...] = ()
    norms: dict[str, float] = dataclasses.field(default_factory=dict)


def batch_of(model: PreTrainedModel, rows: int = ROWS, tokens: int = TOKENS) -> Batch:
    """Ids, attention mask and labels, (rows, tokens): the first row's prompt does not count, the last row is padded."""
    config = model.config.get_text_config()
    words = config.vocab_size
    most = getattr(config, "max_position_embeddings", None)
    tokens = min(tokens, most) if isinstance(most, int) and most > 3 else tokens
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(words // 4, max(words // 2, words // 4 + 1), (rows, tokens), generator=random)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[-1, tokens - tokens // 4 :] = 0
    labels[mask == 0] = -100
    labels[0, : tokens // 4] = -100
    device = model.get_input_embeddings().weight.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def own_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The mean loss of the model's own logits, without any form of ours; shape ()."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    output = model.forward(**inputs, use_cache=False)
    logits = output.logits[:, :-1].flatten(0, 1).float()
    loss = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100)
    balance = router_loss(model, output) if torch.is_grad_enabled() else None
    return loss if balance is None else loss + balance


def read(
    model: PreTrainedModel, loss: Callable[[], Tensor], gradients: bool = True, autocast: torch.dtype | None = None
) -> Reading:
    """Runs `loss` once, and back if `gradients`. Parameters' gradients are measured and dropped one by one."""
    inputs: list[Tensor] = []
    norms: dict[str, float] = {}

    def embedded(module: Any, args: Any, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1].clone()  # some models write into it

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
    """-> how far two readings may be apart by rounding alone: in loss (nats), in gradients (of their norm)."""
    quantised = getattr(model, "is_quantized", False)
    kind = torch.bfloat16 if quantised else autocast or model.dtype
    return TOLERANCE.get(kind, TOLERANCE[torch.bfloat16])


def difference(ours: Reading, own: Reading, within: tuple[float, float]) -> str:
    """What `ours` computes otherwise than `own`, in a few words; "" where they agree."""
    loss, slope = within
    if not abs(ours.loss - own.loss) <= loss * max(1.0, abs(own.loss)):
        return f"its loss is {ours.loss:.4g} instead of {own.loss:.4g}"
    if len(ours.inputs) != len(own.inputs):
        return "it embeds the tokens another number of times"
    far = [_off(a, b, middle=slope >= HALF) for a, b in zip(ours.inputs, own.inputs, strict=True)]
    if not max(far, default=0.0) <= slope:
        return f"the gradient of its inputs is {max(far):.0%} off"
    whole = sum(norm**2 for norm in own.norms.values()) ** 0.5
    for name in own.norms.keys() | ours.norms.keys():
        a, b = ours.norms.get(name, 0.0), own.norms.get(name, 0.0)
        room = 0.02 * whole + 1e-7
        same = b / TIMES - room <= a <= b * TIMES + room if slope >= HALF else abs(a - b) <= slope * (b + room)
        if not same:
            return f"the gradient of {name} has the norm {a:.4g} instead of {b:.4g}"
    return ""


def _off(a_BTH: Tensor, b_BTH: Tensor, middle: bool) -> float:
    """How far a is from b, of b's norm. `middle`: the median over tokens. In 16 bits the first tokens of a row have
    gradients that are rounding alone (SmolLM2's are 117 % off those of fp32, a later token's 7 %); a fault of form
    moves them all."""
    if not middle:
        return float((a_BTH - b_BTH).norm() / (b_BTH.norm() + 1e-7))
    size_BT = b_BTH.norm(dim=-1)
    if not size_BT.any():
        return float(a_BTH.norm())
    return float(((a_BTH - b_BTH).norm(dim=-1)[size_BT > 0] / size_BT[size_BT > 0]).median())


@dataclass(frozen=True)
class Found:
    """The recipe as it can be run, and what a user should know of it."""

    recipe: Recipe
    notes: tuple[str, ...] = ()

    @property
    def objective(self) -> Objective:
        return self.recipe.load_objective()


def probe(
    model: PreTrainedModel, recipe: Recipe, *, gradients: bool = True, autocast: torch.dtype | None = None,
    batch: Batch | None = None,
) -> Found:  # fmt: skip
    """Compares the recipe's loss and fused forms with the model's own forward, on `batch` (default: `batch_of`).

    `model`: patched, with no form of ours in it. What differs is taken out of the recipe that is returned: a fused form
    from `engine.lean`, the chunked head for `whole` logits. BadInput where even those differ. Each process of a
    distributed run must call it; they decide together.
    """
    objective = recipe.load_objective()
    if not hasattr(objective, "whole"):  # its loss is no head's
        return Found(recipe)
    batch, within, name = batch or batch_of(model), tolerance(model, autocast), type(model).__name__

    def apart(recipe: Recipe, own: Reading) -> str:
        how = unweighed(recipe.load_objective())
        with _fused(model, recipe):
            try:
                ours = read(model, lambda: how.loss(model, batch).value, gradients, autocast)
            except TrimtabError:
                raise
            except Exception as error:  # a fused form in a module that it does not fit
                return _agreed(f"it fails ({type(error).__name__}: {' '.join(str(error).split())[:120]})")
        return _agreed(difference(ours, own, within))

    with head_read(model):
        return _compare(recipe, apart, lambda: read(model, lambda: own_loss(model, batch), gradients, autocast), name)


def _compare(recipe: Recipe, apart: Callable[[Recipe, Reading], str], truth: Callable[[], Reading], name: str) -> Found:
    """The recipe without what is `apart` from the model's own loss."""
    with _own_forward(name):
        own = truth()
    if not apart(recipe, own):
        return Found(recipe)
    notes, plain = [], _with_forms(recipe, [])
    if why := apart(plain, own):
        plain = dataclasses.replace(plain, objective=_whole(recipe))
        if still := apart(plain, own):
            raise BadInput(f"the loss of {name}", f"compared with the model's own, {still}", "Use another model")
        notes.append(f"{name}: the chunked head is not used, since {why}; all logits are held at once")
    recipe = dataclasses.replace(recipe, objective=plain.objective)
    kept = []
    for form in _forms(recipe):
        if why := apart(_with_forms(recipe, [*kept, form]), own):
            notes.append(f"{name}: fused {NAMES[form]} are not used, since with them {why}")
        else:
            kept.append(form)
    return Found(_with_forms(recipe, kept), tuple(notes))


@contextlib.contextmanager
def _own_forward(name: str) -> Iterator[None]:
    """BadInput for whatever a model's own forward raises within it."""
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
    """BadInput where patches that change nothing at first did change the loss, which was `before` (`loss_before`)."""
    if not all(surgery.starts_at_zero for surgery in surgeries):
        return
    after, (loss, _) = loss_now(model, autocast), tolerance(model, autocast)
    if _agreed("" if abs(after - before) <= loss * max(1.0, abs(before)) else "it differs"):
        patches = " + ".join(type(surgery.patch).__name__ for surgery in surgeries)
        raise BadInput(
            f"patch {type(model).__name__} with {patches}",
            f"the loss of a test batch should not change at first, but it went from {before:.4g} to {after:.4g}",
            "Use another patch, or other targets",
        )


def loss_now(model: PreTrainedModel, autocast: torch.dtype | None = None) -> float:
    """The model's own loss on a test batch, tables read; nothing is left of the pass."""
    batch = batch_of(model)
    device = batch["input_ids"].device.type
    half = contextlib.nullcontext() if autocast is None else torch.autocast(device, dtype=autocast)
    with _own_forward(type(model).__name__), undisturbed(model, tables=True), half:
        return float(own_loss(model, batch))


# --- the parts of a recipe -------------------------------------------------------------------------------------------


def _forms(recipe: Recipe) -> list[str]:
    chosen = recipe.engine.lean
    return list(FORMS if chosen else ()) if isinstance(chosen, bool) else list(chosen)


def _with_forms(recipe: Recipe, forms: list[str]) -> Recipe:
    return dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, lean=forms))


def _whole(recipe: Recipe) -> dict[str, dict[str, Any]]:
    said = recipe.objective if isinstance(recipe.objective, dict) else {recipe.objective: {}}
    return {name: {**(options or {}), "whole": True} for name, options in said.items()}


@contextlib.contextmanager
def head_read(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model's head is read once, for all losses."""
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
    swaps = lean_forms(model, recipe)
    try:
        yield
    finally:
        swaps.undo()


def _agreed(why: str) -> str:
    """`why`, or that another process found a difference: all go on in the same way."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return why
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    found = torch.tensor(float(bool(why)), device=device)
    torch.distributed.all_reduce(found)
    return why or ("another process found a difference" if found else "")
