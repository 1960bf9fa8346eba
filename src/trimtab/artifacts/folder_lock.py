"""A lock that lets one process at a time write into a folder, and ends with the process that holds it.

It is a kernel lock on a small file that names the process; a file that a killed process left behind locks nothing. On a
system or file system without such locks only the file is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import BadInput

NAME = ".lock"  # in a run's folder
FAR = 2**30  # beyond the end of any lock file
_HELD: set[Path] = set()  # by this process, since kernel locks do not distinguish its threads
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@contextlib.contextmanager
def locked(file: Path, asked: str, do: str = "Wait until it is done, or name another folder") -> Iterator[None]:
    """Hold a lock on `file`. BadInput, which says what was `asked` and what to `do`, if another process holds it.

    The file's folder is made if it is missing, and removed if it is still empty at the end.
    """
    file = file.absolute()
    missing = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(file, asked, do)
    except OSError as error:
        _remove_empty(missing)
        raise BadInput(f"{asked}: {file.parent}", error.strerror or str(error), "Name a folder that can be written") \
            from None  # fmt: skip
    _HELD.add(file)
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, without its holder's name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        _HELD.discard(file)
        with contextlib.suppress(OSError):
            file.unlink()  # still locked: a process that waits for it sees that the file is gone, and makes a new one
        os.close(descriptor)
        _remove_empty(missing)


def _open_locked(file: Path, asked: str, do: str) -> int:
    taken = f"is at work in {file.parent}"
    while True:
        if file in _HELD:  # opening and closing it would end the lock
            raise BadInput(asked, f"this process {taken}", do)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(descriptor):
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise BadInput(asked, f"process {holder} {taken}" if holder else f"another process {taken}", do)
        try:
            if os.path.samestat(os.stat(file), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass  # its holder has just released it
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the lock was free, or the file system has no locks."""
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(descriptor)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no forked worker inherits it
    except OSError as error:
        return error.errno not in _TAKEN
    return True


def _lock_on_windows(descriptor: int) -> bool:
    import msvcrt

    os.lseek(descriptor, FAR, os.SEEK_SET)  # a locked range cannot be read, and others read the beginning
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return True


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # the deepest first
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
