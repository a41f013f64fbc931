"""GET and DELETE /v1/requests/{id}: requests that have outlived their connection, or the server."""

import json
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import Response

from jpaged.server.chat import ChatCompletion
from jpaged.server.completions import Completions
from jpaged.server.durable import Durable
from jpaged.server.positions import parse
from jpaged.server.service import Service, owner_of

_Id = Annotated[str, Path(max_length=512)]


def router_of(service: Service, durable: Durable) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/requests/{request_id}")
    async def reattach(
        request: Request,
        request_id: _Id,
        stream: Annotated[bool | None, Query()] = None,
        from_char: Annotated[int | None, Query(ge=0, le=1 << 30)] = None,
        last_event_id: Annotated[str | None, Header(max_length=4096)] = None,
    ) -> Response:
        """The answer to a request that was made before, from the beginning or from where its stream was cut off.

        As the request wanted it, streamed or in one piece (when it is complete), unless `stream` says otherwise.
        """
        entry = durable.find(request_id, owner_of(request))
        renderer: Any = {"cmpl": Completions, "chatcmpl": ChatCompletion}[entry.ticket.kind]
        body = renderer.Body.model_validate_json(json.dumps(entry.body))
        if stream is not None:
            body = body.model_copy(update={"stream": stream})
        return await renderer(service, body, entry.ticket).again(request, entry, parse(last_event_id, from_char))

    @router.delete("/v1/requests/{request_id}")
    async def delete(request: Request, request_id: _Id) -> dict[str, Any]:
        """Ends a request, if it has not ended, and forgets its result."""
        entry = durable.find(request_id, owner_of(request))
        durable.forget(entry)
        return {"id": entry.ticket.id, "object": "request.deleted", "deleted": True}

    return router
