"""A time limit for Python code by others, such as a chat template that loops."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TookTooLong(Exception):
    """The code within `time_limit` was stopped."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within it, this thread gets TookTooLong after so many seconds.

    It arrives between two bytecodes, so it stops loops of Python, and waits for a call into C. Any thread may use it.
    """
    thread, lock, inside = threading.get_ident(), threading.Lock(), True

    def stop() -> None:
        with lock:
            if inside:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TookTooLong))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TookTooLong:
        raise TookTooLong(f"it did not end within {seconds:g} seconds") from None
    finally:
        with lock:
            inside = False
        timer.cancel()
