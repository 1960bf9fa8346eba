"""`make cuda-check`: each method on a GPU against the CPU, the store's copies, plans against what the GPU held.

It needs no network and no file: models are made on the spot. Without a GPU the same checks run with the CPU in the
GPU's place, which checks the checks. Under eight minutes on one GPU.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import trimtab
from conftest import MIXTURES, MODELS, tiny_batch
from helpers_kv import CASES as CACHES
from helpers_load import tiny_llama
from helpers_run import POLICIES, make_world, prompts, tree
from trimtab import methods
from trimtab.contracts import Place
from trimtab.model.kv_cache import attending
from trimtab.tiered.prefetch import Reader
from trimtab.tiered.record import GRADS, VALUES
from trimtab.tiered.store import TieredStore
from world import CASES, LEARNING_RATE, train

GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda) if GPU else "cpu"]),
    pytest.mark.filterwarnings("ignore"),
]
SINCE = (5, 23)  # of transformers, for whole runs; on older ones only patches and stores are checked
whole_runs = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < SINCE, reason="a run needs transformers 5.23"
)
CLOSE = {"atol": 2e-4, "rtol": 2e-3}  # fp32, sums in another order


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32, so that a GPU's fp32 is fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on(device: str, batch: dict) -> dict:
    return {key: tensor.to(device) for key, tensor in batch.items()}


def steps(device: str, name: str, place: Place, count: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of `count` steps of a method on a tiny Llama, and its own tensors after them, on the CPU."""
    model = MODELS["llama"]().to(device)
    surgery = methods.find(name)(**CASES[name]).apply(model, place)
    if surgery.patch.calibration_rows:
        surgery.calibrate([on(device, tiny_batch(model, seed=seed)) for seed in (1, 2)])
    losses = train(model, surgery, count, LEARNING_RATE / 10, eps=1e-4)
    return losses, {key: tensor.detach().cpu().clone() for key, tensor in surgery.own_tensors().items()}


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_cpus(name, device):
    here, there = steps("cpu", name, Place(fast="cpu")), steps(device, name, Place(fast=device, slow="ram"))
    assert here[0] == pytest.approx(there[0], abs=1e-3) and here[0][-1] < here[0][0]
    assert here[1].keys() == there[1].keys()
    floating = [key for key, tensor in here[1].items() if tensor.is_floating_point()]
    far = [key for key in floating if not torch.allclose(here[1][key].float(), there[1][key].float(), **CLOSE)]
    assert not far


