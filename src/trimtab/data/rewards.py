"""Rewards of sampled replies. `data: {rewards: [...]}` names them; they are summed, each times its weight.

    exact_match        1 if the reply equals an accepted answer, after SQuAD's normalisation
    contains           1 if an accepted answer occurs in the reply as whole words
    exact_number       1 if the last number of the reply equals the answer's, however it is written (data/metrics.py)
    {regex: PATTERN}   1 if the pattern is found in the reply
    {length: N}        1 for a reply of up to N tokens, falling to 0 at 2 N
    module:function    one's own, from a module beside the recipe, in the working folder, or installed

An entry with a weight or several settings is a mapping: `{exact_match: {weight: 2}}`,
`{regex: {pattern: PATTERN, weight: 0.5}}`, `{"module:function": {weight: 0.1}}`.

A function of one's own has the signature of TRL's reward functions: `function(prompts, completions, completion_ids,
**columns)` with one item per reply in each list, and returns one number for each, or None where it does not apply.
`columns` has `answer` (the first accepted answer) and `answers` (all). Importing this module loads no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput, Stopped, nearest
from .metrics import contains, exact_match, final_number

BY_ANSWER = {"exact_match": exact_match, "contains": contains, "exact_number": final_number}
SETTINGS = {"regex": "pattern", "length": "tokens"}  # rewards with a setting -> its name
NAMES = (*BY_ANSWER, *SETTINGS)

Entry = str | dict[str, Any]


class RewardFailed(Stopped):
    """A reward function raised, or returned something else than one finite number per reply."""


@dataclass
class Reward:
    """A named reward: a function like TRL's, with checks, and its weight in the sum."""

    name: str
    weight: float
    function: Callable[..., Sequence[float | None]]
    needs_answers: bool = False
    calls: int = 0

    @property
    def __name__(self) -> str:  # TRL names a reward in its logs by this
        return self.name

    def __call__(self, **given: Any) -> list[float | None]:
        """One number per reply. RewardFailed for anything else."""
        self.calls += 1
        wanted = len(given["completions"])
        asked = f'reward "{self.name}" of {wanted} replies (call {self.calls})'
        do = "Correct the function, and continue with resume=true if there is a checkpoint"
        try:
            found = list(self.function(**given))
        except Exception as error:  # one's own code can raise anything
            why = f"it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise RewardFailed(asked, why, do) from error
        if len(found) != wanted:
            raise RewardFailed(asked, f"it returned {len(found)} values", do)
        bad = [at for at, value in enumerate(found) if value is not None and not _finite(value)]
        if bad:
            text = reply_text(given["completions"][bad[0]])[:80]
            have = f"{len(bad)} are not finite numbers, the first {found[bad[0]]!r} for the reply {text!r}"
            raise RewardFailed(asked, have, do)
        return [None if value is None else float(value) for value in found]


def load_rewards(entries: Sequence[Entry]) -> list[Reward]:
    """The rewards of `data.rewards`. BadInput for unknown names, bad settings and functions that cannot be imported."""
    if not entries:
        have = "data.rewards names none"
        raise BadInput("train by rewards", have, f"Add data: {{rewards: [exact_number]}}; known: {', '.join(NAMES)}")
    found = [_reward(entry) for entry in entries]
    names = [reward.name for reward in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"data.rewards: {twice}", "it is named twice", "Name it once, with its weight")
    return found


def reply_text(completion: Any) -> str:
    """The text of a completion: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else completion[-1].get("content") or ""


def _reward(entry: Entry) -> Reward:
    if isinstance(entry, str):
        name, settings = entry, {}
    elif isinstance(entry, dict) and len(entry) == 1:
        ((name, given),) = entry.items()
        settings = dict(given) if isinstance(given, dict) else {SETTINGS.get(str(name), "weight"): given}
    else:
        raise BadInput(
            f"data.rewards: {entry!r}", "each item names one reward", "Write e.g. - exact_match: {weight: 2}"
        )
    weight = settings.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise BadInput(f"data.rewards: {name}: weight: {weight!r}", "it is no number", "Give e.g. 0.5")
    known = {SETTINGS[name]} if name in SETTINGS else set()
    if odd := settings.keys() - known:
        raise BadInput(
            f"data.rewards: {name}: {min(odd)}", "it has no such setting", nearest(min(odd), {"weight", *known})
        )
    if missing := known - settings.keys():
        raise BadInput(f"data.rewards: {name}", f"its {min(missing)} is missing", f"Write - {name}: VALUE")
    if name in BY_ANSWER:
        return Reward(name, float(weight), _by_answer(BY_ANSWER[name]), needs_answers=True)
    if name == "regex":
        return Reward(name, float(weight), _regex(settings["pattern"]))
    if name == "length":
        return Reward(name, float(weight), _length(settings["tokens"]))
    if ":" in name:
        return Reward(_short(name), float(weight), _imported(name))
    raise BadInput(
        f'data.rewards: "{name}"', "there is no such reward", f"{nearest(name, NAMES)}, or name module:function"
    )


def _by_answer(score: Callable[[str, Sequence[str]], float]) -> Callable[..., list[float]]:
    def function(completions: Sequence[Any], answers: Sequence[Sequence[str]], **_: Any) -> list[float]:
        return [score(reply_text(reply), accepted) for reply, accepted in zip(completions, answers, strict=True)]

    return function


def _regex(pattern: Any) -> Callable[..., list[float]]:
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise BadInput(
            f"data.rewards: regex: {pattern!r}", f"it is no regular expression ({error})", "Correct it"
        ) from None
    return lambda completions, **_: [float(compiled.search(reply_text(reply)) is not None) for reply in completions]


def _length(tokens: Any) -> Callable[..., list[float]]:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise BadInput(f"data.rewards: length: {tokens!r}", "it is no number of tokens", "Give 1 or more")
    return lambda completion_ids, **_: [min(1.0, max(0.0, 2.0 - len(ids) / tokens)) for ids in completion_ids]


def _finite(value: Any) -> bool:
    try:
        return not isinstance(value, str) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


# --- one's own --------------------------------------------------------------------------------------------------------


def beside(entry: Entry, folder: Path) -> Entry:
    """`entry` with its module named by its path, if the module is a file in `folder`."""
    name = entry if isinstance(entry, str) else next(iter(entry), "") if isinstance(entry, dict) else ""
    module, sign, function = str(name).rpartition(":")
    file = folder / f"{module}.py"
    if not sign or not module or not file.is_file():
        return entry
    found = f"{file}:{function}"
    return found if isinstance(entry, str) else {found: entry[name]}  # type: ignore[index]


def _short(name: str) -> str:
    module, _, function = name.rpartition(":")
    return f"{Path(module).stem if module.endswith('.py') else module}:{function}"


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(":")
    asked = f"data.rewards: {_short(name)}"
    file = Path(module) if module.endswith(".py") else Path(f"{module}.py")
    do = "Put the module beside the recipe or in the working folder, and write module:function"
    try:
        if file.is_file():
            spec = importlib.util.spec_from_file_location(f"trimtab_reward_{file.stem}", file)
            assert spec is not None and spec.loader is not None
            made = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = made
            spec.loader.exec_module(made)
        else:
            made = importlib.import_module(module)
    except Exception as error:  # a module can raise anything
        raise BadInput(asked, f"it cannot be imported ({type(error).__name__}: {error})", do) from error
    found = getattr(made, function, None)
    if not callable(found):
        there = [key for key, value in vars(made).items() if callable(value) and not key.startswith("_")]
        raise BadInput(asked, f"the module has no function {function}", nearest(function, there) if there else do)
    return found
