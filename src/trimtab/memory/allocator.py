"""A malloc that gives memory back (CPU).

glibc's malloc maps and unmaps every large tensor anew and holds on to the rest: training steps then spend a third of
their time in page faults, and the process holds a quarter more than its tensors (figures in docs/results.md). With
mimalloc, jemalloc or tcmalloc in front of it the same step is faster and smaller. A malloc can only be chosen before a
process starts, so the command line starts itself again under one where it finds one.
"""

from __future__ import annotations

import glob
import os
import sys
from pathlib import Path

ORDER = ("mimalloc", "jemalloc", "tcmalloc")
CHOSEN = "TRIMTAB_ALLOCATOR"  # environment: the wish ("auto", "none", a name) before, what is active after the restart

STARTED = "TRIMTAB_RESTARTED"  # environment: the process (its id outlives the restart) that has started itself again


def find(name: str = "auto") -> tuple[str, str] | None:
    """(name, path of the shared library) of the first allocator found, the packaged wheel's before the system's."""
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
    """The allocator this process runs under: "mimalloc", ..., or "system"."""
    loaded = os.environ.get("LD_PRELOAD", "")
    return next((name for name in ORDER if name in loaded), "system")


def restart_under(name: str = "auto", hard: bool = False) -> None:
    """Replace this process by itself under the allocator `name`; returns if there is none, or it is already there.

    `hard`: it is not to map memory long before it needs it (mimalloc maps 1 GiB at a time), for that counts under
    RLIMIT_DATA (guard.py).

    `TRIMTAB_ALLOCATOR=none` in the environment keeps the system's malloc whatever the recipe says.
    """
    name = os.environ.get(CHOSEN, name)
    if name == "none" or active() != "system" or not sys.platform.startswith("linux"):
        return
    if os.environ.get(STARTED) == str(os.getpid()):  # it was tried, and something took it away again
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
    # sys.orig_argv[0] is the interpreter; the rest starts this program again whichever way it was started
    return sys.orig_argv[1:]
