"""The plan equals the meter: what is traced without values is what real tensors take, for every method there is."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from conftest import MODELS
from tiny import ROWS, TOKENS, recipe_of
from trimtab.cost import trace
from trimtab.cost.overhead import THREAD, TRANSIENT_SHARE
from trimtab.engine.arguments import training_arguments
from trimtab.engine.objectives import arguments_class
from trimtab.engine.prepare import training_forward
from trimtab.errors import BadInput, Untraceable
from trimtab.memory.meter import LiveTensors
from trimtab.model.quant import quantised_state
from trimtab.planning.calibrate import known_overhead
from trimtab.planning.plan import plan
from trimtab.planning.step import PlannedStep
from trimtab.recipe import Recipe
from world import CASES

pytestmark = pytest.mark.filterwarnings("ignore")


def measured(recipe: Recipe, padded: bool = True, counted: int = TOKENS) -> int:
    """Live bytes at the peak of the second step, by the meter, on real tensors."""
    objective = recipe.load_objective()
    args = training_arguments(recipe, arguments_class(objective), "out", True)
    step = PlannedStep(recipe, args, None, real=True)  # its model, batch, loss and optimizer
    model = step.model
    held = [*step.base.values(), *quantised_state(model)]
    model.train()
    step._checkpointing()
    with training_forward(model, objective, recipe):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = step.optimizer(trained)
        micro = args.gradient_accumulation_steps

        def one() -> None:
            for _ in range(micro):
                batch = step.batch(ROWS, TOKENS)
                if padded and "attention_mask" in batch:
                    batch["attention_mask"][-1, -3:] = 0
                if batch["labels"].dim() > 1:
                    batch["labels"][:, : TOKENS - counted] = -100
                if "position_ids" in batch:
                    batch["position_ids"] = torch.arange(TOKENS // 2).repeat(ROWS, 2)
                step.stepper.backward(lambda batch=batch: step.loss(batch))
                del batch
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        one()
        state = [t for slots in optimizer.state.values() for t in slots.values() if torch.is_tensor(t)]
        tables = [t for surgery in step.surgeries for store in surgery.stores for t in store.mapped()]
        with LiveTensors([*held, *model.parameters(), *model.buffers(), *state], tables) as live:
            one()
    return live.peak_bytes


BOUND = {"meft": 0.3}  # a plan that is a bound (one expert may have all tokens at work), and by how much in tiny models


def close(recipe: Recipe, within: float = 0.02, bound: float = 0.0, **options) -> None:
    predicted, real = plan(recipe).live_peak_bytes, measured(recipe, **options)
    assert -within <= predicted / real - 1 <= max(within, bound), (
        f"{predicted:,} planned, {real:,} held ({predicted / real - 1:+.2%})"
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "bert", "mpnet"])
def test_a_plan_is_what_the_meter_finds(folders, name, dtype, family):
    """Promise 3, for live tensors: within 2 %."""
    recipe = recipe_of(folders(family, dtype), {name: CASES[name]})
    close(
        recipe, within=0.03 if family == "mpnet" else 0.02, bound=BOUND.get(name, 0.0)
    )  # of which a mask of 17 KB stays a little longer


@pytest.mark.parametrize(
    "patch,more",
    [
        ({"paca": {"r": 4, "selection": "random"}}, {}),
        ({"lora": {"r": 4, "dora": True}}, {}),
        ({"lora": {"r": 4, "dropout": 0.1}}, {}),
        ({"full": {"train": "norm"}}, {}),
        ({"full": {"dtype": "bf16"}}, {}),
        ({"paca": {"r": 4}}, {"training": {"activation_checkpointing": True}}),
        (
            {"paca": {"r": 4}},
            {"training": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}},
        ),
        ({"lora": {"r": 4, "fa": True}}, {}),
        ({"lora": {"r": 4, "fa": True}}, {"model": "nf4"}),
        ({"lora": {"r": 4, "fa": True, "dropout": 0.1}}, {"model": "int8"}),
        ({"lora": {"r": 4, "velora": True, "velora_groups": 8}}, {}),
        ({"lora": {"r": 4, "velora": True, "velora_groups": 8, "velora_init": "random"}}, {"model": "nf4"}),
        ({"paca": {"r": 4}}, {"training": {"gradient_accumulation_steps": 2}}),
        ({"full": {}}, {"training": {"gradient_accumulation_steps": 3}}),
        ({"full": {}}, {"training": {"optim": "adamw_torch"}}),
        ({"full": {}}, {"training": {"optim": "sgd"}}),
        ({"paca": {"r": 4}}, {"training": {"packing": True}}),
        ({"paca": {"r": 4}}, {"engine": {"recompute": "ffn"}}),
        ({"paca": {"r": 4}}, {"engine": {"fused_ops": False}}),
        ({"paca": {"r": 4}}, {"objective": {"causal_lm": {"chunk": 40}}}),
        ({"paca": {"r": 4}}, {"model": "fp32"}),
        ({"paca": {"r": 4}}, {"model": "nf4"}),
        ({"paca": {"r": 4}}, {"model": "int8"}),
        ({"lora": {"r": 4}}, {"model": "nf4"}),
        ({"lora": {"r": 4}}, {"model": "int8"}),
        ({"lora": {"r": 4, "dora": True}}, {"model": "nf4"}),
        ({"edora": {"r": 4}}, {"model": "nf4"}),
        ({"edora": {"r": 4}}, {"model": "int8"}),
        ({"parallel_adapter": {"r": 16}}, {"model": "nf4"}),
        ({"parallel_adapter": {"r": 16}}, {"model": "int8"}),
    ],
    ids=str,
)
def test_what_a_recipe_changes_is_traced(folders, patch, more):
    more = dict(more)
    precision = more.pop("model", "auto")
    recipe = recipe_of(folders("llama", torch.bfloat16), patch, **more)
    close(Recipe(**{**vars(recipe), "model": {"name": recipe.model.name, "precision": precision}}))


@pytest.mark.parametrize("name,fields", [("senszoq", {"density": 0.02}), ("lora", {"r": 4}), ("full", {})])
def test_forward_passes_only_are_planned_so(folders, name, fields):
    recipe = recipe_of(folders("llama", torch.bfloat16), {name: fields})
    two = {"directions": 2, "update": "adam"}
    stepped = dataclasses.replace(recipe, stepper={"mezo": two if name == "senszoq" else {}})
    close(stepped, within=0.03)
    assert not any("real step" in note for note in plan(stepped).notes)
    if name != "senszoq":  # two directions are four batches at once
        assert plan(stepped).live_peak_bytes < plan(recipe).live_peak_bytes


@pytest.mark.parametrize("metric", ["accuracy", "exact_match", "f1"])
def test_metrics_are_planned_without_values(folders, metric):
    recipe = recipe_of(folders("llama", torch.bfloat16), {"senszoq": {"density": 0.02}})
    black = dataclasses.replace(recipe, stepper="mezo", objective={"black_box": {"metric": metric}})
    assert not any("real step" in note for note in plan(black).notes)


def test_masked_positions_cost_no_logits(folders):
    recipe = recipe_of(folders("llama", torch.bfloat16), {"paca": {"r": 4}})
    predicted, real = plan(recipe, counted=5).live_peak_bytes, measured(recipe, counted=5)
    assert abs(predicted / real - 1) <= 0.02 and predicted < plan(recipe).live_peak_bytes


def test_what_a_patch_writes_into_a_mapped_base_is_fast(folders):
    recipes = [recipe_of(folders("llama", torch.bfloat16), {"paca": {"r": 4, "form": f}}) for f in ("side", "live")]
    side, live = (plan(recipe).kinds for recipe in recipes)
    linears = 2 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert live["weights"] - side["weights"] == side["mapped weights"] - live["mapped weights"] == linears


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("every", [0, 1, 2])
def test_two_shallow_models_tell_a_deep_one(folders, name, every, tmp_path):
    folder = deeper(folders("llama", torch.bfloat16), tmp_path, 7)
    kwargs = {"activation_checkpointing_kwargs": {"every_n_layers": every}} if every > 1 else {}
    recipe = recipe_of(folder, {name: CASES[name]}, training={"activation_checkpointing": every > 0, **kwargs})
    args = training_arguments(recipe, arguments_class(recipe.load_objective()), tmp_path, True)
    step = PlannedStep(recipe, args, None)
    cost = step.complete(step.trace(ROWS, TOKENS))
    whole = trace.highest(cost.peaks)
    extended = plan(recipe)
    assert extended.backward_transient == cost.backward_transient
    assert (cost.backward_transient > 0) == (name != "lst"), "under lst no block has a backward pass"
    assert extended.live_peak_bytes == trace.live(whole[1])
    assert extended.slow_bytes == whole[1].get(trace.MAPPED, 0) + whole[1].get(trace.ROWS, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"probes": 2, "cap": 3},
        {"router": "switch", "probes": 1},
        {"router": "stable"},
        {"semantics": "union", "router": "centroid"},
        {"router": "fixed"},
        {"adam": "exact"},
        {"moments": "int8"},
        {"balance": 0.01},
    ],
    ids=str,
)
def test_what_a_table_s_fields_change_is_traced(folders, fields):
    recipe = recipe_of(folders("llama", torch.bfloat16), {"meft": CASES["meft"] | fields})
    close(recipe, bound=BOUND["meft"])


def test_tables_that_step_at_once_are_planned_so(folders, tmp_path, monkeypatch):
    recipe = recipe_of(folders("llama", torch.bfloat16), {"meft": {"r": 1024}})
    args = training_arguments(recipe, arguments_class(recipe.load_objective()), tmp_path, True)
    held, beside = {}, {}
    for threads in (1, 2, 8):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        held[threads] = trace.live(PlannedStep(recipe, args, None).trace(ROWS, TOKENS).peaks["optimizer"])
        beside[threads] = plan(recipe).overhead
    rows, parts = 1024 * 2 * 64 * 4, len(("values", "grads", "m", "v"))
    assert held[2] - held[1] == parts * min(rows, 2**20), "a piece of the second of two tables"
    assert held[8] == held[2], "there are no more tables"
    more = [beside[n] - beside[1] for n in (2, 8)]
    assert more == pytest.approx([2 * THREAD, 4 * THREAD], rel=0.03), "and a share of the copies"
    assert plan(recipe_of(recipe.model.name, {"paca": {"r": 4}})).overhead < beside[8] - 3 * THREAD


def test_what_a_block_makes_and_drops_on_its_way_back(folders):
    with trace.Trace(fake=False) as traced:
        kept = torch.empty(1000)
        traced.enter("backward of the blocks between")
        more = torch.empty(100)
        torch.empty(50)
        traced.enter("optimizer")
        del more
        torch.empty(5000)
        traced.enter("end")
        assert traced.backward_transient == 4 * 150
        del kept
    plain, again = (
        plan(recipe_of(folders("llama", torch.bfloat16), {"lora": {"r": 4}}, training={"activation_checkpointing": on}))
        for on in (False, True)
    )
    beside = known_overhead()
    assert again.backward_transient > 1.5 * plain.backward_transient, "what was kept without is made again"
    growth = again.predicted()["live_growth_bytes"]
    assert again.overhead == beside.of(growth) + round(TRANSIENT_SHARE * again.backward_transient)


def test_a_cache_of_all_layers_is_counted_once(folders, tmp_path):
    """Shared out over two layers of a shallow stack it would be larger in each than over all twelve."""
    folder = deeper(folders("llama", torch.bfloat16), tmp_path, 12)
    plain, cached = (
        plan(recipe_of(folder, {"meft": {"r": 64, "experts": 32, "cache": cache}})) for cache in (0.0, 2e5 / 2**30)
    )
    extent = 4 * 2 * 2 * 64 * 4  # numbers of 2 pairs, with m, v and the gradient
    assert cached.kinds["adapter"] - plain.kinds["adapter"] == 12 * (200_000 // 12 // extent) * extent > 0
    assert cached.live_peak_bytes - plain.live_peak_bytes == cached.kinds["adapter"] - plain.kinds["adapter"]


def test_blocks_that_differ_are_traced_whole(folders, tmp_path):
    folder = deeper(folders("llama", torch.bfloat16), tmp_path, 6)
    recipe = recipe_of(folder, {"lora": {"r": 4, "targets": "layers.5.*q_proj"}})
    args = training_arguments(recipe, arguments_class(recipe.load_objective()), tmp_path, True)
    step = PlannedStep(recipe, args, None)
    assert step.period() == 6
    assert plan(recipe).kinds["adapter"] == 2 * 4 * 64 * 4


@pytest.mark.parametrize("depth", [7, 8])
def test_kinds_of_blocks_that_take_turns(folders, depth, tmp_path):
    folder = deeper(folders("gemma2", torch.bfloat16), tmp_path, depth, layer_types=None, sliding_window=8)
    recipe = recipe_of(folder, {"paca": {"r": 4}})
    args = training_arguments(recipe, arguments_class(recipe.load_objective()), tmp_path, True)
    step = PlannedStep(recipe, args, None)
    assert step.period() == 2
    assert plan(recipe).live_peak_bytes == trace.live(trace.highest(step.trace(ROWS, TOKENS).peaks)[1])


def test_evaluation_on_the_way_is_part_of_the_run(folders):
    data = {"train": "train.jsonl", "test": "test.jsonl"}
    eager = {"eval_strategy": "steps", "per_device_eval_batch_size": 64 * ROWS}
    small, big = (
        recipe_of(folders("llama", torch.bfloat16), {"paca": {"r": 4}}, data=data, training=training)
        for training in ({}, eager)
    )
    small, big = (plan(recipe, tokens=TOKENS) for recipe in (small, big))
    assert big.phase == "evaluation" and big.live_peak_bytes > small.live_peak_bytes


def test_another_device_is_planned_from_here(folders):
    recipe = recipe_of(folders("llama", torch.bfloat16), {"paca": {"r": 4}}, place="cuda", budget={"fast": "24GiB"})
    made = plan(recipe)
    assert made.fits and made.slow_bytes == 0 and made.process == 0 and made.kinds["weights"] > 0
    assert any("not yet measured" in note for note in made.notes)
    with pytest.raises(BadInput, match="this machine has no such device"):
        plan(Recipe(**{**vars(recipe), "budget": {"fast": "80%"}}))


def test_rows_that_go_to_a_device_are_counted(folders):
    """A layer's rows, of 2 x 64 numbers a pair: all of them while it computes, and those on their way ahead of it."""
    fields = {"r": 64, "experts": 16, "probes": 4, "k": 8, "prefetch": "none"}
    plain, ahead, wide = (
        plan(recipe_of(folders("llama", torch.bfloat16), {"meft": {**fields, **more}}, place="cuda",
                       budget={"fast": "24GiB"}))
        for more in ({}, {"prefetch": "known"}, {"r": 4096, "experts": 1024})
    )  # fmt: skip
    layer = 64 * 2 * 64 * 4
    assert ahead.fast_peak_bytes - plain.fast_peak_bytes == layer
    assert wide.live_peak_bytes - plain.live_peak_bytes >= 63 * layer
    assert plain.slow_bytes == 2 * 4 * (layer + 16 * 64 * 4), "values, moments and gradients of pairs and routers"
    assert not any("a real step was run" in note for note in plain.notes)
    assert [any("copied before they are used" in note for note in made.notes) for made in (plain, ahead)] == [
        False,
        True,
    ]


