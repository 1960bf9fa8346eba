"""Work in a process of its own: what it held, and what an allocator took for it, is gone when it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def apart(work: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """What `work(*arguments)`, a function at the top of a module, gives in a fresh interpreter, which imports from
    where this one does and has `environment` beside this one's. Arguments and result go as JSON.

    Raises RuntimeError with the last line that it said where it fails.
    """
    code = f"import json, sys; from {work.__module__} import {work.__name__} as work; "
    code += "print(json.dumps(work(*json.loads(sys.argv[1]))))"
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)], capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])  # the lines before it are what `work` printed
