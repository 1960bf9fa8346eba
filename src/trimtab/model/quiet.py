"""What libraries print that tells a user of trimtab nothing: silenced here, by name, for the length of a verb.

Progress bars go (trimtab shows its own), and of log lines only those in NOISE. All other warnings pass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# logger, how the line starts, why it is noise here
NOISE = (
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward", "an optional kernel that we do not use"),
    ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast", "int8 on bf16 is what was asked for"),
)


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no load reports of transformers: while trimtab loads a model."""
    from transformers.utils import logging as library

    level = library.get_verbosity()
    library.set_verbosity_error()
    try:
        with _no_bars():
            yield
    finally:
        library.set_verbosity(level)


@contextmanager
def hushed() -> Iterator[None]:
    """No noise of libraries while a verb runs; a context manager, or a decorator of a function that is no generator."""
    with ExitStack() as stack:
        for name, start, _ in NOISE:
            stack.enter_context(_without(logging.getLogger(name), start))
        stack.enter_context(_no_bars())
        yield


@contextmanager
def no_dataset_bars() -> Iterator[None]:
    """`datasets` maps without its bars. Imports it: for verbs that read data."""
    import datasets

    had = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not had:
            datasets.enable_progress_bars()


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging as library

    had = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if had:
            library.enable_progress_bar()


@contextmanager
def _without(logger: logging.Logger, start: str) -> Iterator[None]:
    def passes(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)
