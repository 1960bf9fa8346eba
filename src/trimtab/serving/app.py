"""The routes, over Starlette: /v1/chat/completions, /v1/completions, /v1/models, /health.

transformers has such a server (`transformers serve`). Its handlers are not used, because they load each model that a
request names, ignore fields that they do not support, seed all requests at once, write stop words into streams, and
generate without a plan, a meter, a KV cache per request, or a way to refuse one: a stream has begun before its prompt
is looked at. What remains of them without these is below.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import BadInput, TrimtabError
from .jobs import Job, Reader
from .protocol import LOCAL, MOST_BYTES, Ask, Form, Refused, Reply, error_body, read_ask, read_body, status_of
from .worker import Worker, stopping

BODY = 30  # seconds that a request's body may take
STREAM = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class Server:
    """The routes for one run. `began`: seconds since the epoch. `local`: refuse requests that name another host than
    this machine, as a page in a browser can make it send by a name that it lets point here."""

    def __init__(self, name: str, began: int, reader: Reader, worker: Worker, local: bool):
        self.reader, self.worker, self.name, self.local = reader, worker, name, local
        self.most, self.active = worker.most + 2 * worker.rows, 0  # requests
        self.model = {"id": name, "object": "model", "created": began, "owned_by": "trimtab"}
        self.reading: set[asyncio.Task[bytes]] = set()
        self.tokenising = ThreadPoolExecutor(1, "trimtab-prompts")
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completion, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.one_model),
                Route("/health", self.health),
            ],
            exception_handlers={HTTPException: self.no_such_route, Exception: self.failed},
        )

    async def models(self, request: Request) -> Response:
        return self._checked(request) or JSONResponse({"object": "list", "data": [self.model]})

    async def one_model(self, request: Request) -> Response:
        asked = request.path_params["name"]
        if asked != self.name:
            have = f"this server has {self.name!r} only"
            return failure(Refused(404, f"model {asked!r}", have, f"Ask for {self.name!r}", "model_not_found"))
        return self._checked(request) or JSONResponse(self.model)

    async def health(self, request: Request) -> Response:
        return self._checked(request) or JSONResponse({"status": "ok", "waiting": len(self.worker.waiting)})

    async def chat(self, request: Request) -> Response | Replies:
        return await self._answer(request, chat=True)

    async def completion(self, request: Request) -> Response | Replies:
        return await self._answer(request, chat=False)

    async def no_such_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        have = "there is no such page" if error.status_code == 404 else "it does not take this method"
        known = "GET /v1/models, POST /v1/chat/completions and POST /v1/completions are there"
        return failure(Refused(error.status_code, f"{request.method} {request.url.path}", have, known))

    async def failed(self, request: Request, error: Exception) -> Response:
        """A bug: Starlette raises it again, and uvicorn keeps silent (serve.py)."""
        traceback.print_exception(error)
        return failure(error)

    def _checked(self, request: Request) -> Response | None:
        """The refusal of a request that did not mean this machine."""
        host = request.headers.get("host", "")
        bare = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if not self.local or bare.lower() in LOCAL:
            return None
        do = "Use localhost, or start the server with --host"
        return failure(Refused(403, f"reach this server as {host!r}", "it listens on this machine only", do))

    async def _answer(self, request: Request, chat: bool) -> Response | Replies:
        if refusal := self._checked(request):
            return refusal
        if self.active >= self.most:  # before their bodies are read
            have = f"{self.active} requests wait or are replied to"
            return failure(Refused(429, "wait for a reply", have, "Try again later", "queue_full"))
        self.active += 1
        try:
            ask = read_ask(read_body(await self._body(request)), self.name, chat)
            events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            put = lambda at, event: loop.call_soon_threadsafe(events.put_nowait, (at, event))  # noqa: E731
            jobs = await loop.run_in_executor(self.tokenising, self.reader.jobs, ask, put)
            self.worker.submit(jobs)
            return Replies(ask, Form(ask, self.name), jobs, events, self._over)
        except BaseException as error:
            self.active -= 1
            if not isinstance(error, TrimtabError):
                raise
            return failure(error)

    async def _body(self, request: Request) -> bytes:
        """The body, if it comes in time and before the server stops."""
        reading = asyncio.create_task(_body(request))
        self.reading.add(reading)
        try:
            await asyncio.wait([reading], timeout=BODY)
            if reading.cancelled():
                raise stopping()
            if not reading.done():
                have = f"it has not come within {BODY} seconds"
                raise Refused(408, "read the request's body", have, "Send it again")
            return reading.result()
        finally:
            reading.cancel()
            self.reading.discard(reading)

    def close(self) -> None:
        """Waits for no more bodies."""
        for reading in self.reading:
            reading.cancel()

    def _over(self, jobs: list[Job]) -> None:
        self.active -= 1
        self.worker.drop(jobs)


class Replies:
    """The response with the replies of `jobs`, whole or streamed; a refusal if one comes before any text.

    `over` is called with the jobs in the end, also when the client disconnects, whereupon no more is generated.
    """

    def __init__(
        self, ask: Ask, form: Form, jobs: list[Job], events: asyncio.Queue[tuple[int, Any]],
        over: Callable[[list[Job]], None],
    ):  # fmt: skip
        self.ask, self.form, self.jobs, self.events, self.over = ask, form, jobs, events, over

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        tasks = [asyncio.create_task(work) for work in (_disconnected(receive), self._send(scope, receive, send))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.over(self.jobs)
            for task in tasks:
                task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, OSError):
                raise result

    async def _send(self, scope: Any, receive: Any, send: Any) -> None:
        first = await self.events.get()  # "" when it begins: until then it can be refused
        if isinstance(first[1], Exception):
            await failure(first[1])(scope, receive, send)
            return
        if not self.ask.stream:
            await (await self._whole())(scope, receive, send)
            return
        headers = [(key.encode(), value.encode()) for key, value in STREAM.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for chunk in self._chunks():
            data = f"data: {chunk if isinstance(chunk, str) else _json(chunk)}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole(self) -> Response:
        replies: dict[int, Reply] = {}
        while len(replies) < len(self.jobs):
            at, event = await self.events.get()
            if isinstance(event, Exception):
                return failure(event)
            if isinstance(event, Reply):
                replies[at] = event
        return JSONResponse(self.form.whole([replies[at] for at in sorted(replies)]))

    async def _chunks(self) -> AsyncIterator[Any]:
        """The data of the events of a stream."""
        for chunk in self.form.begin():
            yield chunk
        replies: list[Reply] = []
        while len(replies) < len(self.jobs):
            at, event = await self.events.get()
            if isinstance(event, Exception):
                yield error_body(event)
                return
            if isinstance(event, Reply):
                replies.append(event)
                yield self.form.end(at, event)
            elif event:
                yield self.form.piece(at, event)
        for chunk in self.form.last(replies):
            yield chunk
        yield "[DONE]"


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page of another site cannot send unasked
        do = 'Send the header "Content-Type: application/json"'
        raise Refused(415, "read the request's body", f"its type is {kind or 'not given'}", do)
    body = bytearray()
    with contextlib.suppress(ClientDisconnect):
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                have = f"it is larger than {MOST_BYTES:,} bytes"
                raise Refused(413, "read the request's body", have, "Send a shorter prompt")
        return bytes(body)
    raise BadInput("read the request's body", "the client is gone", "Send it again")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def failure(error: Exception) -> Response:
    status = status_of(error)
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse(error_body(error), status, headers)
