"""Between handlers and HTTP: server-sent events, and requests whose client has gone away."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json, to_json
from starlette.types import Receive, Scope, Send

from jpaged.server.errors import ApiError, as_api_error, body_of
from jpaged.server.service import Service
from jpaged.streams import Stream

WRITE_TIMEOUT = 300.0
"""Seconds that a client may take nothing of a stream before its request is dropped."""
CLIENT_GONE = 499


class JsonRequest(Request):
    """Reads JSON with bounded nesting and without NaN."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = from_json(await self.body(), allow_inf_nan=False)
            except ValueError as error:
                raise ApiError(400, f"the body is not valid JSON: {error}.", code="invalid_json") from error
        return self._json


class JsonRoute(APIRoute):
    """A route whose body is read by `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if self.body_field is not None and kind != "application/json":
                raise ApiError(415, "send the body as JSON, with the header 'Content-Type: application/json'.")
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


class EventStream(StreamingResponse):
    """Server-sent events; a client that takes nothing for long is dropped."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, since = asyncio.get_running_loop(), math.inf  # since when the client has had something to take
        looking: asyncio.TimerHandle  # one for a stream, not one for each event

        async def timed_send(message: Any) -> None:
            nonlocal since
            since = loop.time()
            await send(message)
            since = math.inf

        def look() -> None:
            nonlocal looking
            if loop.time() - since > WRITE_TIMEOUT:
                patience.reschedule(loop.time())
            else:
                looking = loop.call_later(WRITE_TIMEOUT / 4, look)

        looking = loop.call_later(WRITE_TIMEOUT / 4, look)
        with contextlib.suppress(TimeoutError):
            try:
                async with asyncio.timeout(None) as patience:
                    await super().__call__(scope, receive, timed_send)
            finally:
                looking.cancel()


def event(data: dict[str, Any], event_id: str | None = None) -> bytes:
    name = b"" if event_id is None else b"id: " + event_id.encode() + b"\n"
    return name + b"data: " + to_json(data, inf_nan_mode="constants") + b"\n\n"


def stream_events(service: Service, streams: Sequence[Stream], events: AsyncIterator[bytes]) -> Response:
    """An answer that is streamed; however it ends, see `Service.end`."""

    async def guarded() -> AsyncIterator[bytes]:
        service.in_flight += 1
        try:
            async with contextlib.aclosing(events):  # type: ignore[type-var]
                async for one in events:
                    yield one
        except Exception as error:  # the status is sent already: the error goes where the answer would
            yield event(body_of(as_api_error(error)))
        finally:
            service.in_flight -= 1
            service.end(streams)
        yield b"data: [DONE]\n\n"

    return EventStream(guarded())


async def answer(
    service: Service, request: Request, streams: Sequence[Stream], work: Awaitable[dict[str, Any]]
) -> Response:
    """An answer in one piece; if the client goes away before, see `Service.end`."""
    service.in_flight += 1
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(working.result()) if working.done() else Response(status_code=CLIENT_GONE)
    finally:
        service.in_flight -= 1
        service.end(streams)
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
