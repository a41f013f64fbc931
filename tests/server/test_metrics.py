"""Metrics agree with what a client counts."""

import pytest

from jpaged.server.metrics import one_two_five
from tests.server.support import serving


def test_metrics_agree_with_the_client(tiny):
    with serving(tiny()) as live:
        prompt = completion = cached = ends = gaps = 0
        reasons = {"stop": 0, "length": 0}
        for i in range(12):
            body = {"ignore_eos": i % 2 == 0, "stop_token_ids": [] if i % 2 == 0 else list(range(64, 128))}
            got = live.openai.completions.create(
                model="tiny", prompt="the same words " * (1 + i % 3), n=1 + i % 2, max_tokens=2 + i, temperature=1.0,
                seed=i, extra_body=body,
            )  # fmt: skip
            prompt, completion = prompt + got.usage.prompt_tokens, completion + got.usage.completion_tokens
            cached, ends = cached + got.usage.prompt_tokens_details.cached_tokens, ends + 1
            reasons[got.choices[0].finish_reason] += 1
            if i % 2 == 0:
                gaps += got.usage.completion_tokens - 1
        chunks = list(
            live.openai.completions.create(model="tiny", prompt="z", max_tokens=9, temperature=0, stream=True)
        )
        live.idle()
        metrics = live.metrics()
        assert len(chunks) >= 1
        prompt += 1 + (len(live.post("/tokenize", prompt="z").json()["tokens"]) - 1)
        assert metrics["prompt_tokens_total"] == prompt
        assert metrics["prefix_cache_hits_total"] == cached > 0
        assert metrics["prefix_cache_queries_total"] == prompt
        generated = metrics["generation_tokens_total"]
        assert completion < generated <= completion + 9
        assert metrics["request_generation_tokens_sum"] == generated
        assert metrics["request_prompt_tokens_sum"] == prompt
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
            assert metrics[f"{name}_count"] == ends + 1
        ended = sum(value for name, value in metrics.items() if name.startswith("request_success_total"))
        assert ended == ends + 1
        assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == metrics["kv_cache_usage_perc"] == 0


def test_rejections_are_counted_and_say_when_to_come_back(tiny):
    with serving(tiny(), max_num_queued_reqs=1, enable_admin_endpoints=True) as live:
        live.post("/pause")
        with live.http.stream(
            "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": True}
        ) as first:
            answer = live.post("/v1/completions", prompt="b")
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "queue_full"
            assert live.metrics()["admission_rejections_total"] == 1
            live.post("/resume")
            assert "[DONE]" in first.read().decode()


@pytest.mark.parametrize(
    ("most", "buckets"), [(1, (1,)), (20, (1, 2, 5, 10, 20)), (256, (1, 2, 5, 10, 20, 50, 100, 200))]
)
def test_buckets(most, buckets):
    assert one_two_five(most) == buckets
