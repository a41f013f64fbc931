"""The ASGI application: all endpoints, and what stands in front of them."""

import os
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

import jpaged
from jpaged.async_engine import AsyncLLM
from jpaged.server import admin, chat, completions, embeddings, errors, requests, score, status, tokenize, tracing, ui
from jpaged.server.config import ServerConfig
from jpaged.server.metrics import Metrics
from jpaged.server.middleware import Guard, Limits, RequestIds
from jpaged.server.protocol import ErrorResponse
from jpaged.server.service import Service

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_FAILURES = (400, 401, 404, 405, 408, 409, 413, 415, 431, 500, 503)


def make_app(llm: AsyncLLM, config: ServerConfig, tracer_provider: "TracerProvider | None" = None) -> FastAPI:
    """The application around an engine, which stays the caller's to shut down.

    Args:
      tracer_provider: where OpenTelemetry spans go; None: where `config` says, if anywhere.

    Raises:
      InvalidConfigError: see `Service`, `tracing.exporting_to`.
    """
    service = Service(llm, config)
    metrics = Metrics(llm, service.names[0])
    app = FastAPI(
        title="jpaged",
        version=jpaged.__version__,
        root_path=config.root_path,
        responses={code: {"model": ErrorResponse} for code in _FAILURES},
    )
    app.state.service, app.state.metrics = service, metrics
    errors.install(app)
    for router in (
        completions.router_of(service),
        chat.router_of(service),
        embeddings.router_of(service),
        score.router_of(service),
        tokenize.router_of(service),
        status.router_of(service, metrics),
    ):
        app.include_router(router)
    if config.enable_admin_endpoints:
        app.include_router(admin.router_of(service))
    if service.durable is not None:
        app.include_router(requests.router_of(service, service.durable))
    if config.enable_ui:
        app.include_router(ui.router_of(service, metrics))
    # The last one added stands in front: pages ask for CORS without a key.
    app.add_middleware(Limits, max_body_bytes=config.max_body_bytes)
    app.add_middleware(Guard, keys=api_keys(config))
    if tracer_provider is None and config.otlp_traces_endpoint is not None:
        tracer_provider = tracing.exporting_to(config.otlp_traces_endpoint)
    if tracer_provider is not None:
        service.tracing = tracing.Tracing(tracer_provider, service.names[0])
        metrics.on_end = service.tracing.end
        app.add_middleware(tracing.TraceHeaders)
    if config.enable_request_id_headers:
        app.add_middleware(RequestIds)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )
    return app


def api_keys(config: ServerConfig) -> tuple[str, ...]:
    """The keys of the flags and of the environment."""
    from_environment = os.environ.get("JPAGED_API_KEY", "").split(",")
    return (*config.api_key, *(key.strip() for key in from_environment if key.strip()))
