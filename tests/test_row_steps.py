"""Rows of tables step with their parameter in loops that know nothing of them: as the same numbers do as parameters."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks

from conftest import MODELS, tiny_batch
from trimtab.methods.meft import Meft
from trimtab.methods.parallel_adapter import ParallelAdapter
from world import PLACE, plain


def twins():
    """The same numbers as parameters and as rows: one expert, all pairs, so that nothing is left out."""
    dense, sparse = MODELS["llama"](), MODELS["llama"]()
    theirs = ParallelAdapter(r=16).apply(dense, PLACE)
    ours = Meft(r=16, experts=1, probes=1, k=16, scale=1.0).apply(sparse, PLACE)
    own = ours.own_tensors()
    with torch.no_grad():
        for name, tensor in theirs.own_tensors().items():
            own[name].copy_(tensor.view(1, 16, 64))
    return (dense, theirs), (sparse, ours)


def stock(model, surgery) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = TrainingArguments(
        output_dir="unused", max_steps=5, learning_rate=1e-2, adam_epsilon=1e-6, weight_decay=0.01, max_grad_norm=0,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids})).train()


@pytest.mark.parametrize("loop", [plain, stock])
@pytest.mark.filterwarnings("ignore")
def test_rows_train_in_a_strangers_loop(loop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = None
    for model, surgery in twins():
        start = {name: tensor.detach().clone() for name, tensor in surgery.own_tensors().items()}
        loop(model, surgery)
        after = {name: tensor.detach().clone() for name, tensor in surgery.own_tensors().items()}
        if before is not None:
            for name, tensor in before.items():
                assert torch.allclose(after[name], tensor.view(1, 16, 64), atol=1e-5), name
                assert (after[name] - start[name]).abs().max() > 0.01
        before = after


def test_only_the_optimizer_that_has_their_parameter_steps_rows():
    model = MODELS["llama"]()
    surgery = Meft(r=64, scale=1.0).apply(model, PLACE)
    model(**tiny_batch(model)).loss.backward()
    stand = [adapter.trained for adapter in surgery.adapters.values()]
    other = torch.nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    torch.optim.SGD([other], lr=0.1).step()
    torch.optim.AdamW(stand[1:], lr=0.1).step()
    found = [(store.optimizer.steps, bool(store.pending())) for store in surgery.stores]
    assert found == [(0, True)] * 2 + [(1, False)] * 2


def test_the_way_back_takes_the_hook_away_and_no_hook_holds_a_model():
    hooks = len(_global_optimizer_post_hooks)
    model = MODELS["llama"]()
    surgery = Meft(r=64, scale=1.0).apply(model, PLACE)
    assert len(_global_optimizer_post_hooks) == hooks + 1
    surgery.revert()
    assert len(_global_optimizer_post_hooks) == hooks
    surgery = Meft(r=64, scale=1.0).apply(model, PLACE)
    gone = weakref.ref(model)
    del model, surgery
    gc.collect()
    assert gone() is None
    plain(MODELS["llama"](), None)


def test_a_module_that_is_used_twice_in_one_pass():
    """The rows' gradient is the sum over both uses."""
    grads = []
    for model, surgery in twins():
        own = surgery.own_tensors()
        for name, tensor in own.items():
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) / 8)
        mlp = model.model.layers[0].mlp
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        mlp(mlp(x)).square().sum().backward()
        store = surgery.stores[0] if surgery.stores else None
        mine = [t.grad for name, t in own.items() if "layers.0" in name]
        grads.append(torch.stack(mine) if store is None else store.part("grads", 0).view(16, 2, 64).transpose(0, 1))
    assert grads[0].abs().max() > 0.1
    assert torch.allclose(grads[1], grads[0], atol=1e-5, rtol=1e-4)
