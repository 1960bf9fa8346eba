"""Fiddler: the mixture against one written from the paper, residency against naive books, the store, and bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
import os

import pytest
import torch
import transformers as T
from safetensors.torch import load_file
from torch.nn import functional as F

from architectures import build
from conftest import GQA, MIXTURES, logits, quantise, tiny_batch
from tiny import tiny_folder, tiny_tokenizer
from trimtab import bases
from trimtab.contracts import Place
from trimtab.cost.experts import Machine
from trimtab.errors import BadInput
from trimtab.inference.generate import generate
from trimtab.inference.session import Inference
from trimtab.memory.meter import process_memory
from trimtab.methods.fiddler import Dynamic, Fiddler, LeastRecentlyUsed, Popular
from trimtab.methods.paca import PaCA
from trimtab.model import experts as interface
from trimtab.model.expert_files import ExpertFiles
from trimtab.model.load import load_model
from trimtab.model.spec import ModelSpec
from trimtab.planning.inference import plan_recipe
from trimtab.recipe import Recipe
from trimtab.tiered import prefetch as ahead
from trimtab.tiered.experts import DATA, MEANING, ExpertStore
from world import PLACE, same, snapshot, train, values

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPES = [(6, {"up": ((3, 5), torch.float32), "bias": ((3,), torch.float32)}), (4, {"up": ((3, 5), torch.float32)})]


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_a_mixture_is_the_sum_of_its_routed_networks():
    """y_t = sum_k p_tk W2 (silu(W1 x_t) * W3 x_t), in double precision, token by token."""
    model = MIXTURES["mixtral"]()
    module = model.model.layers[0].mlp.experts
    gate_up, down = module.gate_up_proj.detach().double(), module.down_proj.detach().double()
    width = gate_up.shape[1] // 2
    x, share = torch.randn(9, 64), torch.rand(9, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    wanted = torch.zeros(9, 64, dtype=torch.float64)
    for token in range(9):
        for rank in range(2):
            w13, w2 = gate_up[index[token, rank]], down[index[token, rank]]
            h = x[token].double()
            wanted[token] += share[token, rank].double() * (w2 @ (F.silu(w13[:width] @ h) * (w13[width:] @ h)))
    Fiddler(cache=1e-4).apply(model, PLACE)
    with torch.no_grad():
        ours = module(x, index, share)
    assert torch.allclose(ours.double(), wanted, atol=1e-5) and wanted.abs().max() > 0.1


@pytest.mark.parametrize("name", ["afmoe", "aria_text", "granitemoe", "nemotron_h", "minimax", "qwen3_next", "jamba"])
def test_outputs_of_other_architectures(name):
    model = build(name)
    model.set_experts_implementation("eager")
    ids = torch.randint(3, 200, (2, 7))
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        surgery = Fiddler(cache=1e-4).apply(model, PLACE)
        ours = model(input_ids=ids, use_cache=False).logits
    assert (own - ours).abs().max() == 0 and surgery.tiers.traffic.misses > 0


@pytest.mark.parametrize("family", MIXTURES)
def test_gradients_are_those_of_experts_in_memory_and_only_inputs_are_stored(family):
    model = MIXTURES[family]()
    model.set_experts_implementation("eager")
    batch = tiny_batch(model, rows=4, tokens=16)
    ids = batch.pop("input_ids")
    stored = []

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        embedded = model.get_input_embeddings().weight[ids].detach().requires_grad_()
        model.zero_grad()
        stored.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t.numel()) or t, lambda t: t):
            loss = model(inputs_embeds=embedded, **batch).loss
        loss.backward()
        router = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "experts" not in n}
        return embedded.grad, router

    own, routers = run()
    before = sum(stored)
    Fiddler(cache=1e-4).apply(model, PLACE)
    ours, again = run()
    assert torch.allclose(ours, own, atol=1e-6) and own.abs().max() > 1e-3
    assert routers.keys() == again.keys() and any(".gate." in name or ".router." in name for name in routers)
    assert all(torch.allclose(again[name], grad, atol=1e-5) for name, grad in routers.items())
    assert sum(stored) < before - 2 * 4 * 16 * 2 * 32, "what the experts compute is not stored"


def test_bf16_is_computed_in_products_of_few_sizes():
    model = MIXTURES["mixtral"]().bfloat16()
    batch = tiny_batch(model, rows=7, tokens=11)
    own = logits(model, batch).float()
    Fiddler(cache=0.0).apply(model, PLACE)
    assert torch.allclose(logits(model, batch).float(), own, atol=0.05 * float(own.abs().max()))


def test_an_interrupted_pass_leaves_nothing_wrong():
    model = MIXTURES["mixtral"]()
    batch = tiny_batch(model)
    own = logits(model, batch)
    Fiddler(cache=1e-4).apply(model, PLACE)
    hook = model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, batch)
    hook.remove()
    assert torch.allclose(logits(model, batch), own, atol=1e-6)


def test_a_read_that_fails_leaves_no_slot_with_other_weights(monkeypatch):
    model = MIXTURES["mixtral"]()
    batch, own = tiny_batch(model), ExpertStore.read
    outputs = logits(model, batch)
    surgery = Fiddler(cache=4e-4).apply(model, PLACE)
    assert torch.allclose(logits(model, batch), outputs, atol=1e-6)
    surgery.tiers.resize(4)
    done: list[int] = []

    def fails(self, row, slot):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(row)
        own(self, row, slot)

    with monkeypatch.context() as patched:
        patched.setattr(ExpertStore, "read", fails)
        with pytest.raises(KeyboardInterrupt):
            logits(model, batch)
    assert torch.allclose(logits(model, batch), outputs, atol=1e-6) and surgery.tiers.slot_of


# --- residency --------------------------------------------------------------------------------------------------------


def store_of(residency, slots: int, **more) -> tuple[ExpertStore, list[dict[str, torch.Tensor]]]:
    made = ExpertStore(SHAPES, residency, device=torch.device("cpu"), slow="disk", **more)
    random = torch.Generator().manual_seed(0)
    rows = [
        [{name: torch.randn(shape, generator=random) for name, (shape, _) in tensors.items()} for _ in range(count)]
        for count, tensors in SHAPES
    ]  # fmt: skip
    made.fill(lambda layer, expert: rows[layer][expert], lambda layer: None)
    made.resize(slots)
    return made, [row for layer in rows for row in layer]


@pytest.mark.parametrize("slots", [0, 1, 3, 7, 10])
@pytest.mark.parametrize(
    "make", [lambda: Dynamic(0.9, 0.1), LeastRecentlyUsed, Popular], ids=["dynamic", "lru", "popular"]
)
def test_experts_in_use_keep_their_slots_and_every_slot_has_the_right_weights(make, slots):
    store, rows = store_of(make(), slots)
    random = torch.Generator().manual_seed(slots)
    for step in range(200):
        layer = step % 2
        count, first = len(store.layers[layer].rows), store.layers[layer].rows.start
        used = torch.randperm(count, generator=random)[: int(torch.randint(1, count + 1, (), generator=random))]
        needed = {int(e): int(torch.randint(1, 9, (), generator=random)) for e in used.sort().values}
        had = {row for row in store.slot_of if row - first in needed}
        store.bring(layer, needed, tokens=8)
        assert had <= store.slot_of.keys(), "an expert that this pass needs has lost its slot"
        assert len(store.slot_of) <= slots and len(set(store.slot_of.values())) == len(store.slot_of)
        for row in range(store.rows):
            for name, tensor in store.weights(row).items():
                assert torch.equal(tensor, rows[row][name])
    assert store.traffic.hits + store.traffic.misses > 400 and (store.traffic.hits > 0) == (slots > 0)


def test_a_decayed_count_is_that_of_tokens_in_turn():
    residency, naive = Dynamic(0.9, 0.0), [0.0] * 10
    residency.begin([range(6), range(6, 10)], 3)
    random = torch.Generator().manual_seed(1)
    for tokens in (1, 1, 7, 1, 30, 2):
        counts = {row: int(torch.randint(0, tokens + 1, (), generator=random)) for row in range(6)}
        residency.seen(0, counts, tokens)
        for _ in range(tokens):
            naive[:6] = [0.9 * c + counts[row] / tokens for row, c in enumerate(naive[:6])]
    assert residency.counts.tolist() == pytest.approx(naive) and max(naive) > 1


def test_dynamic_follows_a_text_and_does_not_swing():
    store, _ = store_of(Dynamic(0.5 ** (1 / 8), 0.2), 2)
    for _ in range(20):
        store.bring(0, {0: 1, 1: 1}, 1)
    assert set(store.slot_of) == {0, 1}
    for _ in range(20):
        store.bring(0, {2: 1, 3: 1}, 1)
    assert set(store.slot_of) == {2, 3}
    before = store.traffic.misses
    for step in range(40):  # two that alternate do not take turns in the slot of one that is always used
        store.bring(0, {2: 1, 4 + step % 2: 1}, 1)
    assert 2 in store.slot_of and store.traffic.misses - before <= 40


def test_lru_is_by_layers():
    store, _ = store_of(LeastRecentlyUsed(), 5)  # three for the first layer, two for the second
    books: list[list[int]] = [[], []]
    random = torch.Generator().manual_seed(3)
    for step in range(100):
        layer = step % 2
        row = int(torch.randint(0, 4, (), generator=random)) + store.layers[layer].rows.start
        store.bring(layer, {row - store.layers[layer].rows.start: 1}, 1)
        books[layer] = [other for other in books[layer] if other != row][-(2 if layer == 0 else 1) :] + [row]
        assert set(store.slot_of) == set(books[0]) | set(books[1])


def test_popular_are_those_that_the_calibration_counts_most():
    model = MIXTURES["qwen3_moe"]()
    batches = [tiny_batch(model, seed=seed) for seed in (1, 2)]
    hits = torch.zeros(12)

    def count(_, __, out, first: int) -> None:
        hits.index_add_(0, first + out[-1].flatten(), torch.ones(out[-1].numel()))

    for layer, block in enumerate(model.model.layers):
        block.mlp.gate.register_forward_hook(functools.partial(count, first=6 * layer))
    surgery = Fiddler(residency="popular", cache=1e-4).apply(model, PLACE)
    surgery.calibrate(batches)
    counted = surgery.residency.hits.tolist()
    assert counted == hits.tolist() and sum(counted) == 2 * 2 * 2 * 30
    best = sorted(range(12), key=lambda row: -counted[row])[: surgery.tiers.slots]
    assert surgery.residency.chosen == set(best) and len(best) == 4
    logits(model, batches[0])
    assert set(surgery.tiers.slot_of) <= set(best)


# --- the store --------------------------------------------------------------------------------------------------------


def large(folder, seed: int = 0) -> str:
    torch.manual_seed(seed)
    config = T.MixtralConfig(**{**GQA, "hidden_size": 256, "intermediate_size": 2048}, num_local_experts=8)
    T.MixtralForCausalLM(config).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_experts_never_become_anonymous_memory(tmp_path):
    folder = large(tmp_path)
    load_model(folder, experts=False)  # what a first load costs once
    before = process_memory()["anon"]
    model = load_model(folder, experts=False)[0]
    surgery = Fiddler(cache=0.0).apply(model, PLACE)
    logits(model, tiny_batch(model))
    grown = process_memory()["anon"] - before
    assert surgery.tiers.table_bytes == 2 * 8 * 3 * 256 * 2048 * 2 > 48e6
    assert grown < surgery.tiers.table_bytes / 2
    surgery.tiers.resize(16)
    logits(model, tiny_batch(model))
    more = process_memory()["anon"] - before - grown
    assert more < 1.1 * surgery.tiers.table_bytes


def test_what_was_in_memory_is_released(tmp_path):
    model = MIXTURES["mixtral"]()
    parameter = model.model.layers[0].mlp.experts.down_proj
    surgery = Fiddler(cache=0.0).apply(model, PLACE)
    assert parameter.untyped_storage().nbytes() == 0 and "down_proj" not in dict(model.named_parameters())
    surgery.revert()
    assert parameter.untyped_storage().nbytes() == 4 * 64 * 128 * 4


@pytest.mark.parametrize("family", MIXTURES)
def test_each_expert_is_read_from_the_files_as_the_library_stacks_it(family, tmp_path):
    folder = tiny_folder(tmp_path / family, family, torch.float32)
    whole, left = load_model(folder)[0], load_model(folder, experts=False)[0]
    files = ExpertFiles(left, tmp_path / family)
    assert files.complete and len(files.stacked) == (8 if family == "gpt_oss" else 4)
    for name, stacked in files.stacked.items():
        own = whole.get_parameter(name)
        assert all(torch.equal(files.expert(name, expert), own[expert]) for expert in range(len(stacked)))
        at = range(0, own.numel(), own.numel() // 7)
        assert torch.equal(files.values(name, at), own.flatten()[list(at)])


def test_a_kept_store_is_used_again_and_only_for_its_own_model(tmp_path):
    folders = [tiny_folder(tmp_path / name, name, torch.float32) for name in ("mixtral", "olmoe")]
    keep = tmp_path / "store"
    outputs, times = [], []
    for _ in range(2):
        model = load_model(folders[0], experts=False)[0]
        surgery = Fiddler(store=str(keep), cache=1e-4).apply(model, PLACE)
        outputs.append(logits(model, tiny_batch(model)))
        times.append((keep / DATA).stat().st_mtime_ns)
        surgery.revert()
    assert torch.equal(*outputs) and times[0] == times[1] and sorted(os.listdir(keep)) == [DATA, MEANING]
    for folder, precision, own, why in (
        (folders[1], "auto", "auto", "another model"),
        (folders[0], "bf16", "auto", "in float32, and this run needs them in bfloat16"),
        (folders[0], "nf4", "auto", "in float32, and this run needs them in bfloat16"),
        (folders[0], "auto", "nf4", "in float32, and this run needs them in nf4"),
    ):
        other = load_model(ModelSpec(folder, precision), experts=False)[0]
        with pytest.raises(BadInput, match=why):
            Fiddler(store=str(keep), precision=own).apply(other, PLACE)
        assert any(p.is_meta for p in other.parameters()), "the model is as it was"
    known = json.loads((keep / MEANING).read_text())
    for damage in ("{", json.dumps(known | {"layout": [[1]]}), json.dumps(known | {"layout": 1})):
        (keep / MEANING).write_text(damage)
        with pytest.raises(BadInput, match="damaged"):
            Fiddler(store=str(keep)).apply(load_model(folders[0], experts=False)[0], PLACE)


@pytest.mark.parametrize("cache", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("precision", ["auto", "nf4"])
def test_a_damaged_record_of_a_kept_store_is_refused_before_it_is_used(precision, cache, tmp_path):
    folder, keep = tiny_folder(tmp_path / "m", "mixtral", torch.float32), tmp_path / "store"
    made = lambda: load_model(ModelSpec(folder, precision), experts=False)[0]  # noqa: E731
    Fiddler(store=str(keep), cache=cache).apply(made(), PLACE).revert()
    data = bytearray((keep / DATA).read_bytes())
    data[1::2] = bytes(len(data[1::2]))
    (keep / DATA).write_bytes(data)
    model = made()
    with pytest.raises(BadInput, match="is not what was written"):
        Fiddler(store=str(keep), cache=cache).apply(model, PLACE)
        logits(model, tiny_batch(model))


def test_experts_in_memory_are_kept_if_a_record_of_the_store_is_damaged(tmp_path):
    patch = Fiddler(store=str(tmp_path / "store"), cache=0.0)
    model = MIXTURES["mixtral"]()
    own = logits(model, batch := tiny_batch(model))
    patch.apply(model, PLACE).revert()
    with (tmp_path / "store" / DATA).open("r+b") as file:
        file.write(bytes(64))
    with pytest.raises(BadInput, match="expert 0 of layer 0 is not what was written"):
        patch.apply(model, PLACE)
    assert torch.equal(logits(model, batch), own)


def test_a_store_without_checksums_is_refused(tmp_path):
    folder = tiny_folder(tmp_path / "m", "mixtral", torch.float32)
    patch = Fiddler(store=str(tmp_path / "store"))
    patch.apply(load_model(folder, experts=False)[0], PLACE)
    said = tmp_path / "store" / MEANING
    known = json.loads(said.read_text())
    for sums in (None, known["crc32"][:-1]):
        said.write_text(json.dumps({**known, "crc32": sums}))
        with pytest.raises(BadInput, match="no checksums"):
            patch.apply(load_model(folder, experts=False)[0], PLACE)


def test_a_store_that_was_not_completed_is_not_used(tmp_path, monkeypatch):
    model = load_model(tiny_folder(tmp_path / "m", "mixtral", torch.float32), experts=False)[0]
    keep, own = tmp_path / "store", ExpertStore._write

    def fails(self, layer, expert, tensors):
        if expert == 2:
            raise KeyboardInterrupt
        own(self, layer, expert, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(ExpertStore, "_write", fails)
        with pytest.raises(KeyboardInterrupt):
            Fiddler(store=str(keep)).apply(model, PLACE)
    assert os.listdir(keep) == []
    (keep / f"{DATA}.4194999").write_bytes(b"of a process that was killed")
    with monkeypatch.context() as patched:
        replace = os.replace  # as a kill between the two files
        patched.setattr("os.replace", lambda a, b: 1 / 0 if b.name == DATA else replace(a, b))
        with pytest.raises(ZeroDivisionError):
            Fiddler(store=str(keep)).apply(model, PLACE)
    assert os.listdir(keep) == [MEANING]
    Fiddler(store=str(keep)).apply(model, PLACE)
    assert sorted(os.listdir(keep)) == [DATA, MEANING]


def test_a_store_in_ram_counts_as_fast_memory_on_a_cpu():
    model = MIXTURES["mixtral"]()
    own = logits(model, batch := tiny_batch(model))
    surgery = Fiddler(cache=1e-4).apply(model, Place(fast="cpu", slow="ram"))
    assert torch.allclose(logits(model, batch), own, atol=1e-6)
    table, arena = surgery.outside()["experts"]
    assert surgery.outside()["experts in the slow tier"] == [] and len(table) == surgery.tiers.table_bytes > len(arena)


# --- another device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", ["ram", "disk"])
@pytest.mark.parametrize("cache", [0.0, 1e-4])
def test_beside_a_device_experts_move_or_the_host_computes_them(slow, cache, monkeypatch):
    """As for a GPU, which is the CPU here: the weights are copied to slots or to the buffer, or the tokens move."""
    monkeypatch.setattr(ExpertStore, "in_place", False)
    slowly = Machine("a test", 1e9, 1e12, link_bytes=1e6, host_bytes=1e6, host_flops=1e7)
    monkeypatch.setattr(bases.experts, "measure", lambda *_: slowly)
    model = MIXTURES["qwen3_moe"]()
    model.set_experts_implementation("eager")
    batch = tiny_batch(model)
    own, moves = logits(model, batch), []
    surgery = Fiddler(cache=cache).apply(model, Place(fast="cpu", slow=slow))
    store, read = surgery.tiers, ExpertStore.read
    monkeypatch.setattr(ExpertStore, "read", lambda self, row, slot: (moves.append(row), read(self, row, slot)))
    hosted = []
    for module in surgery.found.values():
        module.register_forward_hook(lambda *_: hosted.extend(store.hosted))
    assert torch.allclose(logits(model, batch), own, atol=1e-6)
    assert hosted and moves and set(hosted).isdisjoint(moves)
    assert surgery.outside()["experts"][-1].numel() == store.slot_bytes, "the buffer"


# --- reading ahead ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cold(monkeypatch) -> list[list[int]]:
    """No page is in memory, as a store is told; -> the rows of each prefetch, which the reader then has read."""
    asked, own = [], ExpertStore.prefetch

    def prefetch(self, rows) -> None:
        own(self, rows)
        asked.append(list(self._prefetched.rows) if self._prefetched else [])
        self.reader.serve()

    monkeypatch.setattr(ahead._Pages, "resident", lambda *_: False)
    monkeypatch.setattr(bases.experts, "Reader", functools.partial(ahead.Reader, alone=True))
    monkeypatch.setattr(ExpertStore, "prefetch", prefetch)
    return asked


@pytest.mark.parametrize("family", MIXTURES)
def test_the_next_layers_router_tells_what_is_read_ahead(family, cold):
    model = MIXTURES[family]()
    model.set_experts_implementation("eager")
    batch = tiny_batch(model)
    own, seen = logits(model, batch), []
    surgery = Fiddler(cache=0.0).apply(model, PLACE)
    first, second = surgery.found.values()
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert torch.equal(logits(model, batch), own)
    router = model.get_submodule(interface.router_of(model, list(surgery.found)[1], len(surgery.tiers.layers[1].rows)))
    best = (seen[0] @ router.weight.t()).topk(2).indices.unique().tolist()
    assert cold == [[surgery.tiers.layers[1].rows.start + expert for expert in best]]
    traffic = surgery.tiers.traffic
    assert 0 < traffic.foreseen <= traffic.needed and traffic.foreseen <= len(best)
    surgery.revert()


def test_the_backward_pass_reads_what_the_layer_below_used(cold):
    model = MIXTURES["qwen3_moe"]()
    surgery = Fiddler(cache=0.0).apply(model, PLACE)
    batch = tiny_batch(model, rows=1, tokens=5)
    loss = model(**batch).loss
    used = [list(vars(module)[interface.TIERS].used) for module in surgery.found.values()]
    cold.clear()
    loss.backward()
    assert cold == [used[0]] and 2 <= len(used[0]) < 6


def test_reading_ahead_can_be_turned_off(cold):
    model = MIXTURES["mixtral"]()
    surgery = Fiddler(cache=0.0, prefetch=False).apply(model, PLACE)
    logits(model, tiny_batch(model))
    assert cold == [] and surgery.tiers.traffic.needed == 0


def test_where_all_is_in_memory_nothing_is_read_ahead():
    model = MIXTURES["mixtral"]()
    surgery = Fiddler(cache=0.0).apply(model, PLACE)
    for _ in range(3):
        logits(model, tiny_batch(model))
    assert surgery.tiers.traffic.needed == 0 and surgery.tiers.traffic.misses > 0


# --- the budget -------------------------------------------------------------------------------------------------------


def recipe(folder: str, fields: dict, budget: str, output) -> Recipe:
    limit = {"fast": int(budget) if budget.isdigit() else budget}
    return Recipe.from_dict({"model": folder, "patches": [{"fiddler": fields}], "budget": limit, "output": str(output)})


def test_slots_are_what_the_budget_leaves(tmp_path):
    folder = large(tmp_path / "m")
    least = plan_recipe(recipe(folder, {"cache": 0.0}, "8GiB", tmp_path))
    assert not least.kinds.get("experts") and least.kinds["experts in the slow tier"] == 2 * 8 * 3 * 2**20
    slot, used = 3 * 2**20, least.fast_peak_bytes
    for more in (0.5, 5.5):
        budget = int((used + more * slot) / 0.95)
        made = plan_recipe(recipe(folder, {}, str(budget), tmp_path))
        slots = made.kinds.get("experts", 0) // slot
        others = made.fast_peak_bytes - slots * slot
        assert others + slots * slot <= 0.95 * budget or slots == 0
        assert (slots == 16 or others + (slots + 1) * slot > 0.95 * budget) and made.fits
    whole = plan_recipe(recipe(folder, {}, "8GiB", tmp_path))
    assert whole.kinds["experts"] == 16 * slot, "no more than there are"
    fixed = plan_recipe(recipe(folder, {"cache": 3 * slot / 2**30}, "8GiB", tmp_path))
    assert fixed.kinds["experts"] == 3 * slot


def test_slots_stay_from_reply_to_reply(tmp_path):
    made = Inference(recipe(large(tmp_path / "m"), {}, "8GiB", tmp_path))
    with made:
        made.replies([20], 8)
        peak = made.plan.fast_peak_bytes - 16 * 3 * 2**20  # of all but the experts
        limit = int((peak + 9.5 * 3 * 2**20) / 0.95)
        made.recipe = dataclasses.replace(made.recipe, budget={"fast": limit})
        for turn in range(3):
            made.replies([20], 8)
            tiers = made.surgeries[0].tiers
            assert 7 <= tiers.slots <= 10 and (turn == 0 or tiers.slot_of)
            logits(made.model, tiny_batch(made.model))
            assert len(tiers.slot_of) == tiers.slots and tiers.used_bytes == tiers.slots * tiers.slot_bytes


def test_generate_stays_within_the_budget_and_says_what_it_read(tmp_path):
    folder = large(tmp_path / "m")
    run = recipe(folder, {}, "8GiB", tmp_path / "run")
    plain = Recipe.from_dict({"model": folder, "output": str(tmp_path / "plain")})
    (tmp_path / "run").mkdir()
    (own,) = generate(plain, ["which country is the city"], max_new_tokens=6)
    said = []
    (ours,) = generate(run, ["which country is the city"], max_new_tokens=6, say=said.append)
    assert ours == own
    record = json.loads((tmp_path / "run" / "generate.json").read_text())
    assert record["predicted"]["bytes"]["experts"] == 16 * 3 * 2**20
    assert record["measured"]["fast_peak_bytes"] <= record["budget"]["fast"]
    assert record["reads"]["store_hit_rate"] > 0 and record["reads"]["store_up_bytes_per_token"] > 0


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"residency": "belady"}, "no such choice"),
        ({"precision": "int8"}, "no such choice"),
        ({"halflife": 0}, "1 or more"),
        ({"hysteresis": -0.1}, "0 or more"),
        ({"rows": 0}, "1 or more"),
        ({"cache": -1.0}, "0 or more"),
        ({"cache": float("nan")}, "0 or more"),
        ({"cache": 1e-6}, "one expert needs"),
        ({"store": "/proc/nothing"}, "store: /proc/nothing"),
    ],
    ids=str,
)
def test_impossible_fields_are_refused(fields, said):
    model = MIXTURES["mixtral"]()
    before = snapshot(model)
    with pytest.raises(BadInput, match=said):
        Fiddler(**fields).apply(model, PLACE)
    after = snapshot(model)
    assert after == before


@pytest.mark.parametrize("name", ["dbrx", "jetmoe", "llama4_text", "longcat_flash"])
def test_experts_that_the_library_computes_otherwise_are_refused(name):
    with pytest.raises(BadInput, match="through transformers' experts interface"):
        Fiddler().apply(build(name), PLACE)


def test_a_list_of_modules_is_refused():
    model = MIXTURES["mixtral"]()
    model.model.layers[1].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(4)])
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.experts"):
        Fiddler().apply(model, PLACE)


def test_a_form_that_computes_more_than_its_flags_say_is_refused(monkeypatch):
    model = MIXTURES["mixtral"]()
    before = snapshot(model)
    monkeypatch.setattr(interface, "output", lambda experts, x, weights: torch.zeros_like(x))
    with pytest.raises(BadInput, match="computes more"):
        Fiddler().apply(model, PLACE)
    assert snapshot(model) == before


def test_twice_is_refused():
    model = MIXTURES["mixtral"]()
    Fiddler().apply(model, PLACE)
    with pytest.raises(BadInput):
        Fiddler().apply(model, PLACE)
    with pytest.raises(BadInput, match="one store"):
        Recipe(model="x", patches=["fiddler", "fiddler"]).load_patches()


def test_a_model_without_its_experts_is_not_saved(tmp_path):
    model = MIXTURES["mixtral"]()
    surgery = Fiddler().apply(model, PLACE)
    with pytest.raises(BadInput, match="would lack them"):
        model.save_pretrained(tmp_path)
    surgery.revert()
    model.save_pretrained(tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in load_file(tmp_path / "model.safetensors")


def test_slots_keep_their_experts_if_their_number_hardly_changes():
    model = MIXTURES["mixtral"]()
    surgery = Fiddler().apply(model, PLACE)
    one = surgery.tiers.slot_bytes
    assert surgery.take(5 * one) == 5 * one
    logits(model, tiny_batch(model))
    held = dict(surgery.tiers.slot_of)
    assert surgery.take(6 * one) == 5 * one and surgery.tiers.slot_of == held
    assert surgery.take(4 * one + 1) == 4 * one and not surgery.tiers.slot_of
    assert surgery.take(100 * one) == 8 * one


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_attention_in_four_or_eight_bits_is_taken(kind):
    model = MIXTURES["mixtral"]()
    quantise(model, kind)
    batch = tiny_batch(model)
    own = logits(model, batch)
    Fiddler(cache=0.0).apply(model, Place(fast="cpu"))
    assert torch.allclose(logits(model, batch), own, atol=1e-5)


# --- four bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_in_four_bits_compute_with_their_unpacked_weights(family, tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    folder = tiny_folder(tmp_path / family, family, torch.float32)
    rounded, left = load_model(folder)[0], load_model(folder, experts=False)[0]
    rounded.set_experts_implementation("eager")
    batch = tiny_batch(rounded)
    exact = logits(rounded, batch)
    for module in interface.mixtures(rounded).values():
        for parameter in interface.leaves(module).values():
            if parameter.dim() == 3:
                for expert in parameter.data:
                    expert.copy_(dequantize_4bit(*quantize_4bit(expert, blocksize=64, quant_type="nf4")))
    surgery = Fiddler(cache=1e-4, precision="nf4").apply(left, PLACE)
    ours = logits(left, batch)
    assert torch.equal(ours, logits(rounded, batch)) and not torch.allclose(ours, exact, atol=1e-3)
    assert any("outputs differ" in note for note in surgery.notes) and not surgery.keeps_outputs
    whole = sum(p.numel() for m in interface.mixtures(rounded).values() for p in interface.leaves(m).values())
    assert surgery.tiers.table_bytes <= whole * 4 / 5


def test_four_bits_are_planned_and_trained_over(tmp_path):
    folder = large(tmp_path / "m")
    made = [plan_recipe(recipe(folder, {"cache": 0.0, "precision": p}, "8GiB", tmp_path)) for p in ("auto", "nf4")]
    auto, nf4 = (plan.kinds["experts in the slow tier"] for plan in made)
    assert nf4 == pytest.approx(auto * 4.5 / 16, rel=0.01)
    assert made[1].kinds["temporaries"] > made[0].kinds["temporaries"], "an expert is unpacked"
    model = MIXTURES["mixtral"]()
    before, weights = snapshot(model), values(model)
    surgery = Fiddler(cache=1e-4, precision="nf4").apply(model, PLACE)
    paca = PaCA(r=4).apply(model, PLACE)
    losses = train(model, paca, 5)
    assert losses[-1] < losses[0]
    paca.revert()
    surgery.revert()
    assert snapshot(model) == before and same(model.state_dict(), weights)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_stand_ins_replace_experts_without_a_slot_and_say_what_that_changes(family):
    model = MIXTURES[family]()
    model.set_experts_implementation("eager")
    batch = tiny_batch(model)
    own = logits(model, batch)
    surgery = Fiddler(cache=0.0, stand_in="nf4").apply(model, PLACE)
    ours = logits(model, batch)
    assert not torch.equal(ours, own) and surgery.tiers.traffic.up == 0, "nothing is read"
    assert sum(t.nbytes for t in surgery.outside()["experts"]) < surgery.tiers.table_bytes / 5
    want = float((own.softmax(-1) * (own.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean())
    surgery.calibrate([batch])
    assert surgery.divergence([batch]) == pytest.approx(want, rel=1e-3) and want > 0
    assert any(f"KL {want:.2g} nats" in note for note in surgery.notes)
    surgery.tiers.resize(8)
    assert torch.equal(logits(model, batch), own), "with a slot for each expert, no stand-in is used"
    surgery.revert()
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model, batch), own)


def test_gradients_are_exact_beside_stand_ins():
    model, losses = MIXTURES["mixtral"](), []
    batch = tiny_batch(model)
    for fields in ({}, {"stand_in": "nf4"}):
        surgery = Fiddler(cache=0.0, **fields).apply(model, PLACE)
        paca = PaCA(r=4).apply(model, PLACE)
        losses.append(train(model, paca, 3))
        assert torch.is_grad_enabled() and model(**batch).loss.requires_grad
        paca.revert()
        surgery.revert()
    assert losses[0] == losses[1]


def test_two_forms_of_four_bits_are_refused():
    with pytest.raises(BadInput, match="all experts are in 4 bits"):
        Fiddler(precision="nf4", stand_in="nf4").apply(MIXTURES["mixtral"](), PLACE)
