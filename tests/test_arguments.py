"""Each field of the libraries' training arguments is honoured or refused; a run that diverges is ended."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments
from trl import GRPOConfig, SFTConfig

from conftest import MODELS, tiny_batch
from helpers_run import films, make_world, tree, write_rows
from trimtab import methods
from trimtab.engine.arguments import training_arguments
from trimtab.engine.divergence import Diverged, StopIfDiverged
from trimtab.engine.fields import HONOURED, NEEDS, RANGES, REFUSED
from trimtab.errors import BadInput, Stopped
from trimtab.methods.meft import Meft
from trimtab.recipe import Recipe
from trimtab.tiered.adam import Rates
from world import PLACE

FIELDS = {f.name: f for cls in (TrainingArguments, GRPOConfig, SFTConfig) for f in dataclasses.fields(cls) if f.init}
OTHER = {"eval_strategy": "steps", "save_strategy": "steps", "packing": True}  # so that it is not these that refuse


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def made(cls=SFTConfig, cpu=True, **training) -> TrainingArguments:
    return training_arguments(Recipe(model="x", training=training), cls, Path("unused"), cpu)


def test_every_field_is_in_one_table():
    assert not HONOURED & REFUSED.keys()
    assert FIELDS.keys() == HONOURED | REFUSED.keys()
    assert RANGES.keys() | NEEDS.keys() <= HONOURED


def another(name: str):
    """A value of the field's kind that is not its default."""
    kind = str(FIELDS[name].type)
    default = FIELDS[name].default
    if name == "disable_tqdm":
        return False
    if "bool" in kind and name not in ("liger_kernel_config",):
        return not default
    if "list[str]" in kind and "None" not in kind:
        return ["x"]
    return {"x": True} if "dict" in kind else 7 if "int" in kind else "every_save_" if name == "hub_strategy" else "x"


def _names(cls) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "parallelism_config"])
def test_what_would_be_ignored_is_refused(name):
    cls = next(cls for cls in (TrainingArguments, SFTConfig, GRPOConfig) if name in _names(cls))
    with pytest.raises(BadInput, match=name):
        made(cls, **{name: another(name)})


