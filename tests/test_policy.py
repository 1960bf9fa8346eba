"""Runs that reward sampled replies: S-GRPO, T-SPMO and GRPO on a tiny model, from the recipe to the adapter."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from helpers_run import POLICIES as OBJECTIVES
from helpers_run import left, make_world, prompts
from trimtab.data.rewards import RewardFailed
from trimtab.engine.arguments import training_arguments, weighed
from trimtab.engine.inputs import make_trainer, read_inputs
from trimtab.engine.job import Job
from trimtab.engine.objectives import arguments_class
from trimtab.engine.prepare import training_forward
from trimtab.errors import BadInput, Stopped
from trimtab.model.load import load_model
from trimtab.model.prefix_trie import PrefixTrie
from trimtab.model.rollouts import sample_groups, sample_with_replays
from trimtab.recipe import Recipe
from trimtab.report.report import report
from trimtab.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore")
objectives = pytest.mark.parametrize("name", OBJECTIVES)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def recipe(world, output, name="s_grpo", patch=None, data=None, **training):
    made = prompts(
        world, output, patch or {"lora": {"r": 4}}, OBJECTIVES[name] if isinstance(name, str) else name, **training
    )
    made["data"] |= data or {}
    return Recipe.from_dict(made)


def trainer_of(made: Recipe, tmp_path):
    """The trainer of a recipe without patches, all weights trained."""
    objective = made.load_objective()
    args = training_arguments(made, arguments_class(objective), tmp_path, True)
    inputs = read_inputs(made, objective, args, lambda line: None)
    model, _ = load_model(made.model, task="causal-lm")
    model.float().requires_grad_(True)
    job = dataclasses.replace(Job.without_patches(made, model), objective=weighed(objective, args))
    trainer = make_trainer(job, made, model, args, inputs)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def gradient(trainer, inputs):
    trainer.model.zero_grad()
    with training_forward(trainer.model, trainer.objective, Recipe(engine={"fused_ops": False})):
        value = trainer.compute_loss(trainer.model, inputs)
        value.backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]), value


@objectives
def test_a_run(name, world, tmp_path):
    run = recipe(world, tmp_path / "run", name, max_steps=3).train()
    assert run["steps"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "reward" in line)
    assert {"rewards/contains/mean", "frac_reward_zero_std", "completions/mean_length"} <= first.keys()
    assert (tmp_path / "run/adapter").is_dir()


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_with_all_tokens_s_grpo_has_trls_gradient(beta, world, tmp_path):
    """The same rollouts through TRL's own loss (loss_type grpo): equal gradients, also with the divergence."""
    torch.manual_seed(0)
    ours = trainer_of(recipe(world, tmp_path, {"s_grpo": {"alpha": 99, "k": 99}}, beta=beta), tmp_path)
    rows = next(iter(ours.get_train_dataloader()))
    with torch.no_grad():  # so that the reference is another model than the policy
        for parameter in ours.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-2 if beta else 0.0)
    inputs = ours._prepare_inputs(rows)
    assert inputs["advantages"].any() and (inputs["weights"] != 0).sum() > 8
    found, _ = gradient(ours, inputs)
    theirs = trainer_of(recipe(world, tmp_path, "grpo", loss_type="grpo", beta=beta), tmp_path)
    theirs.model.load_state_dict(ours.model.state_dict())
    wanted, _ = gradient(theirs, inputs)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_t_spmo_is_the_mean_over_the_pairs(world, tmp_path):
    """Against a loop over the (prefix, token) pairs of each prompt, one row and one forward pass each."""
    torch.manual_seed(0)
    trainer = trainer_of(recipe(world, tmp_path, "t_spmo", temperature=0.8), tmp_path)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert (inputs["weights"] != 0).any()
    found, _ = gradient(trainer, inputs)
    trainer.model.zero_grad()
    total = torch.zeros(())
    for group in (slice(0, 4), slice(4, 8)):
        ids, mask, scores = (inputs[key][group] for key in ("completion_ids", "completion_mask", "advantages"))
        texts = [row[: int(m.sum())].tolist() for row, m in zip(ids, mask, strict=True)]
        before = inputs["prompt_ids"][group][0][inputs["prompt_mask"][group][0].bool()].tolist()

        def through(p, texts=texts, scores=scores):
            return [float(s) for t, s in zip(texts, scores, strict=True) if t[: len(p)] == p]

        pairs = {tuple(t[: at + 1]) for t in texts for at in range(len(t))}
        pairs = [list(p) for p in pairs if len(through(list(p))) < len(through(list(p)[:-1]))]
        for pair in pairs:
            gain = sum(through(pair)) / len(through(pair)) - sum(through(pair[:-1])) / len(through(pair[:-1]))
            logits = trainer.model(input_ids=torch.tensor([before + pair[:-1]])).logits[0, -1] / 0.8
            total = total - gain * logits.log_softmax(-1)[pair[-1]] / len(pairs) / 2
    total.backward()
    wanted = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert len(trainer.batch_of(inputs)["input_ids"]) <= 2, "one tree for each prompt"


