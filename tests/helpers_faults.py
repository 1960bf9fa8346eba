"""A disk that fails: from its n-th change on, every write into a folder is refused as the kernel would refuse it."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("mkdir", "replace", "rename", "link", "symlink")  # of os, whose last path may be in the folder
REMOVALS = ("unlink", "rmdir")  # which a full disk allows
OF_FILES = ("write", "pwrite", "ftruncate", "fsync", "posix_fallocate")  # of os, by a file's descriptor


class Disk:
    """Counts the changes within `root`; from number `nth` on (1 is the first) each raises OSError(`code`)."""

    def __init__(self, root: Path, nth: int, code: int = errno.ENOSPC):
        self.root, self.nth, self.code, self.count = root.resolve(), nth, code, 0

    @property
    def failed(self) -> bool:
        return self.count >= self.nth

    def holds(self, path: Any) -> bool:
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return False
        return isinstance(path, str | os.PathLike) and self.root in Path(os.path.abspath(path)).parents

    def change(self, path: Any, refuse: Callable[[int], Exception] | None = None) -> None:
        if self.holds(path):
            self.count += 1
            if self.failed:
                raise (refuse or (lambda code: OSError(code, os.strerror(code), str(path))))(self.code)


class File:
    """A file that is open for writing."""

    def __init__(self, file: Any, disk: Disk, path: Any):
        self._file, self._disk, self._path = file, disk, path

    def write(self, data: Any) -> int:
        try:
            self._disk.change(self._path)
        except OSError:
            self._file.write(data[: len(data) // 2])  # the disk takes a part
            raise
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


@contextlib.contextmanager
def failing(root: Path, nth: int, code: int = errno.ENOSPC) -> Iterator[Disk]:
    """Within it, changes in `root` fail from number `nth` on. Read-only is EROFS or EACCES with nth 1."""
    disk = Disk(root, nth, code)
    own = {name: getattr(os, name) for name in (*CHANGES, *REMOVALS, *OF_FILES, "open", "access")}
    plain, save = io.open, torch.save
    readonly = code in (errno.EROFS, errno.EACCES)

    def open_file(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        if not set(mode) & set("wax+") or not disk.holds(path):
            return plain(path, mode, *args, **more)
        disk.change(path)
        return File(plain(path, mode, *args, **more), disk, path)

    def os_open(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & WRITING:
            disk.change(path)
        return own["open"](path, flags, *args, **more)

    def of_paths(name: str) -> Callable[..., Any]:
        def changed(*args: Any, **more: Any) -> Any:
            paths = [arg for arg in args if isinstance(arg, str | os.PathLike)]
            if paths:
                disk.change(paths[-1])
            return own[name](*args, **more)

        return changed

    def of_file(name: str) -> Callable[..., Any]:
        def changed(descriptor: int, *args: Any) -> Any:
            if name != "fsync" or code == errno.EIO:
                disk.change(descriptor)
            return own[name](descriptor, *args)

        return changed

    def torch_save(obj: Any, file: Any, *args: Any, **more: Any) -> None:
        if disk.holds(file):
            said = "[enforce fail at inline_container.cc:778] . PytorchStreamWriter failed writing file data/3"
            disk.change(file, lambda code: RuntimeError(said))
        save(obj, file, *args, **more)

    def serialised(real: Callable[..., None]) -> Callable[..., None]:
        def changed(data: Any, file: Any, *args: Any, **more: Any) -> None:
            said = f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"
            disk.change(file, lambda code: SafetensorError(said))
            real(data, file, *args, **more)

        return changed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(io, "open", open_file)
        patched.setattr(builtins, "open", open_file)
        patched.setattr(os, "open", os_open)
        for name in CHANGES + REMOVALS * readonly:
            patched.setattr(os, name, of_paths(name))
        for name in OF_FILES:
            patched.setattr(os, name, of_file(name))
        if readonly:
            access = lambda path, mode, **more: not (mode & os.W_OK and (disk.holds(path) or Path(path) == root)) and (  # noqa: E731
                own["access"](path, mode, **more))  # fmt: skip
            patched.setattr(os, "access", access)
        patched.setattr(torch, "save", torch_save)
        for module in (safetensors.torch, safetensors.numpy):
            patched.setattr(module, "serialize_file", serialised(module.serialize_file))
        yield disk


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
