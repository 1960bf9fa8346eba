"""`trimtab generate RECIPE.yaml`: answers to given prompts, or a conversation in the terminal.

Prompts are put in the form that the run was trained in, which its adapter's folder records (model/reply.py).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..model.reply import ReplyForm
from ..quiet import hushed
from ..recipe import Recipe

LEAST = 64  # tokens that a reply may have where the run's answers were shorter
TALK = 256  # the same, in a conversation


def generate(
    recipe: Recipe, prompts: Sequence[str], adapter: str | Path | None = None, base_only: bool = False,
    raw: bool = False, say: Callable[[str], None] = lambda line: None, **settings: Any,
) -> Iterator[str]:  # fmt: skip
    """Yield one reply per prompt. `settings`: transformers' generation settings (max_new_tokens, temperature, ...).

    Prompts are put as the rows of the run were: through the chat template or as plain text; `raw`: as they are. `say`
    is told what was read of tables, and how many replies were cut.
    """
    from ..engine.tables import reading, summary
    from ..model.sampling import check_generation, sample
    from .load_run import load_run

    settings = check_generation(settings)
    with hushed():
        model, tokenizer, surgeries, meta = _language_model(load_run(recipe, adapter, base_only))
        form = _form(recipe, meta.reply, tokenizer)
        asked = list(prompts) if raw else [
            form.prompt(tokenizer, prompt, recipe.data.system, recipe.data.chat) for prompt in prompts
        ]  # fmt: skip
        if "max_length" not in settings:
            settings.setdefault("max_new_tokens", form.room(recipe.data.reply_tokens, LEAST))
        cut: set[int] = set()
        with reading(model, surgeries) as reads:
            yield from sample(model, tokenizer, asked, form=form, cut=cut, **settings)
        if found := reads():
            say(summary(found))
        if cut:
            say(f"{len(cut)} of {len(asked)} replies were cut; max_new_tokens (--set) sets how long they may be")


@hushed()
def chat(recipe: Recipe, adapter: str | Path | None = None, base_only: bool = False, **settings: Any) -> None:
    """Talk to the model: lines from standard input, replies streamed to standard output. An empty line starts anew."""
    import torch
    from transformers import TextStreamer

    from ..engine.tables import reading, summary
    from ..model.sampling import check_generation, complete, prompt_ids, reply_text, settings_of, within_positions
    from .load_run import load_run

    settings = check_generation(settings)
    if settings.get("num_beams", 1) > 1:
        raise BadInput("generation: num_beams", "a conversation is shown as it is written", "Give prompts with -p")
    model, tokenizer, surgeries, meta = _language_model(load_run(recipe, adapter, base_only))
    form = _form(recipe, meta.reply, tokenizer)
    if "max_length" not in settings:
        settings.setdefault("max_new_tokens", form.room(recipe.data.reply_tokens, TALK))
    settings = settings_of(model, tokenizer, form, settings)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    terminal = sys.stdin.isatty()
    if terminal:
        print("Ask something. An empty line starts a new conversation, Ctrl-D ends.", file=sys.stderr)
    turns: list[dict[str, str]] = []
    with reading(model, surgeries) as reads:
        while (line := _ask(terminal)) is not None:
            if not line.strip():
                turns = []
                continue
            asked = form.prompt(tokenizer, line, recipe.data.system, recipe.data.chat)
            if isinstance(asked, list):
                turns += asked if not turns else asked[-1:]
                asked = turns
            ids = torch.tensor([prompt_ids(tokenizer, asked)])
            limited = within_positions(model, ids.shape[1], settings)
            reply = complete(model, tokenizer, ids, torch.ones_like(ids), streamer=streamer, **limited)[0]
            text, ended = reply_text(tokenizer, reply.tolist(), settings)
            if not ended:
                print(f"(cut at {len(reply)} tokens; --set max_new_tokens=N)", file=sys.stderr)
            turns.append({"role": "assistant", "content": text})
    if terminal and (found := reads()):
        print(summary(found), file=sys.stderr)


def _form(recipe: Recipe, recorded: ReplyForm, tokenizer: Any) -> ReplyForm:
    """The form that the adapter records; without one (`--base` before a run), that of the recipe's own first row."""
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


def _language_model(loaded: tuple) -> tuple:
    if loaded[3].task != "causal-lm":
        raise BadInput("generate", "the adapter makes a classifier", "Use `trimtab eval`")
    return loaded
