"""Endpoints for whoever runs the server; there only with `--enable-admin-endpoints`."""

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from jpaged.server.protocol import AbortRequest
from jpaged.server.service import Service
from jpaged.server.transport import JsonRoute


def router_of(service: Service) -> APIRouter:
    router, llm = APIRouter(route_class=JsonRoute), service.llm

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        """Forgets the blocks kept from earlier requests."""
        await llm.call(lambda engine: engine.blocks.reset_prefix_cache())
        return PlainTextResponse("")

    @router.post("/pause")
    async def pause() -> Response:
        """Stops computing after the step that is running; requests wait."""
        await llm.pause()
        return PlainTextResponse("")

    @router.post("/resume")
    async def resume() -> Response:
        """Goes on."""
        await llm.resume()
        return PlainTextResponse("")

    @router.post("/abort_requests")
    async def abort_requests(body: AbortRequest) -> Response:
        """Ends some requests, or all."""
        await (llm.abort_all() if body.request_ids is None else llm.abort(body.request_ids))
        return PlainTextResponse("")

    return router
