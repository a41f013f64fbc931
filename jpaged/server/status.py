"""What a server says about itself: health, load, version, models, metrics."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

import jpaged
from jpaged.server.errors import ApiError
from jpaged.server.metrics import Metrics
from jpaged.server.service import Service


def router_of(service: Service, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """200 while the engine's thread ends its steps; 503 when it is stuck or dead."""
        if not service.llm.is_healthy:
            raise ApiError(503, "the engine does not make steps.", code="unhealthy")
        return PlainTextResponse("")

    @router.get("/ping")
    @router.post("/ping", include_in_schema=False)
    async def ping() -> Response:
        """As /health."""
        return await health()

    @router.get("/load")
    async def load() -> dict[str, int]:
        """Requests that are being answered."""
        return {"server_load": service.in_flight}

    @router.get("/version")
    async def version() -> dict[str, str]:
        """Of jpaged."""
        return {"version": jpaged.__version__}

    @router.get("/metrics")
    def read_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, under each of its names."""
        return {"object": "list", "data": [_card(service, name) for name in service.names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of the names."""
        return _card(service, service.check_model(name))

    return router


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "jpaged",
        "root": service.names[0],
        "parent": None,
        "max_model_len": service.llm.engine.max_model_len,
    }
