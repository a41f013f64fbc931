"""Renderer: one request of a client, from its fields to its answer; streamed or whole, for the first time or again."""

import abc
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from jpaged.server.ledger import Entry
from jpaged.server.positions import Position
from jpaged.server.protocol import Generation
from jpaged.server.service import Service
from jpaged.server.tickets import Ticket
from jpaged.server.transport import answer, stream_events
from jpaged.streams import Stream


class Renderer[Body: Generation](abc.ABC):
    """What completions and chat completions have in common.

    Args:
      body: what the client has sent.
      ticket: the name under which it runs.
    """

    def __init__(self, service: Service, body: Body, ticket: Ticket) -> None:
        self._service, self._body, self._ticket = service, body, ticket

    async def run(self, request: Request) -> Response:
        """Answers. What comes a second time under its name is the same request."""
        known = self._service.known(self._ticket, self._body)
        if known is not None:
            return await self.again(request, known, {})
        return await self._answer(request, await self._submit(), {})

    async def again(self, request: Request, entry: Entry, have: dict[int, Position]) -> Response:
        """Answers once more; what the client has of a stream is left out."""
        return await self._answer(request, await self._service.attach(entry, self._body), have)

    async def _answer(self, request: Request, streams: Sequence[Stream], have: dict[int, Position]) -> Response:
        if self._body.stream:
            return stream_events(self._service, streams, self._events(streams, have))
        return await answer(self._service, request, streams, self._whole(streams))

    @abc.abstractmethod
    async def _submit(self) -> list[Stream]:
        """Hands it to the engine."""

    @abc.abstractmethod
    async def _whole(self, streams: Sequence[Stream]) -> dict[str, Any]:
        """The answer in one piece."""

    @abc.abstractmethod
    def _events(self, streams: Sequence[Stream], have: dict[int, Position]) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
