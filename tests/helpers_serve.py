"""A server in a process of its own, on a free port of this machine, and what it says and uses."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import openai

import trimtab
from helpers_network import REFUSED
from trimtab.memory.meter import process_memory

SECONDS = 60  # until a process counts as stuck

COUNTED = (
    REFUSED
    + """
sys.argv[0] = "trimtab"
try:
    cli.main()
finally:
    print("ASKED", asked, flush=True)
"""
)


class Served:
    """A running server. `name`: of its model."""

    def __init__(self, process: subprocess.Popen | None, line: str):
        self.process = process
        self.name = line.split('"')[1]
        self.url = line.split(" at ")[1].split(": ")[0]
        self.port = int(self.url.split(":")[2].split("/")[0])

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=SECONDS)

    def chat(self, text: str, client: openai.OpenAI | None = None, **fields: Any) -> Any:
        messages = [{"role": "user", "content": text}]
        return (client or self.client()).chat.completions.create(model=self.name, messages=messages, **fields)

    def post(self, body: bytes | dict, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict]:
        """-> (status, JSON) of a request as it stands."""
        wire = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        data = body if isinstance(body, bytes) else json.dumps(body)
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        wire.request("POST", path, data, {"content-type": "application/json", **named})
        got = wire.getresponse()
        found = got.status, json.loads(got.read())
        wire.close()
        return found

    def get(self, path: str) -> dict:
        wire = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        wire.request("GET", path)
        found = json.loads(wire.getresponse().read())
        wire.close()
        return found

    def anonymous(self) -> int:
        """Anonymous bytes that the process uses."""
        return process_memory(self.process.pid)["anon"]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Sends the signal; -> (exit code, the rest of standard output, standard error)."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err


def start(*arguments: str) -> subprocess.Popen:
    """`trimtab serve` in a process that counts connections."""
    environment = {**os.environ, "PYTHONPATH": str(Path(trimtab.__file__).parents[1]), "TRIMTAB_ALLOCATOR": "none",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", COUNTED, "serve", *arguments], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    process = start(*arguments, "--port", "0")
    try:
        lines: Queue[str] = Queue()
        threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()
        line = lines.get(timeout=3 * SECONDS)
        assert line.startswith("serving"), process.communicate(timeout=SECONDS)[1][-3000:]
        yield Served(process, line)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
