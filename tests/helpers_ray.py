"""`python helpers_ray.py RECIPE.yaml [FILE]` trains in two workers of Ray; given FILE, one of them is killed once."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from pathlib import Path

from trimtab.integrations.ray import STATISTICS, train

HELD = contextlib.ExitStack()  # open as long as the worker lives


def kill_once(file: str) -> None:
    """In the worker of rank 1, the first time: it is killed at the end of step 3."""
    import torch

    from helpers_torchrun import killed

    if torch.distributed.get_rank() == 1 and not Path(file).exists():
        HELD.enter_context(killed(1, 3, file))


if __name__ == "__main__":
    recipe, *file = sys.argv[1:]
    result = train(recipe, 2, on_start=functools.partial(kill_once, file[0]) if file else None)
    print("RESULT", json.dumps({"steps": result["steps"], "sent": os.environ[STATISTICS]}))
