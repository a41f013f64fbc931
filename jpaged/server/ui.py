"""The server as a picture: /ui, a page, and /ui/state, what it draws; there only with `--enable-ui`.

A snapshot is made when somebody looks, between two steps, and not more often than `EVERY`, however many look.
Everything else (differences, JSON) happens on another thread than the engine's and the event loop's.
"""

import asyncio
import dataclasses
import json
import time
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse, Response

import jpaged
from jpaged.memory_view.html import live_page
from jpaged.memory_view.live import Feed, look
from jpaged.memory_view.snapshot import Snapshot
from jpaged.server.metrics import Metrics
from jpaged.server.service import Service

EVERY = 0.2
"""Seconds between two snapshots, at least."""
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def router_of(service: Service, metrics: Metrics) -> APIRouter:
    router, window = APIRouter(), Window(service, metrics)
    page, policy = live_page()

    @router.get("/ui")
    async def ui() -> Response:
        """A page for people: the KV pool and the requests, as they run."""
        return HTMLResponse(page, headers={**_HEADERS, "Content-Security-Policy": policy})

    @router.get("/ui/state")
    async def state(cursor: Annotated[str, Query(max_length=64)] = "") -> Response:
        """What that page draws: the changes since a cursor, which the answer before gave."""
        return Response(await window.look(cursor), media_type="application/json", headers=_HEADERS)

    return router


class Window:
    """Through which everybody looks at one engine."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics
        self._one_at_a_time = asyncio.Lock()
        self._feed: Feed | None = None
        self._looked_at = -EVERY

    async def look(self, cursor: str) -> bytes:
        """The answer to a reader, as JSON.

        Raises:
          EngineDeadError: there is nothing to be seen any more.
        """
        llm = self._service.llm
        async with self._one_at_a_time:
            latest = None
            if time.monotonic() - self._looked_at >= EVERY:
                latest = await llm.call(look)
                self._looked_at = time.monotonic()
            return await llm.in_worker(self._answer, latest, cursor)

    def _answer(self, latest: Snapshot | None, cursor: str) -> bytes:
        if latest is not None:
            self._feed = self._feed or Feed(latest.pool)
            self._feed.push(latest)
        metrics, engine = self._metrics, self._service.llm.engine
        answer = {
            "title": self._service.names[0],
            "version": jpaged.__version__,
            "now": int(1000 * time.monotonic()),
            "uptime": int(time.time()) - self._service.created,
            "rates": dataclasses.asdict(metrics.rates()),
            "totals": dataclasses.asdict(metrics.totals),
            "ended": metrics.ended,
            "rejected": self._service.llm.num_rejected,
            "rows": engine.blocks.tables.shape[0],
            **(self._feed.since(cursor) if self._feed is not None else {}),
        }
        return json.dumps(answer, separators=(",", ":")).encode()
