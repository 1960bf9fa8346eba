"""Silences what libraries print while a command runs: their progress bars, and the log lines in NOISE."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

# logger, start of the line, why it does not matter here
NOISE = (
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward", "an optional kernel that we do not use"),
    ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast", "int8 on bf16 is what was asked for"),
    ("torch._subclasses.fake_tensor", "failed while attempting to run meta", "the planner says what it cannot trace"),
)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no load reports of transformers, while a model is loaded."""
    no_kernel_lookup()
    from transformers.utils import logging as library

    level = library.get_verbosity()
    library.set_verbosity_error()
    try:
        with _no_bars():
            yield
    finally:
        library.set_verbosity(level)


@contextmanager
def silence_libraries() -> Iterator[None]:
    """No progress bars and no NOISE of libraries; a context manager, or a decorator (not of a generator)."""
    no_kernel_lookup()
    with ExitStack() as stack:
        for name, start, _ in NOISE:
            stack.enter_context(_without(logging.getLogger(name), start))
        stack.enter_context(_no_bars())
        yield


def no_kernel_lookup() -> None:
    """Imports bitsandbytes without its lookup of a kernel on the hub.

    On processors with AVX512-BF16 the first import (also by peft) does that lookup if the package `kernels` is
    installed; so that package is hidden during the import.
    """
    if "bitsandbytes" in sys.modules or not all(map(find_spec, ("kernels", "bitsandbytes"))):
        return
    had = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an import then raises ImportError
    try:
        with _without(logging.getLogger(NOISE[0][0]), NOISE[0][1]):
            importlib.import_module("bitsandbytes")
    finally:
        sys.modules.pop("kernels")
        if had is not None:
            sys.modules["kernels"] = had


def peft() -> Any:
    """The library peft, imported without the lookup, since it imports bitsandbytes."""
    no_kernel_lookup()
    return importlib.import_module("peft")


@contextmanager
def no_dataset_bars() -> Iterator[None]:
    """No progress bars of `datasets`, which this imports."""
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
