"""What many test modules use: the patches' cases, short training loops, and comparisons of models and of tensors."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from conftest import tiny_batch
from trimtab import methods
from trimtab.contracts import Place
from trimtab.cost import rates
from trimtab.cost.rates import Rates
from trimtab.tiered.store import GRADS, TieredStore
from trimtab.training import progress

# name -> fields that suit a hidden size of 64
CASES = {
    "paca": {"r": 4},
    "lora": {"r": 4},
    "edora": {"r": 4},
    "parallel_adapter": {"r": 16},
    "meft": {"r": 64, "k": 16, "scale": 1.0},
    "senszoq": {"density": 0.02},
    "diff_pruning": {"density": 0.02, "candidates": 0.1},
    "lst": {"r": 2},
    "full": {},
}
PLACE = Place(fast="cpu")
STORED = {  # tables elsewhere than in a file, and other routers: name -> patch, more fields, place
    "meft in ram": ("meft", {}, Place(fast="cpu", slow="ram")),
    "meft with hot rows": ("meft", {"cache": 2e-5}, PLACE),
    "meft switch": ("meft", {"router": "switch", "probes": 1}, PLACE),
    "meft stable": ("meft", {"router": "stable"}, PLACE),
}
FORMS = {  # what a patch's fields make another method of: as in STORED
    "lora with fa": ("lora", {"fa": True}, PLACE),
    "lora with velora": ("lora", {"velora": True, "velora_groups": 8}, PLACE),
}
EVERY = {name: (name, {}, PLACE) for name in CASES} | STORED | FORMS
LEARNING_RATE = 2e-2


def make(name: str, **fields):
    """The patch of a case in EVERY."""
    patch, more, _ = EVERY[name]
    return methods.find(patch)(**{**CASES[patch], **more, **fields})


# --- models -----------------------------------------------------------------------------------------------------------


def named(case: tuple[str, dict], **more):
    """The patch of a case (the table's name, fields)."""
    patch, fields = case
    return methods.find(patch)(**{**fields, **more})


def calibrated(patch, model: nn.Module):
    """The surgery of `patch`, applied and calibrated."""
    surgery = patch.apply(model, PLACE)
    if surgery.patch.calibration_rows:
        surgery.calibrate([tiny_batch(model, seed=seed) for seed in (1, 2)])
    return surgery


def snapshot(model: nn.Module) -> dict:
    """All that a revert must bring back."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
             "_load_state_dict_pre_hooks", "_state_dict_pre_hooks")  # fmt: skip
    return {
        "text": str(model),
        "modules": [(name, id(module), sorted(vars(module))) for name, module in model.named_modules()],
        "hooks": sum(len(getattr(module, kind)) for module in model.modules() for kind in hooks),
        "flags": [(name, p.requires_grad, id(p)) for name, p in model.named_parameters(remove_duplicate=False)],
    }


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, dtypes and order included."""
    return list(left) == list(right) and all(
        a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
        for a, b in zip((t.contiguous() for t in left.values()), (t.contiguous() for t in right.values()), strict=True)
    )


def train(model: nn.Module, surgery, steps: int, rate: float = LEARNING_RATE, eps: float = 1e-8) -> list[float]:
    batch = {key: tensor.to(model.device) for key, tensor in tiny_batch(model).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01, eps=eps)
    losses = []
    surgery.begin(steps)
    for step in range(steps):
        surgery.before_step(step)
        loss = model(**batch).loss
        optimizer.zero_grad()
        penalty = surgery.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        surgery.after_step(step, optimizer)
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module, surgery, batch) -> dict[str, torch.Tensor]:
    """By name: of the parameters, and of the rows of stores."""
    model.zero_grad()
    model(**batch).loss.backward()
    found = {k: t.grad.clone() for k, t in surgery.own_tensors().items() if t.requires_grad and t.grad is not None}
    for store in surgery.stores:
        found[store.name] = torch.zeros(store.whole().shape)
        for row in store.pending():
            found[store.name][row] = store.part(GRADS, row)
        store.stepped()
    return found


def plain(model, surgery) -> None:
    """Six steps of two micro-batches, as a loop that knows nothing of patches does them; the third is skipped."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, eps=1e-6, weight_decay=0.01)
    for step in range(6):
        for micro in range(2):
            model(**tiny_batch(model, seed=10 * step + micro)).loss.backward()
        if step == 2:
            optimizer.zero_grad()  # gradients that no step uses
            continue
        optimizer.step()
        optimizer.zero_grad()


@contextlib.contextmanager
def at_step(step: int, action):
    """Within it, each run does `action()` at the end of step `step`, before it is logged or saved."""
    made = progress.StopOnInterrupt.on_step_end

    def hooked(self, args, state, control, **kwargs):
        if state.global_step == step:
            action()
        return made(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(progress.StopOnInterrupt, "on_step_end", hooked)
        yield


# --- stores and rates -------------------------------------------------------------------------------------------------

SHAPE = (3, 10)  # of one row of `store`


def store(rows: int = 12, slots: int = 0, **fields) -> TieredStore:
    one = TieredStore("one", 1, SHAPE, **{key: value for key, value in fields.items() if key == "moments"})
    made = TieredStore("table", rows, SHAPE, cache_bytes=slots * one.record_bytes, **fields)
    made.whole().normal_(generator=torch.Generator().manual_seed(0))
    return made


MACHINE = rates.key({"cpu": "a processor", "cores": 2, "threads": 2, "allocator": "system"}, "2.13.0", "cpu")


def flat(**more) -> Rates:
    """1 GFLOP/s in fp32 and 2 in bf16, 1 GB/s, 10 million random numbers/s; a microsecond for each operation."""
    products = {"float32": [1e9, 1e9], "bfloat16": [2e9, 2e9]}
    return Rates(
        **{"machine": MACHINE, "products": products, "attention": {"float32": 1e9}, "bandwidth": 1e9, "random": 1e7,
           "update": 7e8, "overhead": 1e-6, **more}
    )  # fmt: skip
