"""`trimtab serve RECIPE.yaml`: the server, from the socket to the last reply."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..quiet import silence_libraries
from ..recipe import Recipe
from .protocol import LOCAL

GRACE = 8.0  # seconds that running replies may take after SIGTERM; containers are killed after 10
LEAST, USUAL = 64, 1024  # tokens of a prompt: of one that must fit, or the server does not start; of most


@silence_libraries()
def serve(
    recipe: Recipe, host: str = "127.0.0.1", port: int = 8000, name: str | None = None,
    adapter: str | Path | None = None, base_only: bool = False, batch: int = 8, queue: int = 64,
    settings: dict[str, Any] | None = None, say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Serves the run's model until SIGTERM (returns) or Ctrl-C (raises KeyboardInterrupt). Running replies are finished
    or, after some seconds, cut; waiting ones are refused.

    `name`: of the model, in requests; by default that of the run's folder. `batch`: most replies at once. `queue`: most
    that wait. `settings`: transformers' generation settings for requests that name none. `say` gets one line when the
    server is ready. The record is saved as `serve.json` in the run's folder, if there is one.

    Raises DoesNotFit if not even a reply to a short prompt fits `budget.fast`, and Stopped if the process uses more
    than the budget without any reply.
    """
    _require_libraries()
    with listening(host, port) as listener:
        from ..files import write_record
        from ..inference.generate import language_model
        from .jobs import Reader
        from .worker import Worker, too_large

        made = language_model(recipe, adapter, base_only, lambda line: None)
        name = name or (made.base.name if base_only else Path(recipe.output).resolve().name)
        failures: list[Exception] = []
        with made:
            reader = Reader(made, settings or {})
            made.pack(made.packs(reader.new))
            worker = Worker(made, batch, queue, failures.append)
            if excess := worker.room.excess(worker.work(1, LEAST, reader.new)):
                raise too_large(LEAST, reader.new, excess)
            worker.room.excess(worker.work(batch, USUAL, reader.new))  # planned now, not while clients wait
            address = f"[{host}]" if ":" in host else host
            at = f"http://{address}:{listener.getsockname()[1]}/v1"
            if host not in LOCAL:
                say(f"whoever reaches port {listener.getsockname()[1]} of this machine can use the model: no password")
            with worker, _signals() as signals:
                say(f'serving "{name}" at {at}: replies of up to {reader.new} tokens; Ctrl-C ends it')
                asyncio.run(_run(listener, name, reader, worker, signals, host in LOCAL))
            record = made.record()
            record["measured"].pop("tokens_per_second", None)  # most of the time it may have waited
        if adapter is None and Path(recipe.output).is_dir():
            write_record(Path(recipe.output) / "serve.json", record, say)
    if failures:
        raise failures[0]
    if signal.SIGINT in signals:
        raise KeyboardInterrupt


async def _run(listener: socket.socket, name: str, reader: Any, worker: Any, signals: list[int], local: bool) -> None:
    """Serves until a signal has come or the worker has ended."""
    import uvicorn

    from .app import Server

    class Own(uvicorn.Server):
        """Leaves signals to `_signals`."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def on_tick(self, counter: int) -> bool:
            self.should_exit = self.should_exit or bool(signals) or not worker.thread.is_alive()
            return await super().on_tick(counter)

    server = Server(name, int(time.time()), reader, worker, local)
    config = uvicorn.Config(
        server.app, http="h11", ws="none", loop="asyncio", lifespan="off", log_config=None, log_level="critical",
        access_log=False, proxy_headers=False, server_header=False, timeout_graceful_shutdown=int(GRACE) + 1,
    )  # fmt: skip
    closing = asyncio.create_task(_close(server, signals))
    await Own(config).serve(sockets=[listener])
    closing.cancel()


async def _close(server: Any, signals: list[int]) -> None:
    """Closes the server when a signal has come; a second one cuts the running replies at once."""
    for count, grace in ((1, GRACE), (2, 0.0)):
        while len(signals) < count:
            await asyncio.sleep(0.05)
        server.close()
        server.worker.close(grace)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Within it, SIGTERM and Ctrl-C only enter the list that this yields."""
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        came.append(number)

    had = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in had.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there (port 0: on a free one), before any work: clients wait until the server is ready."""
    asked = f"serve at {host}:{port}"
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    with made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((host, port))
            made.listen(128)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BadInput(asked, "the port is in use", "Choose another with --port") from None
            if error.errno == errno.EACCES:
                raise BadInput(asked, "this user may not use the port", "Choose one above 1023 with --port") from None
            have = f"this machine cannot listen there ({error.strerror or error})"
            raise BadInput(asked, have, "Use --host 127.0.0.1, or 0.0.0.0 for all addresses of this machine") from None
        yield made


def _require_libraries() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BadInput("serve", f"{error.name} is not installed", 'Run: pip install "trimtab[serve]"') from None
