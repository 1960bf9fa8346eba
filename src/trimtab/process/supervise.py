"""A run under a hard limit, watched from outside: where memory is refused to a library that does not look, the kernel
ends the process with a signal, and what the user should know of it is said by the process that started it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

CRASHES = tuple(getattr(signal, name) for name in ("SIGSEGV", "SIGABRT", "SIGBUS") if hasattr(signal, name))


def in_a_child(crashed: Callable[[str], Exception]) -> None:
    """Returns in a child process, which goes on with the work; the parent waits, and exits as the child does.

    A child that a crash ends raises `crashed(name of the signal)` in the parent. Call it before torch is imported: a
    process with threads cannot be forked.
    """
    if not hasattr(os, "fork") or "torch" in sys.modules:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    child = 0

    def pass_on(number: int, frame: Any) -> None:
        if child:  # 0 is the whole group
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    had = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal gives it to the child too
    signal.signal(signal.SIGTERM, pass_on)
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
    for number, handler in had.items():
        signal.signal(number, handler)
    if not child:
        return
    code = os.waitstatus_to_exitcode(status)
    if code < 0 and -code in CRASHES:
        raise crashed(signal.Signals(-code).name)
    os._exit(code if code >= 0 else 128 - code)
