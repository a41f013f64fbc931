"""Metrics agree with what a client counts."""

import concurrent.futures
import dataclasses
import json
import re
import threading
import time
from collections import Counter

import pytest

from jpaged.server.metrics import one_two_five
from tests.server.support import raw_post, serving

COUNTED = {
    *("prompt_tokens", "prefix_cache_queries", "prefix_cache_hits", "generation_tokens", "admission_rejections"),
    *("num_preemptions", "request_success", "time_to_first_token_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_queue_time_seconds", "inter_token_latency_seconds"),
    *("e2e_request_latency_seconds", "request_prompt_tokens", "request_generation_tokens", "request_params_n"),
    *("iteration_tokens", "num_requests_running", "num_requests_waiting", "num_requests_swapped"),
    *("kv_cache_usage_perc", "cpu_cache_usage_perc"),
}
"""What the test below looks at."""


@dataclasses.dataclass
class Tally:
    """What a client counts. Everything but the rejected ones is about requests that were accepted."""

    prompt: int = 0
    """Tokens of prompts that got a token; `cached` of them from the prefix cache."""
    cached: int = 0
    generated: int = 0
    gaps: int = 0
    """Between the tokens of a request; its samples get theirs together."""
    started: int = 0
    """Requests that got a token."""
    reasons: Counter = dataclasses.field(default_factory=Counter)
    samples: int = 0
    rejected: int = 0
    refused: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0

    def take(self, usage: dict, longest: int, reason: str, n: int = 1) -> None:
        self.prompt += usage["prompt_tokens"]
        self.cached += usage["prompt_tokens_details"]["cached_tokens"]
        self.generated += usage["completion_tokens"]
        self.gaps += max(0, longest - 1)
        self.started += 1
        self.reasons[reason] += 1
        self.samples += n


class Client:
    """Asks in several ways at once, and counts."""

    def __init__(self, live) -> None:
        self.live, self.tally, self.lock = live, Tally(), threading.Lock()

    def ask(self, i: int) -> None:
        kinds = (self.whole, self.stream, self.samples, self.beams, self.aborted, self.wrong)
        kinds[i % len(kinds)](i)

    def whole(self, i: int) -> None:
        body = {"prompt": "the same words " * (1 + i % 3), "max_tokens": 2 + i % 40, "temperature": 1.0, "seed": i}
        stop = {"stop_token_ids": list(range(64, 128))} if i % 4 else {"ignore_eos": True}
        self.count(self.post(**body, **stop, return_token_ids=True))

    def samples(self, i: int) -> None:
        body = {"prompt": "samples " * 4, "n": 2 + i % 2, "max_tokens": 30, "temperature": 1.0, "seed": i}
        self.count(self.post(**body, ignore_eos=True, return_token_ids=True), n=body["n"])

    def beams(self, i: int) -> None:
        self.count(self.post(prompt="beams", n=2, use_beam_search=True, max_tokens=4 + i % 9), n=2)

    def wrong(self, i: int) -> None:
        answer = self.live.post("/v1/completions", prompt="a", temperature=-1)
        assert answer.status_code == 400
        with self.lock:
            self.tally.refused += 1

    def post(self, **body):
        start = time.monotonic()
        answer = self.live.post("/v1/completions", **body)
        return answer, time.monotonic() - start

    def count(self, answered, n: int = 1) -> None:
        answer, seconds = answered
        with self.lock:
            if answer.status_code == 503:
                assert answer.json()["error"]["code"] == "queue_full"
                self.tally.rejected += 1
                return
            assert answer.status_code == 200, answer.text
            told = answer.json()
            longest = max(len(choice.get("token_ids", "1")) for choice in told["choices"])  # of beams, all come at once
            self.tally.seconds += seconds
            self.tally.first_token_seconds += seconds
            self.tally.take(told["usage"], longest, told["choices"][0]["finish_reason"], n)

    def stream(self, i: int, abort: bool = False) -> None:
        body = {"prompt": f"stream {i % 3}", "max_tokens": 120 if abort else 3 + i % 30, "ignore_eos": True, "seed": i}
        body |= {"request_id": f"stream {i}", "stream": True, "stream_options": {"include_usage": True}}
        start, first, reason = time.monotonic(), None, None
        with self.live.http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 503:
                with self.lock:
                    self.tally.rejected += 1
                return
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                first = first or time.monotonic() - start
                chunk = json.loads(line.removeprefix("data: "))
                for choice in chunk["choices"]:
                    reason = choice["finish_reason"] or reason
                if abort:
                    abort = False
                    self.live.post("/abort_requests", request_ids=[f"cmpl-stream {i}"])
        with self.lock:
            self.tally.seconds += time.monotonic() - start
            self.tally.first_token_seconds += first
            self.tally.take(chunk["usage"], chunk["usage"]["completion_tokens"], reason)

    def aborted(self, i: int) -> None:
        self.stream(i, abort=True)

    def leave_while_paused(self) -> None:
        """Fills the queue, is rejected, goes away from one request that has not begun; the others go on."""
        self.live.post("/pause")
        threads = [threading.Thread(target=self.whole, args=(i,)) for i in (1, 2)]
        for thread in threads:
            thread.start()
        self.gone_since = time.monotonic()
        gone = raw_post(self.live, "/v1/completions", prompt="gone", max_tokens=5)
        while self.live.llm.num_unfinished_requests < 3:
            pass
        self.whole(3)
        gone.close()
        while self.live.llm.num_unfinished_requests > 2:
            pass
        self.tally.reasons["abort"] += 1
        self.tally.samples += 1
        self.live.post("/resume")
        for thread in threads:
            thread.join()


