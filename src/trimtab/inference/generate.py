"""`trimtab generate RECIPE.yaml`: replies to given prompts, or a conversation in the terminal.

Prompts get the format of the run's training rows, which its adapter folder records (model/reply.py).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ..model.reply import ReplyForm
from ..quiet import silence_libraries
from ..recipe import Recipe

if TYPE_CHECKING:
    from .session import Inference

LEAST = 64  # a reply may have at least so many tokens
TALK = 256  # the same in a conversation


def generate(
    recipe: Recipe, prompts: Sequence[str], adapter: str | Path | None = None, base_only: bool = False,
    raw: bool = False, say: Callable[[str], None] = lambda line: None, **settings: Any,
) -> Iterator[str]:  # fmt: skip
    """Yields one reply per prompt. `settings`: transformers' generation settings (max_new_tokens, temperature, ...).

    Prompts get the format of the run's rows (chat template or plain text); `raw`: they stay as given. `say` gets lines
    on the plan, on reads of tables, and on replies that were cut. The record is saved as `generate.json` in the run's
    folder, if there is one.

    Raises DoesNotFit before replies that would exceed `budget.fast`, and Stopped while generating if it is exceeded.
    """
    from ..engine.tables import summary
    from ..files import write_record
    from ..model.sampling import check_generation, prompt_ids, sample

    settings = check_generation(settings)
    if not prompts:
        return
    with silence_libraries():
        made = language_model(recipe, adapter, base_only, say)
        form = form_of(recipe, made.base.reply, made.tokenizer)
        formatted = list(prompts) if raw else [
            form.prompt(made.tokenizer, prompt, recipe.data.system, recipe.data.chat) for prompt in prompts
        ]  # fmt: skip
        if "max_length" not in settings:
            settings.setdefault("max_new_tokens", form.max_tokens(recipe.data.reply_tokens, LEAST))
        cut: set[int] = set()
        with made:
            lengths = [len(prompt_ids(made.tokenizer, prompt)) for prompt in formatted]
            size = made.replies(lengths, _new(settings, max(lengths)), settings.get("num_beams", 1))
            replies = list(sample(
                made.model, made.tokenizer, formatted, batch_size=size, form=form, cut=cut, cache=made.cache,
                on_token=made.on_token, **settings,
            ))  # fmt: skip
            record = made.record()
        if "reads" in record:
            say(summary(record["reads"]))
        if cut:
            say(f"{len(cut)} of {len(formatted)} replies were cut; max_new_tokens (--set) sets how long they may be")
        if adapter is None and Path(recipe.output).is_dir():
            write_record(Path(recipe.output) / "generate.json", record, say)
        yield from replies


def _new(settings: dict[str, Any], longest: int) -> int:
    """The limit of a reply to a prompt of `longest` tokens, in tokens."""
    return settings["max_new_tokens"] if "max_new_tokens" in settings else max(1, settings["max_length"] - longest)


@silence_libraries()
def chat(recipe: Recipe, adapter: str | Path | None = None, base_only: bool = False, **settings: Any) -> None:
    """Talk to the model: lines from standard input, replies streamed to standard output. An empty line starts anew."""
    import torch
    from transformers import TextStreamer

    from ..engine.tables import summary
    from ..model.sampling import check_generation, complete, prompt_ids, reply_text, settings_of, within_positions

    settings = check_generation(settings)
    if settings.get("num_beams", 1) > 1:
        raise BadInput("generation: num_beams", "a conversation is shown token by token", "Give prompts with -p")
    made = language_model(recipe, adapter, base_only, lambda line: print(line, file=sys.stderr))
    model, tokenizer, form = made.model, made.tokenizer, form_of(recipe, made.base.reply, made.tokenizer)
    if "max_length" not in settings:
        settings.setdefault("max_new_tokens", form.max_tokens(recipe.data.reply_tokens, TALK))
    settings = settings_of(model, tokenizer, form, settings)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    terminal = sys.stdin.isatty()
    if terminal:
        print("Ask something. An empty line starts a new conversation, Ctrl-D ends.", file=sys.stderr)
    turns: list[dict[str, str]] = []
    planned = 0  # tokens of the longest prompt that was planned
    with made:
        while (line := _ask(terminal)) is not None:
            if not line.strip():
                turns = []
                continue
            prompt = form.prompt(tokenizer, line, recipe.data.system, recipe.data.chat)
            if isinstance(prompt, list):
                turns += prompt if not turns else prompt[-1:]
                prompt = turns
            ids = torch.tensor([prompt_ids(tokenizer, prompt)])
            limited = within_positions(model, ids.shape[1], settings)
            if recipe.budget and ids.shape[1] > planned:
                planned = ids.shape[1]
                made.replies([planned], _new(limited, planned))
            elif not recipe.budget:
                made.pack(made.packs(_new(limited, ids.shape[1])))
            reply = complete(
                model, tokenizer, ids, torch.ones_like(ids), streamer=streamer, cache=made.cache(),
                on_token=made.on_token, **limited,
            )[0]  # fmt: skip
            text, ended = reply_text(tokenizer, reply.tolist(), settings)
            if not ended:
                print(f"(cut at {len(reply)} tokens; --set max_new_tokens=N)", file=sys.stderr)
            turns.append({"role": "assistant", "content": text})
        if terminal and (found := made.reads()):
            print(summary(found), file=sys.stderr)


def form_of(recipe: Recipe, recorded: ReplyForm, tokenizer: Any) -> ReplyForm:
    """The format that the adapter records; without one (`--base` before a run), that of the recipe's first row."""
    from ..data.chat import reply_form
    from ..data.rows import read_rows

    files = recipe.data.train if isinstance(recipe.data.train, list) else [recipe.data.train or ""]
    if recorded.chat is not None or not all(Path(name).is_file() for name in files):
        return recorded
    rows = read_rows(dataclasses.replace(recipe.data, limit=1), "train", tokenizer, "causal-lm")
    return reply_form(rows, recipe.data, tokenizer, recipe.training.get("eos_token"))


def _ask(terminal: bool) -> str | None:
    try:
        return input("> " if terminal else "")
    except (EOFError, KeyboardInterrupt):
        return None


def language_model(
    recipe: Recipe, adapter: str | Path | None, base_only: bool, say: Callable[[str], None]
) -> Inference:
    """The run's model under plan, meter and guard; BadInput for a classifier."""
    from .session import Inference

    made = Inference(recipe, adapter, base_only, say)
    if made.base.task != "causal-lm":
        raise BadInput("generate", "the adapter is that of a classifier", "Use `trimtab eval`")
    return made
