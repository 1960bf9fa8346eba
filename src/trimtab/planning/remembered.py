"""Stores the plan that a user was shown before a run, so that the run's report can compare it with the run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..cost import cache_file
from ..model.hub import cache_root
from ..recipe import Recipe
from .plan import Plan

FORM = 1
MOST = 50  # plans; older ones are deleted


def remember(recipe: Recipe, made: Plan) -> None:
    """Stores the prediction of `made` for `recipe`, if the cache can be written."""
    path = _path(recipe)
    cache_file.write(path, FORM, {"machine": {}, "predicted": made.predicted()})
    try:
        plans = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in plans[:-MOST]:
            old.unlink(missing_ok=True)
    except OSError:
        pass  # another process deletes the same files


def shown(recipe: Recipe) -> dict[str, Any]:
    """`Plan.predicted` of the plan of this recipe that was shown last; {} if there was none."""
    found = cache_file.read(_path(recipe), FORM, {}) or {}
    predicted = found.get("predicted")
    return predicted if isinstance(predicted, dict) else {}


def _path(recipe: Recipe) -> Path:
    """One file per recipe and output folder: equal recipes in two folders may name different data."""
    name = f"{recipe.hash} {Path(recipe.output).resolve()}"
    return cache_root() / "plans" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