@pytest.mark.parametrize("name,value", [
    ("max_steps", -5), ("max_steps", 0), ("num_train_epochs", 0), ("num_train_epochs", -1), ("learning_rate", -1e-3),
    ("learning_rate", math.nan), ("learning_rate", math.inf), ("gradient_accumulation_steps", 0),
    ("per_device_train_batch_size", 0), ("max_grad_norm", -1.0), ("warmup_steps", -1), ("label_smoothing_factor", 1.0),
    ("adam_beta1", 1.0), ("max_length", 0), ("save_total_limit", 0), ("logging_steps", 0), ("weight_decay", -0.1),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(BadInput, match=f"{name}.* it must be"):
        made(**OTHER, **{name: value})


@pytest.mark.parametrize("name", NEEDS)
def test_what_acts_with_another_field_only_needs_it(name):
    value = {"greater_is_better": True, "eval_on_start": True, "eval_packing": False, "packing_strategy": "wrapped",
             "metric_for_best_model": "loss", "optim_target_modules": "all-linear",
             "activation_checkpointing_kwargs": {"every_n_layers": 2}}.get(name, 3)  # fmt: skip
    with pytest.raises(BadInput, match=f"{name}.*{NEEDS[name][0]}"):
        made(**{name: value})


def test_a_classifier_packs_nothing_and_a_cpu_offloads_nothing():
    with pytest.raises(BadInput, match="packing"):
        made(TrainingArguments, packing=True)
    again = {"activation_checkpointing": True}
    for options, words in (
        ({"offload": True}, "on a CPU activations are in RAM already"), ({"every_n_layers": 0}, "every n-th block"),
        ({"every_n_layers": "two"}, "every n-th block"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=words):
            made(**again, activation_checkpointing_kwargs=options)
    offloaded = made(cpu=False, **again, activation_checkpointing_kwargs={"offload": True, "every_n_layers": 2})
    assert offloaded.activation_checkpointing_kwargs == {"offload": True, "every_n_layers": 2}
    with pytest.raises(BadInput, match="activation_offloading"):
        made(activation_offloading=True)
    assert made(cpu=False, activation_offloading=True).activation_offloading


# --- MEFT's rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adamw_8bit", "rmsprop"])
def test_rows_of_tables_refuse_what_is_not_adam(optim, world, tmp_path):
    patch = {"meft": {"r": 64, "k": 16}}
    recipe = Recipe.from_dict(tree(world, tmp_path / "run", patch, optim=optim, max_steps=1))
    for verb in (recipe.plan, recipe.train):
        with pytest.raises(BadInput, match=f"optim: {optim} with Meft"):
            verb()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adam(p, amsgrad=True), lambda p: torch.optim.RMSprop(p),
])  # fmt: skip
def test_in_a_strangers_loop_too(optimizer):
    model = MODELS["llama"]()
    surgery = Meft(r=64, k=16).apply(model, PLACE)
    try:
        stepped = optimizer([p for p in model.parameters() if p.requires_grad])
        model(**tiny_batch(model)).loss.backward()
        with pytest.raises(BadInput, match="only Adam and AdamW can step rows in the slow tier"):
            stepped.step()
    finally:
        surgery.revert()


def test_rows_take_the_rates_of_their_own_group_and_an_eps_of_zero():
    one, two = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    groups = [{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.2, "eps": 0.0, "betas": (0.5, 0.6)}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.3)
    assert Rates.of(optimizer, one) == Rates(0.1, weight_decay=0.3)
    assert Rates.of(optimizer, two) == Rates(0.2, (0.5, 0.6), 0.0, 0.3)


# --- micro-batches of a classifier -----------------------------------------------------------------------------------


def test_a_classifiers_mean_is_over_all_rows_of_a_step(world, tmp_path):
    """N5 of the outside review: six rows as 4 + 2, as 3 + 3 and as 6 are one and the same step."""
    words = {"good": "a", "bad": "b", "a name": "a", "good good": "b", "bad film": "b", "the": "a"}
    texts = [{"text": f"the film is {word}", "label": label} for word, label in words.items()]
    rows = write_rows(tmp_path / "six.jsonl", texts)
    losses = {}
    for micro, times in ((6, 1), (3, 2), (4, 2)):
        keys = films(world, tmp_path / f"run{micro}", {"full": {}}, per_device_train_batch_size=micro,
                     gradient_accumulation_steps=times, optim="sgd", num_train_epochs=2, learning_rate=0.1,
                     train_sampling_strategy="sequential", max_grad_norm=0.0, lr_scheduler_type="constant")  # fmt: skip
        del keys["data"]["test"]
        Recipe.from_dict({**keys, "data": {"train": str(rows)}}).train()
        found = (tmp_path / f"run{micro}" / "metrics.jsonl").read_text().splitlines()
        losses[micro] = [row["loss"] for row in map(json.loads, found) if "loss" in row]
    assert len(losses[6]) == 2
    assert losses[3] == pytest.approx(losses[6], abs=1e-5) and losses[4] == pytest.approx(losses[6], abs=1e-5)


# --- defaults and divergence -----------------------------------------------------------------------------------------


def test_defaults_are_the_methods_own():
    def rate(*patches, **training):
        return Recipe(model="x", patches=list(patches), training=training).training_values()["learning_rate"]

    for name in methods.names("patch", "train"):
        assert rate(name) == methods.find(name).defaults["learning_rate"], name
    assert rate("paca", "pruning", "streaming_llm") == rate("paca")
    assert rate("paca", "meft") == rate("meft", "paca") == rate("meft") < rate("paca")
    assert rate("meft", learning_rate=1.0) == 1.0


def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_move(world, tmp_path):
    keys = tree(world, tmp_path / "run", {"full": {}}, max_steps=12, save_strategy="steps", save_steps=1,
                learning_rate=1e30, max_grad_norm=0.0, optim="sgd", lr_scheduler_type="constant")  # fmt: skip
    with pytest.raises(Stopped, match=r"of step \d+ is .*overwrite=true and training.learning_rate=2.5e\+29") as error:
        Recipe.from_dict(keys).train()
    assert error.value.exit_code == 4 and not (tmp_path / "run" / "adapter").exists()
    off = Recipe.from_dict({**keys, "engine": {"allocator": "none", "stop_if_diverged": False}, "overwrite": True})
    assert off.train()["steps"] == 12


class Losses:
    """A trainer that tells these losses."""

    grad_norm = 1.0

    def __init__(self, losses):
        self.losses = iter(losses)

    def step_loss(self) -> float:
        return next(self.losses)


def fed(*losses: float, chance: float | None = math.log(262_144)) -> tuple[int, int] | None:
    """-> (the step that stopped the run, the last good step), or None."""
    watch = StopIfDiverged(Losses(losses), chance)
    for done in range(len(losses)):
        state = type("State", (), {"global_step": done})
        try:
            watch.on_pre_optimizer_step(None, state, None)
        except Diverged as found:
            return done + 1, found.good
    return None


def test_what_counts_as_diverged():
    assert fed(2.0, 1.9, 62.7, 28.6) == (4, 1), "as MEFT's at 1e-3 on a Gemma 3; the first step's weights were good"
    assert fed(2.0, 1.9, 62.7, 1.9, 30.0, 2.0) is None, "one odd batch is none"
    assert fed(60.0, 55.0, 50.0, 45.0) is None, "it began there"
    assert fed(2.0, 1.9, 12.0, 12.0) is None, "no worse than a guess"
    assert fed(2.0, math.nan) == (2, 1) and fed(math.inf) == (1, 0)
    assert fed(0.5, 100.0, 200.0, 300.0, chance=None) is None, "regression has no scale of its own"


# --- options of the loss and of rows (N6 of the outside review) ------------------------------------------------------


def first_loss(world, output, **training) -> float:
    keys = tree(world, output, {"full": {}}, max_steps=1, per_device_train_batch_size=15, **training)
    recipe = Recipe.from_dict({**keys, "data": {**keys["data"], "too_long": "cut"}})
    recipe.train()
    return next(row["loss"] for row in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()))


