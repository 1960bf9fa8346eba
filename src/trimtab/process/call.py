"""Work in a process of its own: what it held, and what an allocator took for it, is gone when it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


def apart(
    work: Callable[..., Any], *arguments: Any, hear: Callable[[str], None] | None = None, **environment: str
) -> Any:
    """What `work(*arguments)`, a function at the top of a module, gives in a fresh interpreter, which imports from
    where this one does and has `environment` beside this one's. Arguments and result go as JSON. `hear` receives each
    line of its standard error (each state of a progress bar) as it comes.

    Raises RuntimeError with the last line that it said where it fails.
    """
    code = f"import json, sys; from {work.__module__} import {work.__name__} as work; "
    code += "print(json.dumps(work(*json.loads(sys.argv[1]))))"
    paths = os.pathsep.join(path for path in sys.path if path)
    said: deque[str] = deque(maxlen=50)
    with subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(arguments)], text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths, **environment},
    ) as child:  # fmt: skip

        def listen() -> None:
            for line in child.stderr or ():
                said.append(line)
                if hear is not None:
                    hear(line)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            written = child.stdout.read() if child.stdout else ""
            listener.join()
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        lines = [line.strip() for line in said if line.strip()]
        raise RuntimeError((lines or [f"exit code {child.returncode}"])[-1])
    return json.loads(written.splitlines()[-1])  # the lines before it are what `work` printed
