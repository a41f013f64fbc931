"""OpenTelemetry spans: one for each request, when it has ended, with the names that vLLM gives them.

Names are those of the semantic conventions for generative AI, and vLLM's where there are none. No span has a text.
A request's span belongs to the trace that its `traceparent` header names.
"""

import contextvars
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

import jpaged
from jpaged.errors import InvalidConfigError
from jpaged.outputs import RequestOutput
from jpaged.sampling_params import SamplingParams

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

_HEADERS = ("traceparent", "tracestate")
_carried: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("trace_headers", default=None)


def exporting_to(endpoint: str) -> "TracerProvider":
    """A provider that sends spans over OTLP/HTTP, in batches and from a thread of its own.

    Raises:
      InvalidConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidConfigError(
            f"otlp_traces_endpoint needs OpenTelemetry: pip install 'jpaged[tracing]'. ({error})"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "jpaged"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class TraceHeaders:
    """Keeps a request's trace headers, where `Tracing.begin` finds them. Plain ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            _carried.set({name: headers[name] for name in _HEADERS if name in headers})
        await self._app(scope, receive, send)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Begun:
    """A request without a span as yet."""

    params: SamplingParams
    context: "Context | None"
    """Of the trace that it belongs to; None: a new one."""


class Tracing:
    """Makes a span of each request.

    Args:
      provider: where spans go.
      model_name: an attribute of all of them.
    """

    def __init__(self, provider: "TracerProvider", model_name: str) -> None:
        self._provider, self._model = provider, model_name
        self._tracer = provider.get_tracer("jpaged", jpaged.__version__)
        self._begun: dict[str, Begun] = {}

    def begin(self, request_id: str, params: SamplingParams) -> "Begun":
        """A request is about to be queued; in the context of whoever asked for it."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = _carried.get()
        context = TraceContextTextMapPropagator().extract(headers) if headers else None
        begun = Begun(params, context)
        self._begun.setdefault(request_id, begun)  # if there is one, this one will be refused
        return begun

    def forget(self, request_id: str, begun: "Begun") -> None:
        """It was not taken."""
        if self._begun.get(request_id) is begun:
            del self._begun[request_id]

    def end(self, output: RequestOutput, generated: int) -> None:
        """It has ended. On the engine's thread.

        Args:
          generated: tokens, of all samples.
        """
        from opentelemetry.trace import SpanKind

        begun = self._begun.pop(output.request_id, None)
        finished = output.metrics.finished_time
        if begun is None or finished is None:
            return
        offset = time.time() - time.monotonic()
        span = self._tracer.start_span(
            "llm_request",
            context=begun.context,
            kind=SpanKind.SERVER,
            start_time=int(1e9 * (output.metrics.arrival_time + offset)),
            attributes=self._attributes(output, begun.params, generated),
        )
        span.end(int(1e9 * (finished + offset)))

    def close(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()

    def _attributes(self, output: RequestOutput, params: SamplingParams, generated: int) -> dict[str, Any]:
        times = output.metrics
        told: dict[str, Any] = {
            "gen_ai.operation.name": "chat" if output.request_id.startswith("chatcmpl-") else "text_completion",
            "gen_ai.provider.name": "jpaged",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.id": output.request_id,
            "gen_ai.response.id": output.request_id,
            "gen_ai.request.n": params.n,
            "gen_ai.request.temperature": float(params.temperature),
            "gen_ai.request.top_p": float(params.top_p),
            "gen_ai.response.finish_reasons": [one.finish_reason or "" for one in output.outputs],
            "gen_ai.usage.num_sequences": len(output.outputs),
            "jpaged.cached_tokens": output.num_cached_tokens,
            "jpaged.preemptions": times.num_preemptions,
        }
        if params.max_tokens is not None:
            told["gen_ai.request.max_tokens"] = params.max_tokens
        for names, count in (
            (("input", "prompt"), len(output.prompt_token_ids)),
            (("output", "completion"), generated),
        ):
            told |= {f"gen_ai.usage.{name}_tokens": count for name in names}
        return told | _latencies(output)


def _latencies(output: RequestOutput) -> dict[str, float]:
    """In seconds; of what it did not come to, none."""
    times = output.metrics
    arrived, scheduled, first, finished = (
        *(times.arrival_time, times.first_scheduled_time),
        *(times.first_token_time, times.finished_time),
    )
    spans = {
        "e2e": (arrived, finished),
        "time_in_queue": (arrived, scheduled),
        "time_to_first_token": (arrived, first),
        "time_in_model_prefill": (scheduled, first),
        "time_in_model_decode": (first, finished),
        "time_in_model_inference": (scheduled, finished),
    }
    return {
        f"gen_ai.latency.{name}": end - start
        for name, (start, end) in spans.items()
        if start is not None and end is not None
    }