@pytest.mark.parametrize("training", [
    {"label_smoothing_factor": 0.5}, {"loss_type": "dft"}, {"max_length": 16},
    {"max_length": 6, "truncation_mode": "keep_end"},
])  # fmt: skip
def test_options_of_the_loss_give_what_trl_gives(training, world, tmp_path):
    """The first step's loss on all rows beside TRL's own trainer with the same fields."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer

    ours = first_loss(world, tmp_path / "run", **training)
    rows = [json.loads(line) for line in (world / "facts.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(world / "llama")
    recipe = Recipe.from_dict(tree(world, tmp_path / "x", {"full": {}}))
    from trimtab.data.rows import read_rows

    theirs = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(world / "llama", dtype=torch.float32),
        SFTConfig(output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=len(rows), use_cpu=True,
                  bf16=False, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
                  **{"max_length": 48, **training}),
        train_dataset=Dataset.from_list(list(read_rows(recipe.data, "train", tokenizer).dataset)),
        processing_class=tokenizer,
    )  # fmt: skip
    theirs.train()
    wanted = next(row["loss"] for row in theirs.state.log_history if "loss" in row)
    plain = first_loss(world, tmp_path / "plain")
    assert ours == pytest.approx(wanted, abs=2e-4) and abs(ours - plain) > 1e-3


def test_smoothing_and_dft_do_not_go_together_and_numbers_are_not_smoothed(world, tmp_path):
    with pytest.raises(BadInput, match="label_smoothing_factor with loss_type: dft"):
        first_loss(world, tmp_path / "run", label_smoothing_factor=0.1, loss_type="dft")
    rows = write_rows(tmp_path / "n.jsonl", [{"text": "the film", "label": 0.5}, {"text": "a name", "label": 1.5}])
    keys = films(world, tmp_path / "numbers", {"full": {}}, max_steps=1, label_smoothing_factor=0.1)
    with pytest.raises(BadInput, match="label smoothing: the labels of data.train are numbers"):
        Recipe.from_dict({**keys, "data": {"train": str(rows)}}).train()


def test_evaluation_is_of_plain_cross_entropy(world, tmp_path):
    keys = tree(world, tmp_path / "run", {"paca": {"r": 4}})
    data = {"train": keys["data"]["train"], "test": keys["data"]["train"], "metrics": []}
    plain, smoothed = (
        Recipe.from_dict({**keys, "data": data, "training": {**keys["training"], **more}}).evaluate(base_only=True)
        for more in ({}, {"label_smoothing_factor": 0.5})
    )
    assert plain["metrics"] == smoothed["metrics"]


def test_a_schedules_options_are_tried_before_anything_is_loaded():
    assert made(lr_scheduler_type="cosine", lr_scheduler_kwargs={"num_cycles": 0.3})
    with pytest.raises(BadInput, match="num_cyclez"):
        made(lr_scheduler_type="cosine", lr_scheduler_kwargs={"num_cyclez": 3})


def test_a_text_of_one_token_has_a_label_to_train_on(world, tmp_path):
    rows = write_rows(tmp_path / "short.jsonl", [{"text": "the", "label": "a"}, {"text": "good", "label": "b"}])
    keys = films(world, tmp_path / "run", {"full": {}}, max_steps=1)
    assert Recipe.from_dict({**keys, "data": {"train": str(rows)}}).train()["steps"] == 1
