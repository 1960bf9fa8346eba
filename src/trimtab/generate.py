"""`trimtab generate RECIPE.yaml`: answers to given prompts, or a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import BadInput
from .model.quiet import hushed
from .recipe import Recipe


def generate(
    recipe: Recipe, prompts: Sequence[str], adapter: str | Path | None = None, base_only: bool = False,
    raw: bool = False, say: Callable[[str], None] = lambda line: None, **settings: Any,
) -> Iterator[str]:  # fmt: skip
    """Yield one reply per prompt. `settings`: transformers' generation settings (max_new_tokens, temperature, ...).

    Prompts go through the model's chat template unless `raw`. `say` is told what was read of tables.
    """
    from .model.sampling import chat_prompt, check_generation, sample
    from .runs import load_run
    from .stores import reading, said

    check_generation(settings)
    with hushed():
        model, tokenizer, surgeries, _ = _language_model(load_run(recipe, adapter, base_only))
        asked = list(prompts) if raw else [chat_prompt(tokenizer, p, recipe.data.system) for p in prompts]
        with reading(model, surgeries) as reads:
            yield from sample(model, tokenizer, asked, **settings)
        if found := reads():
            say(said(found))


@hushed()
def chat(recipe: Recipe, adapter: str | Path | None = None, base_only: bool = False, **settings: Any) -> None:
    """Talk to the model: lines from standard input, replies streamed to standard output. An empty line starts anew."""
    import torch
    from transformers import TextStreamer

    from .model.sampling import check_generation, complete, prompt_ids
    from .runs import load_run
    from .stores import reading, said

    check_generation(settings)
    settings = {"do_sample": False, "max_new_tokens": 256, **settings}
    model, tokenizer, surgeries, _ = _language_model(load_run(recipe, adapter, base_only))
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    terminal = sys.stdin.isatty()
    if terminal:
        print("Ask something. An empty line starts a new conversation, Ctrl-D ends.", file=sys.stderr)
    first = [{"role": "system", "content": recipe.data.system}] if recipe.data.system else []
    turns = list(first)
    with reading(model, surgeries) as reads:
        while (line := _ask(terminal)) is not None:
            if not line.strip():
                turns = list(first)
                continue
            turns.append({"role": "user", "content": line})
            ids = torch.tensor([prompt_ids(tokenizer, turns if tokenizer.chat_template else line)])
            reply = complete(model, tokenizer, ids, torch.ones_like(ids), streamer=streamer, **settings)[0]
            turns.append({"role": "assistant", "content": tokenizer.decode(reply, skip_special_tokens=True)})
    if terminal and (found := reads()):
        print(said(found), file=sys.stderr)


def _ask(terminal: bool) -> str | None:
    try:
        return input("> " if terminal else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _language_model(loaded: tuple) -> tuple:
    if loaded[3].task != "causal-lm":
        raise BadInput("generate", "the adapter makes a classifier", "Use `trimtab eval`")
    return loaded
