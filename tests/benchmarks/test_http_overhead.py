"""The comparison of HTTP with the offline engine, run small: both sides give every token, and the figures are there."""

import json
import sys

from benchmarks import http_overhead
from tests.engine.support import GOLDENS

SMALL = ("--num-prompts", "4", "--input-len", "8", "--output-len", "8", "--max-num-seqs", "4", "--max-model-len", "64")


def test_one_round(monkeypatch, capsys):
    model = str(GOLDENS / "models" / "llama")
    monkeypatch.setattr(sys, "argv", ["http_overhead", "--model", model, *SMALL, "--rounds", "1"])
    http_overhead.main()
    warm, measured, result = capsys.readouterr().out.splitlines()
    assert warm.startswith("warm  {")
    figures = json.loads(result.removeprefix("RESULT "))
    assert figures == json.loads(measured.removeprefix("round "))
    assert 0 < figures["http_p50_ttft_ms"] <= figures["http_p99_ttft_ms"]
    assert figures["ratio"] > 0
    assert figures["cpu_ratio"] > 0
