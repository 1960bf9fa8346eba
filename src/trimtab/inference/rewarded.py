"""`trimtab eval` of a run that was trained by rewards: the same rewards of replies to the rows of `data.test`.

One greedy reply per row, and k = `num_generations` sampled ones with the temperature of training. Of each reward its
mean over the greedy replies; mean@k, that over the sampled ones; and pass@k, the share of rows of which a sampled reply
earned it in full (1 or more).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..data.rewards import Reward, load_rewards
from ..errors import BadInput

if TYPE_CHECKING:
    from .session import Inference

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def answer(made: Inference, limit: int | None = None) -> dict[str, Any]:
    """-> {"rows", "metrics", "samples", "cut_replies"}."""
    import torch

    from ..data.chat import reply_form
    from ..data.rows import eval_pairs, read_rows
    from ..model.sampling import prompt_ids, sample

    recipe, model, tokenizer, form = made.recipe, made.model, made.tokenizer, made.base.reply
    rewards, values = load_rewards(recipe.data.rewards), recipe.training_values()
    rows = read_rows(dataclasses.replace(recipe.data, chat_template=None), "test", tokenizer, "causal-lm")
    if not rows.answers:
        have = f"the {rows.form} rows of data.test have no prompts with answers"
        raise BadInput("eval by rewards", have, "Use question and answer columns")
    pairs = eval_pairs(rows)[:limit]
    prompts, answers = [prompt for prompt, _ in pairs], [accepted for _, accepted in pairs]
    if form.chat is None:  # not from a run
        form = reply_form(rows, recipe.data, tokenizer, None)
    most, k = values.get("max_completion_length", 512), values.get("num_generations", 8)
    lengths = [len(prompt_ids(tokenizer, prompt)) for prompt in prompts]
    size, cut = made.replies(lengths, most), set[int]()

    def replies(times: int, **settings: Any) -> list[str]:
        return list(sample(
            model, tokenizer, [prompt for prompt in prompts for _ in range(times)], batch_size=size, form=form,
            cut=cut if times == 1 else None, cache=made.cache, on_token=made.on_token, max_new_tokens=most, **settings,
        ))  # fmt: skip

    greedy = replies(1)
    sampling = {key: values[key] for key in SAMPLING if values.get(key) is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(values["seed"] or 0))
        sampled = replies(k, do_sample=True, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **sampling})
    metrics: dict[str, float] = {"reward": 0.0}
    for reward in rewards:
        earned = scores(reward, tokenizer, prompts, greedy, answers, 1)
        tries = scores(reward, tokenizer, prompts, sampled, answers, k)
        known = [value for value in earned if value is not None]
        metrics[reward.name] = sum(known) / max(1, len(known))
        metrics["reward"] += reward.weight * metrics[reward.name]
        counted = [value for value in tries if value is not None]
        metrics[f"mean@{k} {reward.name}"] = sum(counted) / max(1, len(counted))
        passed = [any((value or 0.0) >= 1.0 for value in tries[at : at + k]) for at in range(0, len(tries), k)]
        metrics[f"pass@{k} {reward.name}"] = sum(passed) / max(1, len(passed))
    samples = [
        {"prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"], "reply": reply, "answers": accepted}
        for prompt, reply, accepted in zip(prompts, greedy, answers, strict=True)
    ]
    if cut:
        made.say(f"{len(cut)} of {len(pairs)} replies were cut at {most} tokens (training: max_completion_length)")
    return {"rows": len(pairs), "metrics": metrics, "samples": samples[:20], "cut_replies": len(cut)}


def scores(
    reward: Reward, tokenizer: Any, prompts: list[Any], replies: list[str], answers: list[list[str]], times: int
) -> list[float | None]:  # fmt: skip
    """What `times` replies to each prompt, those of a prompt together, earn; given as TRL gives them in training."""
    repeated = [at for at in range(len(prompts)) for _ in range(times)]
    chat = bool(prompts) and not isinstance(prompts[0], str)
    return reward(
        prompts=[prompts[at] for at in repeated],
        completions=[[{"role": "assistant", "content": text}] for text in replies] if chat else replies,
        completion_ids=tokenizer(replies, add_special_tokens=False)["input_ids"] if replies else [],
        answers=[answers[at] for at in repeated], answer=[answers[at][0] for at in repeated],
    )  # fmt: skip