def test_completions_without_an_advantage_cost_nothing(world, tmp_path):
    trainer = trainer_of(recipe(world, tmp_path), tmp_path)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs["advantages"][:4], inputs["weights"][:4] = 0.0, 0.0
    inputs["weights"][4:] = inputs["completion_mask"][4:] * 1.0
    whole, batch = trainer.batch_of(inputs), inputs["completion_ids"].shape[1]
    assert len(whole["input_ids"]) == 4 and whole["input_ids"].shape[1] <= 48 + batch
    inputs["weights"][:] = 0.0
    assert trainer.batch_of(inputs) is None
    value = trainer.compute_loss(trainer.model, inputs)
    value.backward()
    assert float(value.detach()) == 0.0


@pytest.mark.parametrize("name,training", [
    ("s_grpo", {}), ("t_spmo", {"gradient_accumulation_steps": 2}),
    ("grpo", {"steps_per_generation": 2, "num_iterations": 2}),  # the checkpoint lies between updates of one rollout
    ("grpo", {"steps_per_generation": 2, "use_adaptive_entropy": True}),
])  # fmt: skip
def test_a_resumed_run_is_the_whole_run(name, training, world, tmp_path):
    """Five prompts, so that the checkpoint at step 3 lies in the second epoch; all files and states are equal."""
    more = {"save_strategy": "steps", "save_steps": 1, "data": {"limit": 5}, **training}
    whole = recipe(world, tmp_path / "whole", name, max_steps=6, **more)
    whole.train()
    half = recipe(world, tmp_path / "half", name, max_steps=6, **more)
    from world import at_step

    class Enough(Exception):
        pass

    def stop():
        raise Enough

    with pytest.raises(Enough), at_step(4, stop):
        half.train()
    dataclasses.replace(half, resume=True).train()
    ours, theirs = left(tmp_path / "half"), left(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        same = torch.equal(value, ours[key]) if isinstance(value, torch.Tensor) else value == ours[key]
        assert same, key


# --- bad input --------------------------------------------------------------------------------------------------------

REWARDS = """
calls = 0
def fine(completions, answer, answers, **more):
    assert answers[0][0] == answer[0] and {"prompts", "completion_ids", "trainer_state"} <= more.keys()
    return [float(len(text[-1]["content"]) if isinstance(text, list) else len(text)) for text in completions]
def raises(completions, **more):
    global calls
    calls += 1
    return [1 / (3 - calls) for _ in completions]
def nan(completions, **more):
    return [float("nan"), *[1.0] * (len(completions) - 1)]
def short(completions, **more):
    return [1.0]
def words(completions, **more):
    return ["good" for _ in completions]
def none(completions, **more):
    return [None if i % 2 else float(i) for i, _ in enumerate(completions)]
"""


@pytest.fixture
def rewards(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    return lambda name: {"rewards": [f"{tmp_path}/mine.py:{name}", "contains"]}


@pytest.mark.parametrize("name", ["fine", "none"])
def test_a_reward_of_ones_own(name, rewards, world, tmp_path):
    run = recipe(world, tmp_path / "run", data=rewards(name), max_steps=2).train()
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert run["steps"] == 2 and f"rewards/mine:{name}/mean" in line


@pytest.mark.parametrize("name,why", [("nan", "not finite"), ("short", "returned 1 values"), ("words", "not finite")])
def test_a_reward_that_returns_something_else(name, why, rewards, world, tmp_path):
    with pytest.raises(RewardFailed, match=why) as error:
        recipe(world, tmp_path / "run", data=rewards(name), max_steps=2).train()
    assert "mine:" + name in str(error.value) and "8 replies" in str(error.value)


def test_a_reward_that_raises_stops_the_run_with_a_checkpoint(rewards, world, tmp_path):
    made = recipe(world, tmp_path / "run", data=rewards("raises"), max_steps=4)
    with pytest.raises(Stopped, match="ZeroDivisionError.*checkpoint-2 is complete") as error:
        made.train()
    assert error.value.exit_code == 4 and "call 3" in str(error.value)
    (tmp_path / "mine.py").write_text(REWARDS.replace("3 - calls", "9 - calls"))
    assert dataclasses.replace(made, resume=True).train()["steps"] == 4


@pytest.mark.parametrize("data,training,what", [
    ({"rewards": []}, {}, "data.rewards names none"),
    ({"rewards": ["exact_matc"]}, {}, "exact_match"),
    ({"rewards": [{"contains": {"wait": 2}}]}, {}, "no such setting"),
    ({"rewards": [{"contains": "x"}]}, {}, "no number"),
    ({"rewards": [{"regex": "("}]}, {}, "no regular expression"),
    ({"rewards": [{"length": 0}]}, {}, "no number of tokens"),
    ({"rewards": ["contains", {"contains": 2}]}, {}, "named twice"),
    ({"rewards": ["nowhere:x"]}, {}, "cannot be imported"),
    ({"rewards": ["json:x"]}, {}, "has no function x"),
    ({}, {"use_vllm": True}, "vLLM"),
    ({}, {"use_transformers_continuous_batching": True}, "samples the replies itself"),
    ({}, {"reward_weights": [1.0]}, "belong to the data"),
    ({}, {"log_completions": True}, "completions.jsonl"),
    ({}, {"num_generations": 1}, "2 or more"),
    ({}, {"num_generations": 3}, "divisible"),
    ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, "divisible"),
    ({}, {"epsilon": 0.1}, "nothing is clipped"),
    ({}, {"top_entropy_quantile": 0.5}, "at random"),
    ({}, {"steps_per_generation": 2}, "no correction"),
    ({}, {"max_completion_length": 44}, "no room"),
    ({}, {"max_length": 9}, "no room"),
    ({"limit": 1}, {}, "data.train has 1"),
    ({}, {"label_smoothing_factor": 0.1}, "no labels"),
    ({}, {"temperature": 0}, "above 0"),
])  # fmt: skip
def test_bad_input(data, training, what, world, tmp_path):
    with pytest.raises(BadInput, match=what) as error:
        recipe(world, tmp_path / "run", data=data, max_steps=1, **training).train()
    assert error.value.do and not (tmp_path / "run").exists()


@pytest.mark.parametrize("fields,what", [
    ({"alpha": 5, "k": 4}, "at least alpha"), ({"p": 1.5}, "between 0 and 1"), ({"p": 0, "unbiased": True}, "make up"),
])  # fmt: skip
def test_bad_fields(fields, what, world, tmp_path):
    with pytest.raises(BadInput, match=what):
        recipe(world, tmp_path / "run", {"s_grpo": fields}).load_objective()


def test_equal_groups_are_told(world, tmp_path):
    said = []
    made = recipe(world, tmp_path / "run", data={"rewards": [{"regex": "zzz"}]}, max_steps=22, max_completion_length=2)
    train(made, say=said.append)
    assert len([line for line in said if "for 20 rollouts" in line]) == 1


def test_prompts_that_are_too_long_may_be_dropped(world, tmp_path):
    said = []
    made = recipe(world, tmp_path / "run", data={"too_long": "drop"}, max_steps=1, max_length=8 + 14)
    train(made, say=said.append)
    assert any("prompts of data.train leave no room" in line for line in said)


def test_the_tree_of_real_rollouts_has_fewer_tokens(world, tmp_path):
    trainer = trainer_of(recipe(world, tmp_path, "t_spmo", temperature=0.3), tmp_path)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trie = PrefixTrie.of(inputs["completion_ids"][:4], inputs["completion_mask"][:4])
    assert int((inputs["weights"][:4] != 0).sum()) <= 2 * 3 and len(trie.parent) <= 1 + 4 * 8


def test_eval_reports_the_rewards(world, tmp_path):
    data = {"test": str(world / "facts.jsonl")}
    made = recipe(world, tmp_path / "run", data=data, max_steps=1)
    made.train()
    found = made.evaluate(limit=3)
    assert found["rows"] == 3
    names = {f"{kind}{name}" for name in ("contains", "length") for kind in ("", "mean@4 ", "pass@4 ")}
    assert found["metrics"].keys() == {"reward", *names}
    total = found["metrics"]["contains"] + found["metrics"]["length"]
    assert found["metrics"]["reward"] == pytest.approx(total)
    assert found["metrics"]["pass@4 contains"] >= 0 and json.loads((tmp_path / "run/eval.json").read_text())["samples"]


# --- plan, caches, display --------------------------------------------------------------------------------------------


@objectives
def test_a_plan_covers_rollouts_and_update(name, world, tmp_path):
    """The tensors of the metered step's update are what the plan says, or fewer: fewer tokens are sampled."""
    made = recipe(world, tmp_path / "run", name, max_steps=3)
    plan = made.plan()
    assert [phase for phase, _, _ in plan.phases] == ["rollouts", "update"] and all(size for _, size, _ in plan.phases)
    assert any(line.startswith("rollouts") for line in plan.lines())
    assert made.train()["measured"]["live_peak_bytes"] <= 1.02 * plan.live_peak_bytes


def test_rollouts_count_where_they_are_the_peak(world, tmp_path):
    """Many replies to each update: the peak is the cache of the rollouts, as measured."""
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 64, "num_generations": 64}
    made = recipe(world, tmp_path / "run", {"s_grpo": {"alpha": 1, "k": 1}}, max_completion_length=24, **training)
    plan = made.plan()
    assert plan.phase.startswith("rollouts") and plan.kinds["cache"] > 0
    run = dataclasses.replace(made, training={**made.training, "max_steps": 3}).train()
    assert run["measured"]["phase"] == "rollouts"
    assert run["measured"]["live_peak_bytes"] <= 1.1 * plan.live_peak_bytes


