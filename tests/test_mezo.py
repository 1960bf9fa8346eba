"""MeZO: losses at several points, the estimate of the gradient, updates, replay, and resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import MODELS, logits, quantise, tiny_batch
from helpers_run import films, left, make_world, same, tree
from trimtab.artifacts.checkpoint_files import load
from trimtab.errors import BadInput, Stopped
from trimtab.methods import mezo as module
from trimtab.methods.causal_lm import BlackBox
from trimtab.methods.full import Full
from trimtab.methods.mezo import LOG, Mezo, MezoOptimizer, noise, replay, rounded_at_random
from trimtab.methods.senszoq import SensZOQ
from trimtab.model import perturbed
from trimtab.model.perturbed import Points
from trimtab.recipe import Recipe
from world import CASES, PLACE, at_step, make, train, values

pytestmark = pytest.mark.filterwarnings("ignore")
ARGS = type("Arguments", (), {"learning_rate": 1e-2, "weight_decay": 0.0, "world_size": 1})
PATCHES = [name for name in CASES if name not in ("meft", "lst")]  # both are refused


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def moved(seed: int, size: float):
    return lambda number, p: p + size * noise(seed, 0, 0, number, p).to(p.dtype)


def naive(model: nn.Module, loss, points) -> list[float]:
    """The parameters are overwritten in a copy of the model's state, one point after another."""
    trained = [p for p in model.parameters() if p.requires_grad]
    start, found = [p.detach().clone() for p in trained], []
    for point in points:
        with torch.no_grad():
            for number, p in enumerate(trained):
                p.copy_(point(number, start[number]))
            found.append(float(loss()))
            for p, value in zip(trained, start, strict=True):
                p.copy_(value)
    return found


# --- points ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "bert", "mpnet"])
@pytest.mark.parametrize("name", PATCHES)
def test_losses_at_points_are_those_of_changed_weights(name, family):
    model = MODELS[family]()
    train(model, make(name).apply(model, PLACE), 2)
    batch, before = tiny_batch(model), values(model)
    points = [moved(seed, size) for seed, size in ((1, 0.02), (1, -0.02), (2, 0.05))]
    wanted = naive(model, lambda: model(**batch).loss, points)
    found = Points(model)
    assert found.stacks == (name == "senszoq")
    got = found.losses(lambda: model(**batch).loss, points)
    assert found.stacks == (name == "senszoq"), "stacked and single losses must agree"
    assert [float(x) for x in got] == pytest.approx(wanted, rel=1e-5)
    assert len({round(x, 5) for x in wanted}) == 3
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_blocks_before_the_first_change_are_computed_once():
    model = MODELS["llama"]()
    last = len(model.model.layers) - 1
    SensZOQ(density=0.05, targets=rf"layers\.{last}\.").apply(model, PLACE)
    rows = []
    handles = [
        block.register_forward_hook(lambda module, args, output: rows.append((args[0] if args else output).shape[0]))
        for block in model.model.layers
    ]
    batch, points = tiny_batch(model), Points(model)
    points.checked = True
    got = points.losses(lambda: model(**batch).loss, [moved(1, 0.1), moved(1, -0.1), moved(2, 0.1)])
    assert rows == [3] * last + [9]
    for handle in handles:
        handle.remove()
    assert [float(x) for x in got] == pytest.approx(
        naive(model, lambda: model(**batch).loss, [moved(1, 0.1), moved(1, -0.1), moved(2, 0.1)]), rel=1e-5
    )


def test_many_points_are_stacked_in_parts(monkeypatch):
    model = MODELS["llama"]()
    SensZOQ(density=0.05, score="weight").apply(model, PLACE)
    monkeypatch.setattr(perturbed, "MOST", 2)
    rows, batch, points = [], tiny_batch(model), Points(model)
    points.checked = True
    model.model.norm.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    near = [moved(seed, 0.05) for seed in range(5)]
    got = points.losses(lambda: model(**batch).loss, near)
    assert rows == [6, 6, 3]
    assert [float(x) for x in got] == pytest.approx(naive(model, lambda: model(**batch).loss, near), rel=1e-5)


def test_a_model_that_mixes_its_rows_is_computed_one_after_another():
    model = MODELS["llama"]()
    SensZOQ(density=0.05).apply(model, PLACE)
    block = model.model.layers[0]
    block.register_forward_hook(lambda module, args, output: output - output.mean(0, keepdim=True))
    batch, points = tiny_batch(model), Points(model)
    assert points.stacks
    near = [moved(1, 0.1), moved(1, -0.1)]
    got = points.losses(lambda: model(**batch).loss, near)
    assert not points.stacks
    assert [float(x) for x in got] == pytest.approx(naive(model, lambda: model(**batch).loss, near), rel=1e-5)


