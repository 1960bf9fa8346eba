"""The command line: `trimtab VERB RECIPE.yaml [key=value ...]`. It only handles arguments.

Exit codes: 0 done, 2 bad input, 3 does not fit, 4 stopped early (memory, divergence), 130 Ctrl-C, 143 SIGTERM, 1 a bug
of ours.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, methods
from .errors import BadInput, Stopped, TrimtabError
from .process.interrupt import INTERRUPTED, stopped_by_interrupt
from .process.supervise import in_a_child

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Fine-tune and run language models inside a memory budget.")  # fmt: skip

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="A recipe, or the folder of a run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Override keys of the recipe.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and the result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Adapter = Annotated[str | None, typer.Option("--adapter", help="Use this adapter folder, not the run's own.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; can be given several times.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A generation setting, e.g. temperature=0.7; can be given several times."),
]
BaseOnly = Annotated[bool, typer.Option("--base", help="Use the base model, without the adapter.")]


def main() -> None:
    """Entry point: run a verb. A user's mistake gives one message and an exit code, never a traceback."""
    with stopped_by_interrupt("trimtab: stopped"):
        try:
            code = app(standalone_mode=False)  # typer returns the code of an Exit, and turns Ctrl-C into one
        except TrimtabError as error:
            print(f"trimtab: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except typer.TyperException as error:  # an unknown option or verb
            error.show()
            sys.exit(2)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if isinstance(code, int) and code:
            sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def _epilog() -> str:
    return "Patches: " + ", ".join(f"{name} ({methods.TABLE[name].summary})" for name in methods.names("patch"))


@app.command(epilog=_epilog())
def train(
    recipe: RecipeArg, overrides: Overrides = None,
    hard: Annotated[bool, typer.Option("--hard", help="Make budget.fast a limit of the process.")] = False,
    baselines: Annotated[str, typer.Option(help="Of several stages, also run these for comparison, comma-separated: "
                                           "sequential, joint, frozen.")] = "",
    quiet: Quiet = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Fine-tune a model. Writes adapter/, run.json and metrics.jsonl into the recipe's output folder."""
    from .recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    _allocator(loaded, hard)
    if hard:
        in_a_child(lambda name: _crashed(loaded, name))
    from .training.train import train as run

    result = run(loaded, quiet=quiet, hard=hard, baselines=[name for name in baselines.split(",") if name])
    if as_json:
        print(json.dumps(result, indent=2, default=str))


@app.command()
def plan(
    recipe: RecipeArg, overrides: Overrides = None, as_json: AsJson = False,
    search: Annotated[bool, typer.Option("--search", help="Compare other methods and settings, best first.")] = False,
    write: Annotated[str | None, typer.Option(metavar="FILE", help="Write the best plan as a recipe.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let --write replace a file.")] = False,
    on: Annotated[str, typer.Option(metavar="DEVICES", help="Plan for GPUs, e.g. rtx-4090,2xl40s, by their published "
                                    "figures.")] = "",
) -> None:  # fmt: skip
    """Predict a run's peak memory and speed, and whether it fits its budget; train nothing.

    If the recipe has no patches, search for the best plan that fits.
    """
    from .recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    _allocator(loaded)
    if on:
        if search or write:
            raise BadInput("plan --on with --search or --write", "a search is made for one machine", "Leave one out")
        from .planning import devices

        found = devices.plan_on(loaded, devices.parse(on))
        print(json.dumps([each.to_dict() for each in found], indent=2) if as_json else "\n".join(devices.lines(found)))
        if not any(each.fits for each in found):
            raise typer.Exit(3)
        return
    if search or write or not loaded.patches:
        _search(loaded, as_json, write, overwrite)
        return
    from .planning.fit import require_fit
    from .planning.inference import plan_largest
    from .planning.remembered import remember

    made, planned = plan_largest(loaded)
    remember(planned, made)
    print(json.dumps(made.to_dict(), indent=2) if as_json else "\n".join(made.lines()))
    require_fit(made, planned)


def _search(recipe: Any, as_json: bool, write: str | None, overwrite: bool) -> None:
    from pathlib import Path

    from .errors import BadInput
    from .planning import search as plan_search

    if recipe.stages:
        have = "the recipe has stages, which may need different plans"
        raise BadInput("plan --search", have, "Search with the recipe of one stage")
    if write:
        plan_search.check_free(Path(write), overwrite)  # before the work
    found = plan_search.search(recipe, workers=min(2, os.cpu_count() or 1))
    print(json.dumps(found.to_dict(), indent=2) if as_json else "\n".join(found.lines()))
    found.require_fit()
    if write:
        plan_search.write(found, Path(write), overwrite)
        print(f"{write}: the best plan, as a recipe", file=sys.stderr)


@app.command("eval")
def eval_(
    recipe: RecipeArg, overrides: Overrides = None, adapter: Adapter = None, base: BaseOnly = False,
    tasks: Annotated[str, typer.Option(help="Benchmarks of lm-eval, comma-separated, instead of data.test.")] = "",
    limit: Annotated[int | None, typer.Option(help="Use only this many rows.", min=1)] = None,
    quiet: Quiet = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Evaluate the run's model on data.test: loss, answers, accuracy."""
    from .recipe import Recipe

    loaded = Recipe.load(recipe, overrides or (), final=True)
    _allocator(loaded)
    from .engine.tables import summary
    from .inference.evaluate import evaluate

    say = lambda line: print(line, file=sys.stderr)  # noqa: E731
    result = evaluate(loaded, adapter, base, [t for t in tasks.split(",") if t], limit, say)
    if as_json:
        print(json.dumps(result, indent=2, default=str))
        return
    for sample in [] if quiet else result.get("samples", [])[:5]:
        print(f"  {sample['prompt']}\n    {sample['reply']}    (wanted: {' | '.join(sample['answers'])})")
    rows = f" on {result['rows']} rows" if "rows" in result else ""
    print(f"{result['model']}{'' if result['adapter'] is None else ' + ' + result['adapter']}{rows}")
    for name, value in result["metrics"].items():
        print(f"  {name:<16} {value:.4f}")
    if "reads" in result:
        print(f"  {summary(result['reads'])}")


@app.command()
def generate(
    recipe: RecipeArg, overrides: Overrides = None,
    prompt: Prompts = None,
    adapter: Adapter = None, base: BaseOnly = False,
    raw: Annotated[bool, typer.Option("--raw", help="Do not use the chat template.")] = False,
    setting: Settings = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Reply to prompts, or chat in the terminal if none is given."""
    from .recipe import Recipe

    loaded = Recipe.load(recipe, overrides or (), final=True)
    _allocator(loaded)
    settings = _settings(setting)
    from .inference import generate as verb

    if not prompt:
        verb.chat(loaded, adapter, base, **settings)
        return
    say = lambda line: print(line, file=sys.stderr)  # noqa: E731
    replies = list(verb.generate(loaded, prompt, adapter, base, raw, say, **settings))
    if as_json:
        print(json.dumps([{"prompt": p, "reply": r} for p, r in zip(prompt, replies, strict=True)], indent=2))
        return
    for asked, reply in zip(prompt, replies, strict=True):
        print(reply if len(prompt) == 1 else f"{asked}\n  {reply}")


@app.command()
def serve(
    recipe: RecipeArg, overrides: Overrides = None,
    port: Annotated[int, typer.Option("--port", help="0: a free one.", min=0, max=65535)] = 8000,
    host: Annotated[str, typer.Option("--host", help="The address to listen at.")] = "127.0.0.1",
    name: Annotated[str | None, typer.Option("--name", help="The model's name (default: the run's folder).")] = None,
    adapter: Adapter = None, base: BaseOnly = False,
    batch: Annotated[int, typer.Option("--batch", help="Most replies at once.", min=1, max=256)] = 8,
    queue: Annotated[int, typer.Option("--queue", help="Most requests that wait.", min=1, max=4096)] = 64,
    setting: Settings = None,
) -> None:  # fmt: skip
    """Serve the run's model to programs, with OpenAI's API, on this machine only."""
    from .recipe import Recipe

    loaded = Recipe.load(recipe, overrides or (), final=True)
    _allocator(loaded)
    from .serving.serve import serve as run

    say = lambda line: print(line, flush=True)  # noqa: E731
    run(loaded, host, port, name, adapter, base, batch, queue, _settings(setting), say)


@app.command()
def export(
    recipe: RecipeArg, overrides: Overrides = None,
    to: Annotated[str, typer.Option(help="peft: a stock PEFT adapter; merged: a transformers folder; gguf: a file for "
                                    "llama.cpp or Ollama; gguf-lora: the adapter for llama.cpp.")] = "merged",
    out: Annotated[str | None, typer.Option(help="The folder to write (default: OUTPUT/TO).")] = None,
    adapter: Adapter = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    outtype: Annotated[str, typer.Option("--outtype", help="Of GGUF tensors: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, "
                                         "q4_0 (default: f16; of gguf-lora f32).")] = "",
) -> None:  # fmt: skip
    """Write the trained model in a form that needs no trimtab."""
    from .inference.export import export as run
    from .recipe import Recipe

    print(run(Recipe.load(recipe, overrides or (), final=True), to, out, adapter, overwrite, outtype))


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN [RUN2 ...]", help="Folders of runs.")],
    out: Annotated[str | None, typer.Option("--out", help="The file to write (default: RUN/report.html).")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write one HTML page about runs: recipe, memory, loss, speed, answers."""
    from .report.report import report as run

    written = run(runs, out)
    print(written)
    if open_:
        import webbrowser

        webbrowser.open(written.resolve().as_uri())


data = typer.Typer(no_args_is_help=True, help="Look at data before training.")
app.add_typer(data, name="data")


@data.command()
def audit(
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILE ...]", help="Data files to look at.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Take tokenizer, columns and max_length, and without "
                                               "FILES the files, from this recipe.")] = None,
    test: Annotated[list[str] | None, typer.Option("--test", help="A file that must share no row with the others.")]
    = None,
    near: Annotated[float, typer.Option(help="Similarity of near duplicates; 0: do not look for them.")] = 0.8,
    skip: Annotated[str, typer.Option(help="Kinds to leave out, comma-separated.")] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if something is found.")] = False,
    write: Annotated[str | None, typer.Option(metavar="DIR", help="Write copies without the rows found.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let --write replace files.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Find duplicates, leaks into test sets, and faulty rows in data files. The files are not changed."""
    from .data.audit import audit as run
    from .data.audit import write_clean
    from .data.spec import DataSpec

    named, tests, spec, length, tokenizer = list(files or ()), list(test or ()), DataSpec(), None, None
    if recipe:
        from .data.chat import use_template
        from .model.load import config_folder, load_tokenizer
        from .recipe import Recipe

        loaded = Recipe.load(recipe)
        spec, length = loaded.data, loaded.training_values()["max_length"]
        if not named:
            named, listed = loaded.data_files()
            tests += [name for name in listed if name not in tests]
        tokenizer = load_tokenizer(config_folder(loaded.model), trust_remote_code=loaded.model.trust_remote_code)
        use_template(spec, tokenizer)
    made = run(named, tests, spec, tokenizer, length, near, [kind for kind in skip.split(",") if kind])
    written = write_clean(made, Path(write), overwrite) if write else []
    print(json.dumps(made.to_dict(), indent=2) if as_json else "\n".join(made.lines()))
    for path in written:
        print(f"{path}: the rows without findings", file=sys.stderr)
    if strict and made.findings:
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML files."""
    from .schema import schema as made

    print(json.dumps(made(), indent=2, default=str))


@app.command()
def doctor(
    as_json: AsJson = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again.")] = False,
    thorough: Annotated[bool, typer.Option("--thorough", help="Five minutes, not 20 seconds: plans are more accurate.")]
    = False,
) -> None:  # fmt: skip
    """Show what this machine has and how fast it is; the measurement is kept for plans."""
    from .memory.allocator import restart_under

    restart_under()
    from .doctor import doctor as run
    from .doctor import lines

    found = run(fresh, thorough, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))


@app.command()
def version() -> None:
    """Print the version of trimtab."""
    print(__version__)


def _settings(items: list[str] | None) -> dict[str, Any]:
    """The generation settings given as `--set key=value`."""
    from .recipe import override
    from .validation import booleans

    found: dict[str, Any] = {}
    for item in items or ():
        override(found, item)
    return booleans(found)


def _crashed(recipe: Any, name: str) -> TrimtabError:
    """The error for a run under a hard limit that a library crashed, since its memory was refused."""
    from .artifacts.run_folder import checkpoints

    left = checkpoints(Path(recipe.output))
    have = f"a library was refused memory and ended the process ({name}); "
    have += f"{left[-1]} is complete" if left else "no checkpoint had been written yet"
    again = "Go on with resume=true" if left else "Begin again with overwrite=true"
    asked = f"train within {(recipe.budget or {}).get('fast')} of the fast tier (--hard)"
    return Stopped(asked, have, f"{again} and a larger budget.fast, or a smaller batch")


def _allocator(recipe: Any, hard: bool = False) -> None:
    """Restart under a better malloc if one is found (memory/allocator.py says why)."""
    from .memory.allocator import restart_under

    restart_under(recipe.engine.allocator, hard)


if __name__ == "__main__":
    main()