@whole_runs
@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["paca", "lora", "meft"])
def test_a_quantised_base_is_trained(name, precision, device, tmp_path):
    keys = tree(make_world(tmp_path), tmp_path / "run", {name: CASES[name]}, max_steps=12, logging_steps=1)
    made = {**keys, "model": {"name": keys["model"], "precision": precision}, "place": {"fast": device}}
    trimtab.Recipe.from_dict(made).train(quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_arrive_whole_while_others_are_written(ahead, device):
    """Rows are copied to the GPU on a stream of its own, and gradients back: each fetch must see the newest values."""
    reader = Reader() if ahead else None
    fast = torch.device(device)
    store = TieredStore("rows", 64, (4, 256), slow="ram", device=fast, reader=reader)
    table, random = store.whole(), torch.Generator().manual_seed(0)
    table.copy_(torch.randn(table.shape, generator=random))
    if device == "cuda":
        assert table.is_pinned()
    busy = torch.randn(1024, 1024, device=fast)
    for turn in range(50):
        chosen = torch.randperm(64, generator=random)[:24].tolist()
        if reader is not None and store.wants_prefetch:
            store.prefetch(chosen)
        busy = (busy @ busy).div_(busy.norm())  # so that copies queue up behind work
        rows = store.fetch(chosen, (VALUES, GRADS))
        held = torch.stack(list(rows)).sum((1, 2)).cpu()
        assert torch.allclose(held, store.whole()[chosen].sum((1, 2)), atol=1e-3), turn
        grads = torch.full((24, 4, 256), float(turn + 1), device=fast)
        store.accumulate(chosen, grads)
        grads.fill_(-1.0)  # the store must not read it later
        for row in store.pending():
            assert (store.part(GRADS, row) == turn + 1).all()
        store.forget()
        table[chosen] = torch.randn(24, 4, 256, generator=random)
        store.rewritten()
    if reader is not None:
        reader.close()
    store.drop()


@pytest.mark.parametrize("retrieval", ["fast", "slow"])
@pytest.mark.parametrize("cache", [0.0, 1.0])
def test_meft_steps_with_rows_in_pinned_memory(retrieval, cache, device):
    patch = methods.find("meft")(r=64, k=16, scale=1.0, retrieval=retrieval, cache=cache)
    ends = []
    for where in ("cpu", device):
        model = MODELS["llama"]().to(where)
        surgery = patch.apply(model, Place(fast=where, slow="ram"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)
        for seed in range(4):
            model(**on(where, tiny_batch(model, seed=seed))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append({key: tensor.detach().cpu().clone() for key, tensor in surgery.own_tensors().items()})
    assert all(torch.allclose(ends[0][key], ends[1][key], **CLOSE) for key in ends[0])


@pytest.mark.parametrize("name", CACHES)
def test_replies_within_a_bounded_cache_equal_the_cpus(name, device):
    replies = []
    for where in ("cpu", device):
        model = MODELS["llama"]().to(where)
        surgery = methods.find(name)(**CACHES[name]).apply(model, Place(fast=where))
        ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(4)).to(where)
        mask, cache = torch.ones_like(ids), surgery.cache()
        with torch.no_grad(), attending(model, cache, mask):
            out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False)
        replies.append(out.cpu())
    assert torch.equal(*replies)


@whole_runs  # older ones have another interface of experts
@pytest.mark.parametrize("cache", [0.0, 1e-4, 1.0])
def test_experts_in_slow_memory_compute_the_same(cache, device):
    """Fiddler chooses for each expert whether its weights go to the GPU or its tokens to the host."""
    outputs = []
    for where in ("cpu", device):
        model = MIXTURES["mixtral"]().to(where)
        model.set_experts_implementation("eager")
        batch = on(where, tiny_batch(model))
        if where == device:
            methods.find("fiddler")(cache=cache).apply(model, Place(fast=where, slow="ram"))
        with torch.no_grad():
            outputs.append(model(**batch).logits.cpu())
    assert torch.allclose(*outputs, **CLOSE)


@whole_runs
def test_mezo_steps(device, tmp_path):
    """Directions come from the device's own generator; the loss before the first step does not depend on them."""
    first = []
    for at, where in (("here", "cpu"), ("there", device)):
        keys = tree(make_world(tmp_path / at), tmp_path / at / "run", {"full": {}}, max_steps=3, logging_steps=1)
        made = {**keys, "stepper": "mezo", "place": {"fast": where},
                "training": {**keys["training"], "learning_rate": 1e-4}}  # fmt: skip
        assert trimtab.Recipe.from_dict(made).train(quiet=True)["steps"] == 3
        lines = (tmp_path / at / "run/metrics.jsonl").read_text().splitlines()
        first.append(next(line["loss"] for line in map(json.loads, lines) if "loss" in line))
    assert first[0] == pytest.approx(first[1], abs=0.05)


@whole_runs
@pytest.mark.parametrize("objective", POLICIES.values(), ids=POLICIES)
def test_rewards_train(objective, device, tmp_path):
    keys = prompts(make_world(tmp_path), tmp_path / "run", {"lora": {"r": 4}}, objective, max_steps=2)
    assert trimtab.Recipe.from_dict({**keys, "place": {"fast": device}}).train(quiet=True)["steps"] == 2


@whole_runs
@pytest.mark.parametrize("name", ["lora", "paca", "meft", "full"])
def test_a_plan_covers_what_the_gpu_allocated(name, device, tmp_path):
    """On a GPU with a Llama large enough that its own tensors decide, of 25 million parameters."""
    world = make_world(tmp_path)
    wide = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
    folder = tiny_llama(tmp_path / "wide", **(wide if device == "cuda" else {}))
    fields = {"lora": {"r": 8}, "paca": {"r": 8}, "meft": {"r": 1024}, "full": {}}[name]
    keys = tree(world, tmp_path / "run", {name: fields}, max_steps=4, per_device_train_batch_size=8)
    recipe = trimtab.Recipe.from_dict({**keys, "model": str(folder), "place": {"fast": device}})
    planned = recipe.plan()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    recipe.train(quiet=True)
    if device == "cuda":
        held = torch.cuda.max_memory_allocated() - before
        assert 0.7 * held <= planned.fast_peak_bytes <= 1.5 * held + 2**26


@whole_runs
def test_a_run_is_resumed_evaluated_and_exported(device, tmp_path):
    world = make_world(tmp_path)
    for name, patch in {"lora": {"lora": {"r": 4}}, "meft": {"meft": {"r": 64, "k": 16}}}.items():
        keys = {**tree(world, tmp_path / name, patch, max_steps=2, save_strategy="steps", save_steps=2),
                "place": {"fast": device}}  # fmt: skip
        trimtab.Recipe.from_dict(keys).train(quiet=True)
        keys = {**keys, "training": {**keys["training"], "max_steps": 4}, "resume": True}
        assert trimtab.Recipe.from_dict(keys).train(quiet=True)["steps"] == 4
        tested = {**keys, "data": {**keys["data"], "test": keys["data"]["train"]}}
        assert trimtab.Recipe.from_dict(tested).evaluate()["metrics"]["perplexity"] > 1