def test_an_error_on_the_way_leaves_the_weights():
    for name in ("full", "senszoq", "lora"):
        model = MODELS["llama"]()
        make(name).apply(model, PLACE)
        before, batch = values(model), tiny_batch(model)
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Points(model).losses(lambda model=model, batch=batch: model(**batch).loss, [moved(1, 0.1)])
        handle.remove()
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert torch.isfinite(logits(model, batch)).all()


# --- the estimate ----------------------------------------------------------------------------------------------------


def test_the_mean_over_directions_is_the_gradient():
    model = MODELS["llama"]()
    surgery = SensZOQ(density=4e-4, score="weight").apply(model, PLACE)
    batch, trained = tiny_batch(model), [p for p in model.parameters() if p.requires_grad]
    model(**batch).loss.backward()
    true = torch.cat([p.grad.clone() for p in trained])
    assert len(true) == sum(len(layer.values) for layer in surgery.layers.values()) < 100
    total = torch.zeros_like(true)
    stepper = Mezo(directions=64, eps=1e-2)
    stepper.prepare(model)
    optimizer = stepper.optimizer(trained, ARGS)
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(40):
        stepper.backward(lambda: model(**batch).loss)
        slopes, run = stepper.run.slopes.clone(), stepper.run
        total += torch.cat(
            [sum(slopes[j] * run.z(number, j, p) for j in range(64)) for number, p in enumerate(trained)]
        )
        optimizer.step()
    assert float(torch.cosine_similarity(total, true, 0)) > 0.95
    assert float(total.norm() / (40 * 64)) == pytest.approx(float(true.norm()), rel=0.15)


def test_micro_batches_add_up():
    model = MODELS["llama"]()
    SensZOQ(density=0.02, score="weight").apply(model, PLACE)
    batch, stepper = tiny_batch(model, rows=4), Mezo(directions=3)
    stepper.prepare(model)
    stepper.backward(lambda: model(**batch).loss * 2)
    whole = stepper.run.slopes.clone()
    stepper.run.slopes = torch.zeros(3)
    for _ in range(2):
        stepper.backward(lambda: model(**batch).loss)
    assert torch.allclose(stepper.run.slopes, whole, rtol=1e-2, atol=1e-3)


# --- updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["sgd", "momentum", "adam"])
def test_updates_are_those_of_the_rules(update):
    """Against torch's optimizers on the gradient g z."""
    p = nn.Parameter(torch.randn(7, 5))
    reference = nn.Parameter(p.detach().clone())
    stepper = Mezo(update=update, directions=2)
    optimizer = MezoOptimizer([p], stepper.run, 1e-2)
    other = {
        "sgd": lambda: torch.optim.SGD([reference], 1e-2), "momentum": lambda: torch.optim.SGD([reference], 1e-2, 0.9),
        "adam": lambda: torch.optim.Adam([reference], 1e-2),
    }[update]()  # fmt: skip
    for step in range(6):
        slopes = torch.tensor([1.5 - step, 0.5])
        reference.grad = sum(slopes[j] * noise(0, step, j, 0, p) for j in range(2)) / 2
        stepper.run._start(p.device)
        stepper.run.slopes = slopes
        optimizer.step()
        other.step()
        assert torch.allclose(p, reference, atol=1e-5)


