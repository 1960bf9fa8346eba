"""Starts the process again under a malloc that returns freed memory (CPU).

glibc's malloc maps and unmaps every large tensor and keeps the rest: training steps then spend a third of their time in
page faults, and the process uses a quarter more than its tensors (figures in docs/results.md). With mimalloc, jemalloc
or tcmalloc, the same step is faster and uses less memory. A malloc can only be chosen before a process starts, so the
command line starts itself again under one if it finds one.
"""

from __future__ import annotations

import glob
import os
import sys
from pathlib import Path

ORDER = ("mimalloc", "jemalloc", "tcmalloc")
CHOSEN = "TRIMTAB_ALLOCATOR"  # environment: before the restart "auto", "none" or a name; then the name in use
STARTED = "TRIMTAB_RESTARTED"  # environment: id of the process (the same after the restart) that restarted itself


def find(name: str = "auto") -> tuple[str, str] | None:
    """-> (name, path of the shared library) of the first allocator found; wheels come before the system's libraries."""
    for wanted in ORDER if name == "auto" else (name,):
        folders = [Path(p) / "cmeel.prefix" / "lib" for p in sys.path if p.endswith("site-packages")]
        folders += [Path("/usr/lib"), Path("/usr/local/lib"), *map(Path, glob.glob("/usr/lib/*-linux-gnu"))]
        for folder in folders:
            hits = [
                p for pattern in (f"lib{wanted}.so*", f"lib{wanted}_minimal.so*") for p in sorted(folder.glob(pattern))
            ]
            if hits:
                return wanted, str(hits[0])
    return None


def active() -> str:
    """The allocator of this process: "mimalloc", ..., or "system"."""
    loaded = os.environ.get("LD_PRELOAD", "")
    return next((name for name in ORDER if name in loaded), "system")


def restart_under(name: str = "auto", hard: bool = False) -> None:
    """Restarts this process under the allocator `name`; returns if there is none, or if it is already in use.

    `hard`: the allocator maps memory only when needed (mimalloc would map 1 GiB at a time), since mapped memory counts
    under RLIMIT_DATA (guard.py). `TRIMTAB_ALLOCATOR=none` in the environment keeps the system's malloc.
    """
    name = os.environ.get(CHOSEN, name)
    if name == "none" or active() != "system" or not sys.platform.startswith("linux"):
        return
    if os.environ.get(STARTED) == str(os.getpid()):  # a restart did not set it
        return
    found = find(name)
    if found is None:
        return
    preload = " ".join(part for part in (os.environ.get("LD_PRELOAD", ""), found[1]) if part)
    environment = {**os.environ, "LD_PRELOAD": preload, CHOSEN: name, STARTED: str(os.getpid())}
    if hard:
        environment.setdefault("MIMALLOC_ARENA_EAGER_COMMIT", "0")
    os.execve(sys.executable, [sys.executable, *_own_arguments()], environment)


def _own_arguments() -> list[str]:
    # sys.orig_argv[0] is the interpreter; the rest restarts this program, however it was started
    return sys.orig_argv[1:]
