"""A span for each request: its names, its numbers, its place in the caller's trace; and no text."""

import builtins
import threading

import pytest

from jpaged.errors import InvalidConfigError
from jpaged.server import tracing
from tests.server.support import raw_post, serving

memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
SECRET = "a secret"


@pytest.fixture(scope="module")
def exporter():
    return memory.InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(tiny, exporter):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine = tiny(enable_prefix_caching=False)
    with serving(engine, tracer_provider=provider, enable_admin_endpoints=True) as live:
        yield live


@pytest.fixture
def spans(traced, exporter):
    """Those of the requests since the test began, by request."""
    exporter.clear()

    def ended():
        traced.idle()
        return {span.attributes["gen_ai.request.id"]: span for span in exporter.get_finished_spans()}

    return ended


def test_a_span_says_how_long_and_how_many(traced, spans):
    body = {"prompt": SECRET, "n": 2, "temperature": 0.5, "top_p": 0.75, "max_tokens": 7, "ignore_eos": True}
    usage = traced.post("/v1/completions", **body, request_id="one").json()["usage"]
    [(name, span)] = spans().items()
    told = dict(span.attributes)
    assert (name, span.name, span.kind.name, span.parent) == ("cmpl-one", "llm_request", "SERVER", None)
    assert told["gen_ai.usage.input_tokens"] == told["gen_ai.usage.prompt_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == told["gen_ai.usage.completion_tokens"] == 14
    assert told["gen_ai.usage.num_sequences"] == told["gen_ai.request.n"] == 2
    assert told["gen_ai.request.temperature"] == 0.5
    assert told["gen_ai.request.top_p"] == 0.75
    assert told["gen_ai.request.max_tokens"] == 7
    assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "tiny"
    assert told["gen_ai.response.finish_reasons"] == ("length", "length")
    assert told["gen_ai.operation.name"] == "text_completion"
    parts = [told[f"gen_ai.latency.time_in_{part}"] for part in ("queue", "model_prefill", "model_decode")]
    assert min(parts) >= 0
    assert told["gen_ai.latency.e2e"] == pytest.approx(sum(parts))
    assert told["gen_ai.latency.time_to_first_token"] == pytest.approx(parts[0] + parts[1])
    assert told["gen_ai.latency.time_in_model_inference"] == pytest.approx(parts[1] + parts[2])
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(told["gen_ai.latency.e2e"], abs=1e-3)
    assert SECRET not in span.to_json()


def test_it_belongs_to_the_callers_trace(traced, spans):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    for i, header in enumerate((f"00-{trace}-{parent}-01", "nonsense")):
        body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2, "request_id": str(i)}
        traced.http.post("/v1/chat/completions", json=body, headers={"traceparent": header})
    found = spans()
    inside = found["chatcmpl-0"]
    assert f"{inside.context.trace_id:032x}" == trace
    assert f"{inside.parent.span_id:016x}" == parent
    assert inside.attributes["gen_ai.operation.name"] == "chat"
    assert found["chatcmpl-1"].parent is None


def test_refused_and_aborted_requests(traced, spans):
    """Of what was refused there is no span; what a refused one was called like has its own."""
    assert traced.post("/v1/completions", prompt="a", stop_token_ids=[999]).status_code == 400
    traced.post("/pause")
    first = threading.Thread(target=traced.post, args=("/v1/completions",), kwargs={"prompt": "a", "request_id": "x"})
    first.start()
    gone = raw_post(traced, "/v1/completions", prompt="b", request_id="gone")
    while traced.llm.num_unfinished_requests < 2:
        pass
    assert traced.post("/v1/completions", prompt="a", request_id="x").status_code == 400
    gone.close()
    while traced.llm.num_unfinished_requests > 1:
        pass
    traced.post("/resume")
    first.join()
    found = spans()
    assert set(found) == {"cmpl-x", "cmpl-gone"}
    told = found["cmpl-gone"].attributes
    assert told["gen_ai.response.finish_reasons"] == ("abort",)
    assert told["gen_ai.usage.output_tokens"] == 0
    assert "gen_ai.latency.time_to_first_token" not in told


def test_without_opentelemetry_it_is_said(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidConfigError, match=r"pip install 'jpaged\[tracing\]'"):
        tracing.exporting_to("http://127.0.0.1:4318/v1/traces")
