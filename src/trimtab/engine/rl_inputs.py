"""The prompts and rewards of a run that samples replies, checked before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from ..bases.policy import Policy
from ..contracts import Surgery, When
from ..data.rewards import Reward, load_rewards
from ..data.rows import Rows
from ..errors import BadInput
from ..model.limits import check_ids, learned_positions
from ..model.sampling import prompt_ids
from ..recipe import Recipe
from .job import Inputs
from .patching import apply_patches

LENGTH = "prompt_tokens"  # a column of the rows: tokens of the prompt


def prompts_of(
    recipe: Recipe, inputs: Inputs, model: Any, args: Any, part: str, say: Callable[[str], None]
) -> tuple[Dataset, list[Reward]]:  # fmt: skip
    """-> rows with `prompt`, `answer`, `answers` and `prompt_tokens`, and the rewards. BadInput for rows without what
    the rewards need, and for prompts that leave no room for a completion."""
    rows = inputs.rows if part == "train" else inputs.test
    assert rows is not None
    rewards = load_rewards(recipe.data.rewards)
    if not rows.answers and (needs := [reward.name for reward in rewards if reward.needs_answers]):
        have = f"the {rows.form} rows of data.{part} have no answers"
        raise BadInput(f"data.rewards: {needs[0]}", have, "Use question and answer columns, or another reward")
    if rows.form == "text":
        have = f"the rows of data.{part} are plain text, without prompts"
        raise BadInput("train by rewards", have, "Use question and answer columns, or data.columns to name yours")
    if "tools" in rows.dataset.column_names:
        raise BadInput("train by rewards", f"the rows of data.{part} have tools", "Leave the column tools out")
    prompts = _prompts(rows)
    ids = [prompt_ids(inputs.tokenizer, prompt) for prompt in prompts]
    for row, found in enumerate(ids):
        check_ids(model, found, f"data.{part}, row {row + 1}")
    kept = _within(recipe, model, args, [len(found) for found in ids], part, say)
    columns = {
        "prompt": [prompts[at] for at in kept], LENGTH: [len(ids[at]) for at in kept],
        "answers": [rows.answers[at] for at in kept], "answer": [rows.answers[at][0] for at in kept],
    }  # fmt: skip
    return Dataset.from_dict(columns), rewards


def _prompts(rows: Rows) -> list[Any]:
    """The prompt of each row: text, or the messages before the last assistant turn."""
    from ..data.rows import eval_pairs

    return [prompt for prompt, _ in eval_pairs(rows)]


def _within(
    recipe: Recipe, model: Any, args: Any, sizes: list[int], part: str, say: Callable[[str], None]
) -> list[int]:
    """The rows whose prompts leave room for a completion within `max_length`, and within the model's positions."""
    longest = recipe.training_values()["max_length"]
    places = learned_positions(model)
    if longest is None or (places is not None and places < longest):
        longest = places
    if longest is None:
        return list(range(len(sizes)))
    room = longest - args.max_completion_length
    kept = [at for at, size in enumerate(sizes) if size <= room]
    over = len(sizes) - len(kept)
    if over and (recipe.data.too_long != "drop" or not kept):
        have = f"{over} of {len(sizes)} prompts of data.{part} have more than {max(room, 0)} tokens, the longest "
        have += (
            f"{max(sizes)}, which leaves no room for max_completion_length {args.max_completion_length} in {longest}"
        )
        wanted = max(sizes) + args.max_completion_length
        do = f"Set training.max_length to {wanted}" if places is None or wanted <= places else "Shorten the prompts"
        raise BadInput(
            f"sample replies to data.{part}", have, f"{do}, lower max_completion_length, or set data.too_long=drop"
        )
    if over:
        say(f"{over} prompts of data.{part} leave no room for a completion: they are left out")
    return kept


def cache_policies(recipe: Recipe, model: Any) -> list[Surgery]:
    """The surgeries of the recipe's KV policies, with which replies are sampled. BadInput for patches that sampled
    replies do not suit."""
    patches = recipe.load_patches()
    if counts := next((patch for patch in patches if patch.counts_tokens), None):
        have = "sampled replies may have tokens that data.train has not"
        raise BadInput(f"{type(counts).__name__} with objective: {recipe.objective}", have, "Take one of them out")
    for patch in patches:
        if patch.when is When.INFER and patch.within(1) is not None:
            have = "the plan of a reply sets it, and a run has none"
            raise BadInput(f"{type(patch).__name__}: budget: auto in training", have, "Give a number of tokens")
    return apply_patches(model, [p for p in patches if p.when is When.INFER], recipe.place, When.INFER)


def check_groups(args: Any, objective: Policy, rows: int) -> None:
    """BadInput for batches that do not fit the groups, or the objective."""
    groups = args.generation_batch_size // args.num_generations
    if rows < groups:
        asked = f"sample replies to {groups} prompts at once"
        do = "Lower per_device_train_batch_size, gradient_accumulation_steps or generation_batch_size"
        raise BadInput(asked, f"data.train has {rows}", do)
    if not objective.own_loss:
        return
    local = args.per_device_train_batch_size * args.steps_per_generation
    if local % args.num_generations:
        asked = f"training: num_generations: {args.num_generations} with {type(objective).__name__}"
        have = f"a process samples {local} replies at once, which are no whole groups"
        raise BadInput(asked, have, "Change per_device_train_batch_size or gradient_accumulation_steps")
    if args.gradient_accumulation_steps % args.steps_per_generation:
        asked = f"training: steps_per_generation: {args.steps_per_generation} with {type(objective).__name__}"
        have = "several optimizer steps would use one rollout, and its loss has no correction for that"
        raise BadInput(asked, have, "Leave it out, or use objective: grpo")