def test_rollouts_with_a_kv_policy(world, tmp_path):
    made = prompts(world, tmp_path / "run", {"lora": {"r": 4}}, "s_grpo", max_steps=2)
    made["patches"].append({"streaming_llm": {"window": 12, "sinks": 2}})
    assert Recipe.from_dict(made).train()["steps"] == 2
    made["patches"][1] = {"snapkv": {"budget": "auto"}}
    with pytest.raises(BadInput, match="budget: auto in training"):
        Recipe.from_dict({**made, "output": str(tmp_path / "other")}).train()


def test_embedding_pruning_is_refused(world, tmp_path):
    made = prompts(world, tmp_path / "run", {"lora": {"r": 4}}, "s_grpo", max_steps=1)
    made["patches"].insert(0, "embedding_pruning")
    with pytest.raises(BadInput, match="sampled replies may have tokens"):
        Recipe.from_dict(made).train()


def test_a_group_shares_its_prompt(world, tmp_path):
    """One completion at a time and the whole group, both greedy: the same tokens."""
    trainer = trainer_of(recipe(world, tmp_path), tmp_path)
    settings = {**trainer.sampling, "do_sample": False}
    for key in ("temperature", "top_p", "top_k"):
        settings.pop(key, None)
    asked = [[2, 12, 9, 13], [2, 5, 6, 7, 8, 9, 10]]
    widths = []
    hook = trainer.model.model.embed_tokens.register_forward_hook(lambda m, args, out: widths.append(args[0].shape))
    together = sample_groups(trainer.model, trainer.processing_class, asked, 3, settings)
    hook.remove()
    assert widths[0] == (2, 6) and widths[1] == (6, 1), "each prompt is read once"
    for at, prompt in enumerate(asked):
        (alone,) = sample_groups(trainer.model, trainer.processing_class, [prompt], 1, settings)
        assert together[3 * at : 3 * at + 3] == [alone] * 3


