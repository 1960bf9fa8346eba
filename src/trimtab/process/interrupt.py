"""Ctrl-C ends a program with one line and the code that shells know: 130."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

INTERRUPTED = 130


@contextlib.contextmanager
def stopped_by_interrupt(line: str) -> Iterator[None]:
    """Within it, Ctrl-C says `line` on standard error and exits with 130; a second one does so at once.

    Python hands a Ctrl-C to whatever code runs just then, and some of it (a destructor, a callback from a library)
    drops exceptions: the second does not depend on it.
    """
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            os.write(2, _own_line(line).encode())
            os._exit(INTERRUPTED)
        asked = True
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # Python hands signals to no other
    had = signal.getsignal(signal.SIGINT)
    ours = main and had is signal.default_int_handler  # ignored (nohup, a shell's background) or another's: left alone
    if ours:
        signal.signal(signal.SIGINT, ask)
    try:
        yield
    except KeyboardInterrupt:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is Python's own way out
            had = signal.SIG_IGN
        sys.stderr.write(_own_line(line))
        sys.exit(INTERRUPTED)
    finally:
        if ours:
            signal.signal(signal.SIGINT, had)


def _own_line(line: str) -> str:
    """A terminal has shown ^C, and left the cursor behind it."""
    return f"\n{line}\n" if sys.stderr.isatty() else f"{line}\n"
