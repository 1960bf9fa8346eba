"""Keeps the plan that a user was shown before a run, for the run's report to compare with what the run used."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..cost import cache_file
from ..model.hub import cache_root
from ..recipe import Recipe
from .plan import Plan

FORM = 1
KEPT = 50  # plans; older ones are deleted


def remember(recipe: Recipe, made: Plan) -> None:
    """Keep what `made` predicts for `recipe`. Where the cache cannot be written, the report goes without it."""
    path = _path(recipe)
    cache_file.write(path, FORM, {"machine": {}, "predicted": made.predicted()})
    try:
        plans = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in plans[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        pass  # another process deletes the same ones


def shown(recipe: Recipe) -> dict[str, Any]:
    """What `Plan.predicted` returned for the plan that was shown last of this recipe; {} where there was none."""
    found = cache_file.read(_path(recipe), FORM, {}) or {}
    predicted = found.get("predicted")
    return predicted if isinstance(predicted, dict) else {}


def _path(recipe: Recipe) -> Path:
    """One file a recipe and output folder: equal recipes of two folders may name different data."""
    name = f"{recipe.hash} {Path(recipe.output).resolve()}"
    return cache_root() / "plans" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
