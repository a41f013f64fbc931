"""jpaged bench serve: against a live server, and its arithmetic on timings and arrivals that are given."""

import json
import math

import numpy as np
import pytest

from jpaged.cli.bench.client import Timing
from jpaged.cli.bench.measures import details, parse_goodput, summarize
from jpaged.cli.bench.workloads import Ask, arrivals_of, of_lengths, random_asks, read_prompts, repeated_prefixes
from jpaged.cli.bench.workloads import TraceRow as Row
from jpaged.errors import InvalidConfigError
from tests.server.support import serving

ALL = ["ttft", "tpot", "itl", "e2el"]


@pytest.fixture(scope="module")
def live(tiny):
    with serving(tiny(enable_prefix_caching=False)) as server:
        yield server


@pytest.fixture
def bench(jpaged, live):
    def run(*arguments: str) -> tuple[int, str, str]:
        return jpaged("bench", "serve", "--base-url", live.url, *arguments, tiny=False)

    return run


SMALL = ("--num-prompts", "6", "--input-len", "20", "--output-len", "5", "--ignore-eos")


def test_all_at_once(bench, live, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = live.metrics()
    status, out, _ = bench(*SMALL, "--json", "--output", "result.json", "--save-result", "--goodput", "e2el:1e9")
    after = live.metrics()
    result = json.loads(out)
    assert status == 0
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"], result["num_skipped"]) == (6, 0, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (120, 30)
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 35, "and one that warms up"
    assert (result["model_id"], result["request_rate"], result["max_concurrent_requests"]) == ("tiny", "inf", 6)
    assert result["request_throughput"] == pytest.approx(6 / result["duration"])
    assert result["request_goodput"] == result["request_throughput"]
    for name in ALL:
        assert 0 < result[f"median_{name}_ms"] <= result[f"p99_{name}_ms"]
        assert {f"mean_{name}_ms", f"std_{name}_ms"} <= set(result)
    assert result["mean_ttft_ms"] < result["mean_e2el_ms"] <= 1000 * result["duration"]
    [saved] = (json.loads(file.read_text()) for file in tmp_path.glob("jpaged-infqps-tiny-*.json"))
    assert saved["output_lens"] == [5] * 6
    assert all(1 <= len(gaps) <= 4 for gaps in saved["itls"]), "one may hold two tokens"


def test_several_rates_and_a_plot(bench, tmp_path):
    """Sent as the process of arrivals says, and never more at once than allowed."""
    file = tmp_path / "plot.svg"
    limits = ("--max-concurrency", "2", "--burstiness", "0.5", "--metric-percentiles", "50,90", "--num-warmups", "0")
    status, out, _ = bench(*SMALL, "--request-rate", "50", "200", *limits, "--plot", str(file), "--json")
    results = json.loads(out)
    assert (status, [result["request_rate"] for result in results]) == (0, [50, 200])
    for result in results:
        asks = [Ask([1], 1)] * 6
        last = arrivals_of(asks, result["request_rate"], 0.5, np.random.default_rng(1))[-1]
        assert result["duration"] >= last - arrivals_of(asks, result["request_rate"], 0.5, np.random.default_rng(1))[0]
        assert result["max_concurrent_requests"] <= 2
        assert result["p50_tpot_ms"] == pytest.approx(result["median_tpot_ms"])
        assert result["request_goodput"] is None
    assert "<svg" in file.read_text()


def test_chats_and_lines_for_a_person(bench):
    status, out, _ = bench("--backend", "openai-chat", "--num-prompts", "3", "--input-len", "4", "--output-len", "6")
    assert status == 0
    assert out.startswith("-- All requests at once\nRequests:                3 completed, 0 failed")
    assert "Time to first token, ms: mean " in out


def test_files(bench, tmp_path):
    trace, custom = tmp_path / "trace.csv", tmp_path / "prompts.jsonl"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n7.0,20,5\n7.1,9000,3\n7.2,10,3\n")
    for name in ("trace", "sharegpt"):
        out = bench("--dataset-name", name, "--dataset-path", str(trace), "--ignore-eos", "--json")[1]
        result = json.loads(out)
        assert (result["completed"], result["num_skipped"], result["total_output_tokens"]) == (2, 1, 8)
        assert (result["duration"] > 0.2) or name == "sharegpt"
    custom.write_text('{"prompt": "Once"}\n{"prompt": [3, 4], "output_tokens": 2}\n')
    out = bench("--dataset-name", "custom", "--dataset-path", str(custom), "--ignore-eos", "--json")[1]
    assert json.loads(out)["total_output_tokens"] == 66
    prefixes = ("--prefix-repetition-prefix-len", "30", "--prefix-repetition-num-prefixes", "2")
    out = bench("--dataset-name", "prefix-repetition", *prefixes, *SMALL, "--json")[1]
    assert json.loads(out)["total_input_tokens"] == 6 * 50


def test_what_can_not_be_measured_is_refused(bench, tmp_path, jpaged):
    for arguments, says in (
        (("--dataset-name", "trace"), "needs --dataset-path"),
        (("--dataset-name", "custom", "--dataset-path", str(tmp_path / "none")), "No such file"),
        (("--goodput", "itl:5"), "--goodput itl:5"),
        (("--goodput", "ttft:soon"), "--goodput ttft:soon"),
        (("--request-rate", "0"), "--request-rate 0"),
        (("--burstiness", "-1"), "--burstiness"),
        (("--percentile-metrics", "ttft,speed"), "--percentile-metrics"),
        (("--metric-percentiles", "101"), "--metric-percentiles"),
        (("--num-prompts", "0"), "--num-prompts"),
        (("--plot", "plot.txt"), "--plot"),
        (("--input-len", "300"), "no request fits"),
    ):
        status, out, err = bench(*arguments)
        assert (status, out) == (2, "")
        assert says in err
    status, _, err = bench("--model", "gpt-4", *SMALL)
    assert (status, "the first request failed" in err, "does not exist" in err) == (1, True, True)
    status, _, err = bench("--model", "gpt-4", "--num-warmups", "0", *SMALL)
    assert (status, "every request failed: 404" in err) == (1, True)
    status, _, err = jpaged("bench", "serve", "--base-url", "http://127.0.0.1:9", tiny=False)
    assert (status, "can't be asked for its models" in err) == (2, True)


def timing(sent: float, *pieces: float, tokens: int | None = None, error: str | None = None) -> Timing:
    ended = (pieces or (sent,))[-1] + 0.5
    return Timing(sent, list(pieces), ended, 10, len(pieces) if tokens is None else tokens, "", error)


def test_the_arithmetic():
    """Three answers, of which one is a single token, and one has two tokens in a piece; and a failure."""
    timings = [timing(1, 2, 3, 5), timing(2, 3), timing(2, 4, 5, tokens=4), timing(3, error="no")]
    result = summarize(timings, percentiles=[50], metrics=ALL, objectives={"ttft": 1500.0, "tpot": 1400.0})
    assert (result["duration"], result["completed"], result["failed"]) == (4.5, 3, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 8)
    assert result["request_throughput"] == pytest.approx(3 / 4.5)
    assert result["output_throughput"] == pytest.approx(8 / 4.5)
    assert result["mean_ttft_ms"] == pytest.approx((1000 + 1000 + 2000) / 3)
    assert result["mean_tpot_ms"] == pytest.approx((1500 + 1000 / 3) / 2), "not of a single token"
    assert (result["median_itl_ms"], result["mean_e2el_ms"]) == (1000, pytest.approx((4500 + 1500 + 3500) / 3))
    assert result["mean_normalized_latency_ms"] == pytest.approx((1500 + 1500 + 875) / 3)
    assert result["request_goodput"] == pytest.approx(1 / 4.5), "the first is too slow between, the last at first"
    assert result["max_concurrent_requests"] == 4
    assert details(timings)["errors"] == ["", "", "", "no"]
    assert parse_goodput(["ttft:200", "e2el:3e3"]) == {"ttft": 200, "e2el": 3000}
    nothing = summarize([*timings[3:], timing(4, error="no")], percentiles=[99], metrics=ALL, objectives={})
    assert (nothing["completed"], nothing["p99_itl_ms"]) == (0, 0)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals(burstiness):
    """Intervals have the mean of the rate, and a variation of 1 / burstiness."""
    arrivals = arrivals_of([Ask([1], 1)] * 20_000, 5.0, burstiness, np.random.default_rng(0))
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_arrivals_of_a_trace_and_of_none():
    random = np.random.default_rng(0)
    trace = of_lengths([Row(5.0, 3, 1), Row(6.0, 4, 2), Row(9.0, 5, 3)], text=False, random=random)
    assert [(len(ask.prompt), ask.output_len, ask.arrival) for ask in trace] == [(3, 1, 0), (4, 2, 1), (5, 3, 4)]
    assert arrivals_of(trace, math.inf, 1.0, random) == [0, 1, 4]
    assert arrivals_of(trace, 4.0, 1.0, random) == [0, 0.125, 0.5], "two intervals at four a second"
    assert arrivals_of([Ask([1], 1)] * 3, math.inf, 1.0, random) == [0, 0, 0]


def test_prompts(tmp_path):
    random = np.random.default_rng(0)
    asks = random_asks(500, 20, 10, 0.5, text=False, random=random)
    assert {len(ask.prompt) for ask in asks} == set(range(10, 31))
    assert {ask.output_len for ask in asks} == set(range(5, 16))
    [text] = random_asks(1, 7, 3, 0.0, text=True, random=random)
    assert len(text.prompt.split()) == 7
    asks = repeated_prefixes(9, 5, 2, 3, 4, text=False, random=random)
    assert len({tuple(ask.prompt[:5]) for ask in asks}) == 3
    assert {len(ask.prompt) for ask in asks} == {7}
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(InvalidConfigError, match="line 2"):
        read_prompts(bad, 10, 5)
