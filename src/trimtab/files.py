"""Files and folders that appear on disk complete or not at all. Imports no torch.

While something is written or removed it has a hidden name in the same folder, `.NAME.PID.partial` or `.NAME.old`. A
killed process may leave one; the next writer of the same name removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import BadInput


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_record(path: Path, content: Any, say: Callable[[str], None]) -> None:
    """`write_json` for measurements that only add to what a command prints: `say` says that they were not written."""
    try:
        write_json(path, content)
    except OSError as error:
        say(f"{path} was not written: {error.strerror or error}")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, which then replaces `folder`; after an error it is removed."""
    partial = beside(folder, f"{os.getpid()}.partial")  # a child of a killed process may still write into another one
    for left in _partials(folder):
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partials(folder: Path) -> list[Path]:
    """What this or a killed process has of `folder`."""
    name = re.compile(rf"\.{re.escape(folder.name)}(\.\d+)?\.partial")
    found = list(folder.parent.iterdir()) if folder.parent.is_dir() else []
    return [path for path in found if name.fullmatch(path.name)]


def replace_folder(new: Path, folder: Path) -> None:
    """Replace `folder` by `new` with one rename; the old folder is then removed, or restored after an error."""
    old = _aside(folder)
    try:
        os.replace(new, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def discard(folder: Path) -> None:
    """Hide the folder at once, then remove it, so that a process killed in between leaves no incomplete folder."""
    shutil.rmtree(_aside(folder), ignore_errors=True)


def _aside(folder: Path) -> Path:
    old = beside(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    return old


def link(old: Path, new: Path) -> None:
    """One file under two names, which takes no space; a copy where the file system has no such links."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def beside(path: Path, ending: str) -> Path:
    """A hidden name in the same folder."""
    return path.with_name(f".{path.name}.{ending}")


def sync(folder: Path) -> None:
    """Flush the folder's files to the disk (fsync), before it is renamed."""
    for path in (*folder.rglob("*"), folder):
        sync_entry(path)


def sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(asked: str, do: str) -> Iterator[None]:
    """A context in which a file that cannot be written raises BadInput; other errors are unchanged.

    A full disk is an OSError to Python, a SafetensorError to safetensors and a RuntimeError to torch.save.
    """
    try:
        yield
    except Exception as error:
        if (why := _unwritten(error)) is None:
            raise
        raise BadInput(asked, why, do) from error


def _unwritten(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = " ".join(str(error).split())
    if isinstance(error, SafetensorError) and "I/O error" in text:
        return text.partition("I/O error: ")[2].rstrip(".") or text
    if found := re.search(r"([\w ,-]+) \(os error \d+\)", text):  # tokenizers raises Exception with the kernel's words
        return found[1].strip()
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
        return "torch could not write it; the disk may be full"
    return None