def test_replays_start_with_a_part_of_another_reply():
    asked = []

    def sample(prompts, generations, longest):
        asked.append((prompts, generations, longest))
        return [[10 * at + g, *range(90, 90 + longest - 1)] for at in range(len(prompts)) for g in range(generations)]

    found = sample_with_replays(sample, [[1, 2], [3]], 4, 2, 6)
    assert len(found) == 8 and all(len(row) <= 6 for row in found)
    starts, one, most = asked[1]
    before = [[1, 2], [1, 2], [3], [3]]
    assert one == 1 and most == 6 - min(len(start) - len(prompt) for start, prompt in zip(starts, before, strict=True))
    for at, prompt in enumerate(before):
        start = starts[at][len(prompt) :]
        group = found[4 * (at // 2) : 4 * (at // 2) + 4]
        assert starts[at][: len(prompt)] == prompt and 1 <= len(start) < 6
        assert any(row[: len(start)] == start for row in group[:2]) and group[2 + at % 2][: len(start)] == start


def test_a_run_with_replays(world, tmp_path):
    assert recipe(world, tmp_path / "run", {"t_spmo": {"replay": 0.5}}, max_steps=2).train()["steps"] == 2
    with pytest.raises(BadInput, match="share of the replies"):
        recipe(world, tmp_path / "run", {"t_spmo": {"replay": 0.9}}).load_objective()


def test_what_is_shown_and_kept(world, tmp_path):
    said = []
    made = recipe(world, tmp_path / "run", max_steps=2)
    train(made, quiet=False, say=said.append)
    assert any("reward" in line and "of groups differ" in line for line in said)
    rows = [json.loads(line) for line in (tmp_path / "run/completions.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2}
    assert {"prompt", "reply", "contains", "length", "advantage"} <= rows[0].keys()
    page = report([tmp_path / "run"]).read_text()
    assert "Share of prompts whose replies earned the same" in page and "<h2>Rewards</h2>" in page


@pytest.mark.parametrize("name", ["s_grpo", "t_spmo"])
def test_a_4_bit_base(name, world, tmp_path):
    made = prompts(world, tmp_path / "run", {"lora": {"r": 4}}, name, max_steps=2)
    made["model"] = {"name": made["model"], "precision": "nf4"}
    assert Recipe.from_dict(made).train()["steps"] == 2
    made["training"]["beta"] = 0.1
    if name == "s_grpo":
        with pytest.raises(BadInput, match="second copy"):
            Recipe.from_dict({**made, "output": str(tmp_path / "other")}).train()