def test_what_cannot_be_traced_is_stepped_for_real(folders, monkeypatch):
    recipe = recipe_of(folders("llama", torch.bfloat16), {"paca": {"r": 4}})
    traced = plan(recipe)

    def step_cost(*_):
        raise Untraceable("plan a step", "the planner cannot trace it (SomeError: aten.odd)", "Remove budget:")

    monkeypatch.setattr("trimtab.planning.plan.step_cost", step_cost)
    stepped = plan(recipe)
    assert abs(stepped.live_peak_bytes / traced.live_peak_bytes - 1) <= 0.02
    assert any("a real step was run" in note and "aten.odd" in note for note in stepped.notes)
    folder = deeper(recipe.model.name, Path(recipe.model.name), 2)
    with pytest.raises(Untraceable, match="aten.odd"):
        plan(recipe_of(folder, {"paca": {"r": 4}}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("patch", [{"lora": {"r": 4}}, {"full": {}}], ids=str)
def test_a_mixture_is_traced_in_each_precision(folders, patch, dtype, logged):
    recipe = recipe_of(folders("mixtral", dtype), patch)
    made = plan(recipe)
    assert not any("a real step was run" in note for note in made.notes) and logged == []
    close(recipe, within=0.05)


def test_what_cannot_be_traced_is_said_once(folders, logged):
    model = MODELS["llama"]()
    with pytest.raises(Untraceable, match="cannot trace it"):
        trace.trace_inference(model, lambda *_: trace.WEIGHTS, lambda _: torch.ones(2, 3) @ torch.ones(2, 3))
    assert logged == []


@pytest.fixture
def logged():
    """The lines that PyTorch logs about operations which it cannot trace."""
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("torch._subclasses.fake_tensor")
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def deeper(folder: str, tmp_path, depth: int, **more) -> str:
    """A config alone: no weights, no tokenizer."""
    config = json.loads(open(f"{folder}/config.json").read()) | {"num_hidden_layers": depth, **more}
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "deep")


def test_a_plan_leaves_nothing_behind(folders):
    recipe = recipe_of(folders("llama", torch.bfloat16), {"paca": {"r": 4}})
    before = torch.random.get_rng_state()
    plan(recipe)
    assert torch.equal(before, torch.random.get_rng_state())
    close(recipe, padded=False, within=0.2)  # and no fake mask meets a real query
