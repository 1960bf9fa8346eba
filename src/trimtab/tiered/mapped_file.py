"""Files of the slow tier: checks of free space, and mapped files without a name.

Free space is checked before any file is created, and a file's space is reserved when it is created. A disk that is too
small is therefore an error before the start; during a run the kernel could only kill the process.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, DoesNotFit
from ..memory.budget import available_memory, free_bytes, gib, nearest_folder

if TYPE_CHECKING:
    from torch import Tensor

RAM = ("tmpfs", "ramfs")  # file systems in memory
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # by the file system, of posix_fallocate
ALIGNED = 64  # bytes at which each tensor of a file begins
ZEROS = 2**24  # bytes that are written at a time


def slow_kind(slow: str, device: Any) -> str:
    """The slow tier of `device`, "ram" or "disk", if the recipe says `place: {slow: ...}`."""
    return slow if slow != "auto" else "ram" if device.type == "cuda" else "disk"


def require_space(size: int, folder: str | Path | None, what: str) -> None:
    """DoesNotFit if the disk of `folder` (None: that of temporary files) has no space for `size` bytes of `what`."""
    where = folder or tempfile.gettempdir()
    if (free := free_bytes(where)) < size:
        raise _too_small(size, where, what, f"{gib(free)} are free there")


def require_memory(size: int, what: str) -> None:
    """DoesNotFit if RAM has no space for another `size` bytes of `what`: the kernel would kill the process."""
    if (left := available_memory()) is not None and size > left:
        raise DoesNotFit(
            f"{gib(size)} of RAM for {what}", f"{gib(left)} are free", "Set place: slow: disk, or use a smaller table"
        )


def require_folder(folder: str) -> None:
    """BadInput if tables cannot be created in `folder`."""
    if not os.path.isdir(folder):
        why = "it is not a folder" if os.path.exists(folder) else "there is no such folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        why = "it cannot be written"
    else:
        return
    raise BadInput(f"place: folder: {folder}", why, "Create it, or name another")


def in_ram(folder: str | Path) -> bool:
    """Whether files in `folder` (or the nearest folder above it) lie in RAM: a file there saves no memory."""
    number = os.stat(nearest_folder(folder)).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # a system without it
        return False
    return any(line.split()[2] == device and line.partition(" - ")[2].split()[0] in RAM for line in mounts)


class MappedFile:
    """`size` bytes of an open file, read through a mapping and written through a descriptor; both see the same pages.

    A write through the mapping would cost a fault for each page that the kernel has written back since (measured:
    docs/LOG.md).
    """

    def __init__(self, descriptor: int, size: int):
        self.map = mmap.mmap(descriptor, size)
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)

    def write(self, offset: int, *data: Any) -> None:
        """Write each of `data` (objects with contiguous buffers) after the one before it."""
        left = [memoryview(piece).cast("B") for piece in data]
        while left:
            done = os.pwritev(self._descriptor, left, offset)
            offset += done
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            left[:1] = [piece[done:] for piece in left[:1]]

    def read(self, offset: int, into: Any) -> None:
        """Fill `into` (an object with a contiguous buffer) from the file, without mapping its pages."""
        left = memoryview(into).cast("B")
        while left:
            done = os.preadv(self._descriptor, [left], offset)
            if not done:
                raise OSError(errno.EIO, "the file is shorter than it was")
            offset, left = offset + done, left[done:]

    def forget(self) -> None:
        """Have the kernel drop the file's pages from memory, as if it did not hold the file."""
        os.fdatasync(self._descriptor)
        self.map.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def map_file(size: int, folder: str | None, what: str, suffix: str = "") -> MappedFile:
    """`size` bytes of zeros in a file without a name: it is freed when the process ends, however it ends. With `suffix`
    the file has a name, which ends so, until it is mapped."""
    where = folder or tempfile.gettempdir()
    make = functools.partial(tempfile.NamedTemporaryFile, suffix=suffix) if suffix else tempfile.TemporaryFile
    try:
        with make(dir=where, buffering=0) as file:  # type: ignore[operator]
            reserve(file, size)
            return MappedFile(file.fileno(), size)
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in FULL:
            raise _too_small(size, where, what, why.lower()) from None
        if error.errno == errno.ENODEV:
            why = "its file system does not map files"
        raise BadInput(
            f"{gib(size)} for {what} in {where}", why,
            "Name another folder on a local disk (place: folder), or set place: slow: ram",
        ) from None  # fmt: skip


def mapped_like(tensors: Mapping[Any, Tensor], folder: str | None, what: str) -> dict[Any, Tensor]:
    """Key -> zeros of the shape, dtype and strides of each tensor, each a storage of its own, all mapped from one file
    that is freed with the process. They are written in place; pages that were written belong to the file, not to
    anonymous memory. DoesNotFit, before anything is created, if the disk has no space for them."""
    import torch

    starts, size = {}, 0
    for key, tensor in tensors.items():
        starts[key] = size
        size += -(-tensor.nbytes // ALIGNED) * ALIGNED
    if folder:
        require_folder(folder)
    require_space(size, folder, what)
    file = map_file(size, folder, what, ".safetensors")  # the meter knows mapped weights by the name
    parts = {}
    for key, tensor in tensors.items():
        flat = torch.frombuffer(file.map, dtype=tensor.dtype, count=tensor.numel(), offset=starts[key])
        parts[key] = flat.as_strided(tensor.shape, tensor.stride())
    return parts


def reserve(file: Any, size: int) -> None:
    """Give an open file `size` bytes on its disk."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
        return
    except AttributeError:  # a system that does not have it
        pass
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    left = size  # bytes that are written are reserved on any file system
    while left:
        left -= file.write(bytes(min(left, ZEROS)))


def _too_small(size: int, folder: str | Path, what: str, why: str) -> DoesNotFit:
    return DoesNotFit(
        f"{gib(size)} for {what} in {folder}", why,
        "Name a folder with more space (place: folder), free some, or use a smaller table",
    )  # fmt: skip
