"""jpaged bench and collect-env: the fields of their JSON, and that the numbers are those of the work asked for."""

import gzip
import json

import pytest

from jpaged.cli.bench.workloads import read_trace
from jpaged.errors import InvalidConfigError

SMALL = ("--max-num-seqs", "4", "--max-num-batched-tokens", "36")


def test_throughput(jpaged, tmp_path):
    file = tmp_path / "result.json"
    status, out, _ = jpaged(
        "bench",
        "throughput",
        "--num-prompts",
        "6",
        "--input-len",
        "20",
        "--output-len",
        "5",
        "--json",
        "--output",
        str(file),
        *SMALL,
    )
    result = json.loads(out)
    assert status == 0
    assert result == json.loads(file.read_text())
    assert (result["num_requests"], result["total_input_tokens"], result["total_output_tokens"]) == (6, 120, 30)
    assert result["total_num_tokens"] == 150
    assert result["requests_per_second"] == pytest.approx(6 / result["elapsed_time"])
    assert result["tokens_per_second"] == pytest.approx(150 / result["elapsed_time"])
    assert 0 < result["mean_ttft_ms"] < 1000 * result["elapsed_time"]


def test_throughput_of_a_trace(jpaged, tmp_path):
    trace = tmp_path / "trace.csv.gz"
    with gzip.open(trace, "wt") as file:
        file.write("arrival_s,prompt_tokens,output_tokens\n0.0,20,5\n0.5,10,3\n1.0,9000,3\n2.0,10,10\n")
    out = jpaged("bench", "throughput", "--dataset-path", str(trace), "--num-prompts", "3", "--json", *SMALL)[1]
    result = json.loads(out)
    assert (result["num_requests"], result["num_skipped"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n1,2\n",
        "arrival_s,prompt_tokens,output_tokens\n0,x,3\n",
        "arrival_s,prompt_tokens,output_tokens\n0,0,3\n",
        "arrival_s,prompt_tokens,output_tokens\n0\n",
    ],
)
def test_a_trace_that_is_none(text, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InvalidConfigError, match=r"trace\.csv"):
        read_trace(path, 10)


def test_lengths_that_do_not_fit_are_refused(jpaged):
    status, out, err = jpaged("bench", "latency", "--input-len", "250", "--output-len", "10")
    assert (status, out) == (2, "")
    assert "do not fit into max_model_len=256" in err


def test_latency(jpaged):
    arguments = ("bench", "latency", "--batch-size", "2", "--input-len", "20", "--output-len", "4", "--num-iters", "3")
    result = json.loads(jpaged(*arguments, "--json")[1])
    assert len(result["latencies"]) == 3
    assert result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 3)
    assert list(result["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    status, out, _ = jpaged(*arguments)
    assert status == 0
    assert out.startswith("Average latency: ")


def test_startup_is_warm_the_second_time(jpaged):
    out = jpaged("bench", "startup", "--no-warmup", "--num-iters-warm", "1", "--json", *SMALL)[1]
    result = json.loads(out)
    assert result["cold_num_compiled"][0] > 0
    assert result["cold_num_loaded_from_cache"] == [0]
    assert result["warm_num_compiled"] == [0]
    assert result["warm_num_loaded_from_cache"] == result["cold_num_compiled"]
    assert 0 < result["avg_warm_startup_time"] < result["avg_warm_first_token_time"]


def test_a_startup_that_fails_says_why(jpaged):
    status, _, err = jpaged("bench", "startup", "--model", "./no/such/model", tiny=False)
    assert status == 1
    assert err.splitlines()[-1].startswith("jpaged: error: the engine did not start: './no/such/model' does not exist.")


def test_collect_env(jpaged):
    found = json.loads(jpaged("collect-env", "--json", tiny=False)[1])
    assert found["jax"]
    assert found["devices"]
    assert found["cpus"] >= 1
    assert "backend: " in jpaged("collect-env", tiny=False)[1]
