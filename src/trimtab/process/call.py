"""Runs a function in a subprocess, so that all of its memory is returned to the system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

# a thread that ends the process when its standard input is closed: by the parent's end, if that is killed
_ENDS_WITH_PARENT = "import os, threading; " \
    "threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()"  # fmt: skip


def subprocess_call(
    work: Callable[..., Any], *arguments: Any, on_line: Callable[[str], None] | None = None, **environment: str
) -> Any:
    """The result of `work(*arguments)`, a module-level function, in a new interpreter with the same `sys.path` and with
    `environment` added to this one's. Arguments and result are passed as JSON. `on_line` receives each line of its
    standard error (each state of a progress bar) as it is written.

    Raises RuntimeError with the last line of standard error if the process fails.
    """
    code = f"import json, sys; {_ENDS_WITH_PARENT}; from {work.__module__} import {work.__name__} as work; "
    code += "print(json.dumps(work(*json.loads(sys.argv[1]))))"
    paths = os.pathsep.join(path for path in sys.path if path)
    newest: deque[str] = deque(maxlen=50)
    with subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(arguments)], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths, **environment},
    ) as child:  # fmt: skip

        def listen() -> None:
            for line in child.stderr or ():
                newest.append(line)
                if on_line is not None:
                    on_line(line)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            written = child.stdout.read() if child.stdout else ""
            listener.join()
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        lines = [line.strip() for line in newest if line.strip()]
        raise RuntimeError((lines or [f"exit code {child.returncode}"])[-1])
    return json.loads(written.splitlines()[-1])  # `work` may have printed lines before it