def test_metrics_agree_with_the_client(tiny):
    """Streams, samples, beams, aborts, errors and rejections at once, in a pool that is too small for them."""
    engine = tiny(num_blocks=40, swap_blocks=200)
    with serving(engine, enable_admin_endpoints=True, max_num_queued_reqs=3) as live:
        client = Client(live)
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            for done in [pool.submit(client.ask, i) for i in range(60)]:
                done.result()
        client.leave_while_paused()
        live.idle()
        metrics, tally = live.metrics(), client.tally
        tally.seconds += time.monotonic() - client.gone_since
    assert {re.sub(r"(_total|_count|_sum|_bucket|_created)*({.*)?$", "", name) for name in metrics} == {
        *COUNTED,
        "cache_config_info",
    }
    assert tally.rejected > 0
    assert tally.refused == 10
    assert {reason for reason, count in tally.reasons.items() if count} == {"stop", "length", "abort"}
    ended = sum(tally.reasons.values())

    assert metrics["prompt_tokens_total"] == metrics["prefix_cache_queries_total"] == tally.prompt
    assert metrics["prefix_cache_hits_total"] == tally.cached > 0
    assert metrics["generation_tokens_total"] == tally.generated
    assert metrics["admission_rejections_total"] == tally.rejected
    assert metrics["num_preemptions_total"] == engine.scheduler.num_preemptions > 0
    for reason in ("stop", "length", "abort", "error"):
        assert metrics[f'request_success_total{{finished_reason="{reason}"}}'] == tally.reasons[reason]

    for name in ("time_to_first_token_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"):
        assert metrics[f"{name}_count"] == tally.started
    assert metrics["request_queue_time_seconds_count"] == tally.started
    assert metrics["inter_token_latency_seconds_count"] == tally.gaps
    for name in (
        "e2e_request_latency_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_params_n",
    ):
        assert metrics[f"{name}_count"] == ended
    assert metrics["request_generation_tokens_sum"] == tally.generated
    assert metrics["request_params_n_sum"] == tally.samples
    assert metrics["iteration_tokens_total_count"] == engine.times.steps
    assert 0 < metrics["time_to_first_token_seconds_sum"] <= tally.first_token_seconds
    assert 0 < metrics["e2e_request_latency_seconds_sum"] <= tally.seconds
    for gauge in ("running", "waiting", "swapped"):
        assert metrics[f"num_requests_{gauge}"] == 0
    assert metrics["kv_cache_usage_perc"] == metrics["cpu_cache_usage_perc"] == 0


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


def test_what_reads_prompts_alone_generates_nothing(tiny):
    """Embeddings, scores and echoes need one token to be drawn, which is nobody's."""
    with serving(tiny(enable_prefix_caching=False)) as live:
        usages = [
            live.post("/v1/embeddings", input=["a", "b c"]).json()["usage"],
            live.post("/v1/score", prompts="a", completions=[" b", " c"]).json()["usage"],
            live.post("/v1/completions", prompt="a b", max_tokens=0, echo=True, logprobs=1).json()["usage"],
        ]
        live.idle()
        metrics = live.metrics()
    assert [usage["completion_tokens"] for usage in usages] == [0, 0, 0]
    assert metrics["prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert metrics["generation_tokens_total"] == metrics["request_generation_tokens_sum"] == 0
    assert metrics["request_generation_tokens_count"] == 5