@pytest.mark.parametrize("update", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("name", ["senszoq", "full"])
def test_replay_is_the_run_bit_for_bit(update, name):
    model = MODELS["llama"]()
    fields = {"dtype": "bf16"} if name == "full" else {}
    make(name, **fields).apply(model, PLACE)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = copy.deepcopy([p.detach() for p in trained])
    stepper = Mezo(update=update, directions=2)
    stepper.prepare(model)
    optimizer = stepper.optimizer(trained, ARGS)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        batch = tiny_batch(model, seed=step)
        stepper.backward(lambda batch=batch: model(**batch).loss)
        optimizer.step()
    log = optimizer.state[trained[0]][LOG]
    assert log.shape == (5, 4)
    again = [nn.Parameter(p.clone()) for p in start]
    replay(Mezo(update=update, directions=2), again, log)
    assert all(torch.equal(a, b) for a, b in zip(again, trained, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(start, trained, strict=True) if a.numel() > 64)


def test_sixteen_bits_are_rounded_at_random():
    x = torch.full((40_000,), 1.0 + 2**-10)  # an eighth of the way to the next bf16
    rounded = rounded_at_random(x, 0, 1, 2)
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    assert float(rounded.double().mean()) == pytest.approx(1 + 2**-10, abs=5e-5)
    assert torch.equal(rounded, rounded_at_random(x, 0, 1, 2)) and not torch.equal(
        rounded, rounded_at_random(x, 0, 2, 2)
    )
    exact = torch.randn(100).to(torch.bfloat16)
    assert torch.equal(rounded_at_random(exact.float(), 0, 0, 0), exact)


def test_steps_without_a_finite_loss_are_skipped_and_counted():
    model = MODELS["llama"]()
    SensZOQ(density=0.02, score="weight").apply(model, PLACE)
    trained, batch = [p for p in model.parameters() if p.requires_grad], tiny_batch(model)
    stepper = Mezo(update="adam", patience=3)
    stepper.prepare(model)
    optimizer = stepper.optimizer(trained, ARGS)

    def step(factor: float) -> float:
        loss = float(stepper.backward(lambda: model(**batch).loss * factor))
        optimizer.step()
        return loss

    first = step(1.0)
    before = [p.detach().clone() for p in trained]
    assert step(float("nan")) == first and step(float("inf")) == first
    assert all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    step(1.0)
    assert not all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert stepper.record() == {"skipped_steps": 2, "flat_steps": 0}
    losses = [step(float("nan")) for _ in range(3)]
    assert losses[:2] == [losses[0]] * 2 and losses[2] != losses[2], "after three in a row the loss is NaN"


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["senszoq", "full", "lora", "paca", "edora"])
def test_twenty_steps_are_ten_and_ten(name, world, tmp_path):
    stepper = {"mezo": {"update": "adam", "directions": 2}}
    keys = {
        part: {**tree(world, tmp_path / part, {name: CASES[name]}, max_steps=20, save_strategy="steps", save_steps=10),
               "stepper": stepper}
        for part in ("whole", "parts")
    }  # fmt: skip
    whole = Recipe.from_dict(keys["whole"]).train()
    assert whole["skipped_steps"] == 0

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with at_step(11, stop), pytest.raises(Stop):
        Recipe.from_dict(keys["parts"]).train()
    Recipe.from_dict({**keys["parts"], "resume": True}).train()
    one, two = (left(tmp_path / part) for part in keys)
    same(one, two)
    log = [load(tmp_path / part / "checkpoint-20" / "optimizer.pt")["state"][0][LOG] for part in keys]
    assert torch.equal(*log) and len(log[0]) == 20


def test_it_learns(world, tmp_path):
    keys = tree(world, tmp_path / "run", {"senszoq": {"density": 0.1}}, max_steps=20, learning_rate=3e-2)
    keys["training"]["logging_steps"] = 10
    made = Recipe.from_dict({**keys, "stepper": {"mezo": {"update": "adam", "directions": 8, "eps": 1e-2}}}).train()
    assert made["final_loss"] < made["mean_loss"] - 0.03 < 4.0


def test_a_classifier_and_its_head_are_stacked(world, tmp_path, monkeypatch):
    used = []
    real = Points.losses

    def watched(self, *args):
        used.append((self.stacks, self.outside))
        return real(self, *args)

    monkeypatch.setattr(Points, "losses", watched)
    keys = films(world, tmp_path / "run", {"senszoq": {"density": 0.05, "rows": 4}}, max_steps=3)
    made = Recipe.from_dict({**keys, "stepper": {"mezo": {"update": "adam", "directions": 4}}}).train()
    assert made["final_loss"] < 1 and used[-1][0] and len(used[-1][1]) == 2
    model = quantise(MODELS["llama"](), "nf4")
    make("senszoq").apply(model, PLACE)
    points, batch = Points(model), tiny_batch(model)
    points.losses(lambda: model(**batch).loss, [moved(1, 0.1)])
    assert points.stacks


def test_a_run_whose_losses_stay_infinite_ends(world, tmp_path, monkeypatch):
    keys = tree(
        world, tmp_path / "run", {"senszoq": {"density": 0.05}}, max_steps=8, save_strategy="steps", save_steps=2
    )
    real, steps = module.Run.differences, []

    def broken(self, loss):
        steps.append(self.step)
        return real(self, (lambda: loss() * float("nan")) if self.step >= 4 else loss)

    monkeypatch.setattr(module.Run, "differences", broken)
    with pytest.raises(Stopped, match="not finite|nan"):
        Recipe.from_dict({**keys, "stepper": {"mezo": {"patience": 3}}}).train()
    assert (tmp_path / "run" / "checkpoint-6").is_dir()


def test_what_it_cannot_step_is_refused(world, tmp_path):
    keys = tree(world, tmp_path / "run", {"meft": CASES["meft"]}, max_steps=1)
    with pytest.raises(BadInput, match="only Adam steps"):
        Recipe.from_dict({**keys, "stepper": "mezo"}).train()
    keys = tree(world, tmp_path / "run", {"paca": {}}, max_steps=1, optim="adamw_torch")
    with pytest.raises(BadInput, match="optimizer of its own"):
        Recipe.from_dict({**keys, "stepper": "mezo"}).train()
    odd = [("eps", 0.0), ("eps", float("inf")), ("directions", 0), ("patience", 0), ("momentum", 1.0)]
    for field, value in (*odd, ("momentum", float("nan")), ("beta2", -1.0)):
        with pytest.raises(BadInput, match="it must be"):
            Mezo(**{field: value}).prepare(MODELS["llama"]())
    for fields, match in (({"max_grad_norm": 0.5}, "no gradient"), ({"weight_decay": 0.1}, "only matrices")):
        keys = tree(world, tmp_path / "run", {"senszoq": {"score": "weight"}}, max_steps=1, **fields)
        with pytest.raises(BadInput, match=match):
            Recipe.from_dict({**keys, "stepper": "mezo"}).train()
    with pytest.raises(BadInput, match="several processes"):
        Mezo().optimizer([nn.Parameter(torch.ones(1))], type("A", (ARGS,), {"world_size": 2}))
    half = MODELS["llama"]().half()
    Full(dtype="keep").apply(half, PLACE)
    with pytest.raises(BadInput, match="fp16 weights"):
        Mezo().optimizer([p for p in half.parameters() if p.requires_grad], ARGS)


def test_the_methods_rates_count():
    made = Recipe.from_dict({"model": "x", "patches": ["senszoq"], "stepper": "mezo"}).training_values()
    assert made["learning_rate"] == 1e-6 and made["lr_scheduler_type"] == "constant"


# --- losses without a gradient ---------------------------------------------------------------------------------------


def answered(model, batch: dict, row: int) -> tuple[list[int], list[int]]:
    """The greedy reply to a row's prompt, and its labels."""
    places = (batch["labels"][row] != -100).nonzero().squeeze(1)
    start, answer = int(places[0]), batch["labels"][row, places].tolist()
    ids = batch["input_ids"][row : row + 1, :start]
    for _ in answer:
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, start:].tolist(), answer


