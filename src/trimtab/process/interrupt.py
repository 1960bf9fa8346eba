"""Ends a program on Ctrl-C with one line and exit code 130, as shells expect."""

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
    """Within it, Ctrl-C writes `line` on standard error and exits with 130; a second Ctrl-C does so at once.

    The first one raises KeyboardInterrupt, which some code (a destructor, a callback from a library) drops; the second
    one exits without an exception.
    """
    interrupted = False

    def handle(number: int, frame: Any) -> None:
        nonlocal interrupted
        if interrupted:
            os.write(2, _own_line(line).encode())
            os._exit(INTERRUPTED)
        interrupted = True
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # Python handles signals only there
    had = signal.getsignal(signal.SIGINT)
    ours = main and had is signal.default_int_handler  # else the signal is ignored (nohup) or has another handler
    if ours:
        signal.signal(signal.SIGINT, handle)
    try:
        yield
    except KeyboardInterrupt:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # while Python exits
            had = signal.SIG_IGN
        sys.stderr.write(_own_line(line))
        sys.exit(INTERRUPTED)
    finally:
        if ours:
            signal.signal(signal.SIGINT, had)


def _own_line(line: str) -> str:
    """`line`, on a new line if a terminal has printed ^C."""
    return f"\n{line}\n" if sys.stderr.isatty() else f"{line}\n"
