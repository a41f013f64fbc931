"""From the start to the exit status, in a process of its own; and an engine that fails under its requests."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx2 as httpx
import pytest

from tests.engine.support import GOLDENS
from tests.server.support import serving

TINY = str(GOLDENS / "models" / "llama")


@contextlib.contextmanager
def served(*flags):
    """(process, url) of a `jpaged serve` of the tiny model."""
    command = [
        sys.executable,
        "-m",
        "jpaged.cli.main",
        "serve",
        TINY,
        "--port",
        "0",
        "--no-warmup",
        "--max-num-seqs",
        "4",
    ]
    process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not (found := re.search(r"ready on (http:[\w.:/]+)", lines[-1] if lines else "")):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        process.said = "".join(lines)
        yield process, found[1]
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_sigterm_lets_streams_finish():
    """And every line that it writes is JSON, if it was asked for that."""
    with served("--log-format", "json", "--slow-step", "0.001") as (process, url):
        assert "256 tokens, 4 sequences at once" in process.said
        assert "KV cache" in process.said
        body = {
            "prompt": "a",
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = "\n".join(lines)
        assert '"completion_tokens":200' in rest
        assert rest.rstrip().endswith("data: [DONE]")
        assert process.wait() == 0
        lines = [json.loads(line) for line in [*process.said.splitlines(), *process.stderr]]
        assert [line["event"] for line in lines if line.get("event") == "slow_step" and line["compiling"] > 0]
        assert [line["message"] for line in lines if "SIGTERM" in line.get("message", "")]


def test_what_does_not_finish_in_time_is_told_and_a_second_signal_stops():
    with served("--shutdown-timeout", "0", "--enable-admin-endpoints") as (process, url):
        httpx.post(f"{url}/pause")
        answers = []
        ask = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=60))
        )
        ask.start()
        while httpx.get(f"{url}/load").json() != {"server_load": 1}:
            pass
        process.send_signal(signal.SIGTERM)
        ask.join()
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "aborted")
        assert process.wait() == 0
    with served("--enable-admin-endpoints") as (process, url):
        httpx.post(f"{url}/pause")
        with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "a", "stream": True}, timeout=60):
            process.send_signal(signal.SIGTERM)
            while "no new requests" not in process.stderr.readline():
                pass
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 128 + signal.SIGTERM


def test_a_port_in_use_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "jpaged.cli.main", "serve", TINY, "--port", port]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"can't listen on 127.0.0.1:{port}" in done.stderr
    assert "loading" not in done.stderr


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_fault(tiny, monkeypatch, caplog, stream):
    with serving(tiny(), enable_admin_endpoints=True) as live:
        live.post("/pause")
        answers = []
        body = {"prompt": "a", "stream": stream}
        ask = threading.Thread(target=lambda: answers.append(live.post("/v1/completions", **body)))
        ask.start()
        while not live.llm.num_unfinished_requests:
            pass

        def broken(plan):
            raise RuntimeError("/secret/path at 10.0.0.1")

        monkeypatch.setattr(live.llm.engine.runner, "forward", broken)
        health = httpx.Client(base_url=live.url)
        assert health.get("/health").status_code == 200
        caplog.clear()
        live.llm.on_death = lambda error: None  # the process stays, so that it can be looked at
        live.post("/resume")
        ask.join()
        assert answers[0].status_code == (200 if stream else 500)
        assert "engine_dead" in answers[0].text
        assert "secret" not in answers[0].text
        assert health.get("/health").status_code == 503
        [record] = [record for record in caplog.records if record.getMessage() == "engine_dead"]
        assert "/secret/path" in record.fields["reason"]
        assert record.exc_info
        assert live.post("/v1/completions", prompt="a").status_code == 500
        health.close()
