"""What holds for every objective and every stepper in the table."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from conftest import MODELS, tiny_batch
from helpers_run import films, make_world, prompts, tree
from trimtab import methods
from trimtab.contracts import Stepper
from trimtab.engine.arguments import training_arguments
from trimtab.engine.inputs import Inputs, make_trainer, read_inputs
from trimtab.engine.job import Job
from trimtab.engine.objectives import arguments_class, evaluator, trainer_class
from trimtab.model.load import load_model
from trimtab.recipe import Recipe
from world import PLACE

pytestmark = pytest.mark.filterwarnings("ignore")
OBJECTIVES = {  # name -> family, a recipe's keys
    "causal_lm": ("llama", tree), "classification": ("bert", films), "black_box": ("llama", tree),
    **{name: ("llama", functools.partial(prompts, objective=name)) for name in ("grpo", "s_grpo", "t_spmo")},
}  # fmt: skip
STEPPERS = {"backprop": {}, "mezo": {"update": "adam", "directions": 8}}
objectives = pytest.mark.parametrize("name", OBJECTIVES)
steppers = pytest.mark.parametrize("name", STEPPERS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def loss_of(name: str, model, batch, count=None):
    return methods.find(name, "objective")().loss(model, batch, count)


def test_every_one_has_a_case():
    assert set(OBJECTIVES) == set(methods.names("objective")) and set(STEPPERS) == set(methods.names("stepper"))


@objectives
def test_the_mean_is_over_the_whole_step(name):
    """`count` items make a mean of a share of them: micro-batches add up to the batch, and so do their gradients."""
    model = MODELS[OBJECTIVES[name][0]]()
    batch = tiny_batch(model, rows=4)
    whole = loss_of(name, model, batch)
    count, smooth = int(whole.seen), methods.find(name, "objective").differentiable
    assert whole.value.requires_grad == smooth
    gradients = []
    if smooth:
        whole.value.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    parts = [loss_of(name, model, {k: v[rows] for k, v in batch.items()}, count) for rows in (slice(3), slice(3, 4))]
    total = sum(part.value for part in parts)
    if smooth:
        total.backward()
    assert float(total) == pytest.approx(float(whole.value), rel=1e-5)
    assert sum(int(part.seen) for part in parts) == count
    assert sum(int(part.correct) for part in parts) == int(whole.correct)
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, again, strict=True))


@objectives
def test_what_the_planner_traces_is_what_the_trainer_makes(name, world, tmp_path):
    """The example batch has the keys, shapes and types of a batch of the trainer's own."""
    recipe = Recipe.from_dict(OBJECTIVES[name][1](world, tmp_path / "run", {"paca": {"r": 4}}))
    objective = recipe.load_objective()
    assert recipe.training_values()["lr_scheduler_type"] == objective.defaults["lr_scheduler_type"]
    args = training_arguments(recipe, arguments_class(objective), tmp_path, True)
    inputs = read_inputs(recipe, objective, args, lambda line: None)
    model, _ = load_model(recipe.model, task=objective.head, labels=inputs.labels)
    trainer = make_trainer(
        Job.without_patches(recipe, model), recipe, model, args, Inputs(inputs.tokenizer, inputs.rows, None)
    )
    assert isinstance(trainer, trainer_class(objective)) and callable(evaluator(objective))
    made = next(iter(trainer.get_train_dataloader()))
    if isinstance(made, list):  # rows that the trainer samples replies to
        model.train()
        made = trainer.batch_of(trainer._prepare_inputs(made))
    example = objective.example_batch(*made["input_ids"].shape, trainer.args)
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {k: (v.shape, v.dtype) for k, v in made.items()}


@objectives
def test_what_it_trains_itself_is_undone(name):
    model = MODELS[OBJECTIVES[name][0]]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    surgery = methods.find("paca")(r=4).apply(model, PLACE)
    own = methods.find(name, "objective")().prepare(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    if (value := loss_of(name, model, tiny_batch(model)).value).requires_grad:
        value.backward()
    optimizer.step()
    for made in (own, surgery):
        with contextlib.nullcontext() if made is not None else contextlib.suppress(AttributeError):
            made.revert()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


@steppers
def test_a_stepper_leaves_gradients_and_lowers_the_loss(name):
    model = MODELS["llama"]()
    stepper: Stepper = methods.find(name, "stepper")(**STEPPERS[name])
    surgery = methods.find("paca")(r=4).apply(model, PLACE)
    extra, batch = stepper.prepare(model), tiny_batch(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if not p.requires_grad}
    args = type("Arguments", (), {"learning_rate": 2e-2, "weight_decay": 0.0, "world_size": 1})
    optimizer = stepper.optimizer(trained, args) or torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        value = stepper.backward(lambda: model(**batch).loss)
        assert value.shape == () and not value.requires_grad
        losses.append(float(value))
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(frozen[k], p) for k, p in model.named_parameters() if k in frozen)
    if extra is not None:
        extra.revert()
    surgery.revert()