def test_metrics_are_those_of_greedy_replies():
    model = MODELS["llama"]()
    model.generation_config.eos_token_id = None
    batch = tiny_batch(model, rows=6)
    batch["attention_mask"][:], batch["labels"] = 1, batch["input_ids"].clone()
    batch["labels"][:, :7] = -100
    for row in (1, 4):  # rows that the model answers as it should
        for place in range(7, 10):
            said = int(model(batch["input_ids"][row : row + 1, :place]).logits[0, -1].argmax())
            batch["input_ids"][row, place] = batch["labels"][row, place] = said
    pairs = [answered(model, batch, row) for row in range(6)]
    with torch.no_grad():
        said = model(batch["input_ids"]).logits.argmax(-1)[:, 6:9]
    wanted = {
        "exact_match": sum(a == b for a, b in pairs) / 6,
        "accuracy": float((said == batch["labels"][:, 7:]).float().mean()),
        "f1": sum(min(a.count(t), b.count(t)) * 2 / 6 for a, b in pairs for t in set(a)) / 6,
    }
    assert 2 / 6 <= wanted["exact_match"] < 1
    for metric, value in wanted.items():
        loss = BlackBox(metric=metric).loss(model, batch)
        assert float(loss.value) == pytest.approx(1 - value, abs=1e-6), metric
        assert torch.equal(BlackBox(metric=metric, whole=True).loss(model, batch).value, loss.value)


@pytest.mark.parametrize("metric", ["accuracy", "exact_match", "f1"])
def test_a_run_on_a_metric(metric, world, tmp_path):
    keys = tree(world, tmp_path / "run", {"senszoq": {"density": 0.05}}, max_steps=3, learning_rate=1e-2)
    keys |= {"objective": {"black_box": {"metric": metric}}, "stepper": {"mezo": {"eps": 0.1, "directions": 4}}}
    made = Recipe.from_dict(keys).train()
    assert 0 <= made["final_loss"] <= 1
    assert made["flat_steps"] + made["skipped_steps"] <= 3
    for change in ({"training": {**keys["training"], "packing": True}}, {"objective": {"black_box": {"dft": True}}}):
        if metric != "accuracy":
            with pytest.raises(BadInput, match="packed rows|cross-entropy"):
                Recipe.from_dict({**keys, **change, "output": str(tmp_path / min(change))}).train()
    with pytest.raises(BadInput, match="has no gradient"):
        Recipe.from_dict({**keys, "stepper": "backprop", "output": str(tmp_path / "other")}).train()
