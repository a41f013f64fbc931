"""From the timings of a run to the numbers that `bench serve` reports: vLLM's names, milliseconds."""

import itertools
from typing import Any

import numpy as np

from jpaged.cli.bench.client import Timing
from jpaged.errors import InvalidConfigError

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (without the first)",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}


def parse_goodput(words: list[str]) -> dict[str, float]:
    """Objectives in milliseconds by metric: ["ttft:200", "tpot:50"].

    Raises:
      InvalidConfigError: it is another metric (ITL is of a gap, not of a request), or no number.
    """
    objectives: dict[str, float] = {}
    for word in words:
        name, _, limit = word.partition(":")
        try:
            objectives[name] = float(limit)
        except ValueError:
            objectives[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or not objectives[name] > 0:
            raise InvalidConfigError(f"--goodput {word}: KEY:MS with a key of ttft, tpot, e2el is expected.")
    return objectives


def summarize(
    timings: list[Timing], *, percentiles: list[float], metrics: list[str], objectives: dict[str, float]
) -> dict[str, Any]:
    """The result of one run."""
    good = [t for t in timings if t.error is None]
    duration = max(t.ended for t in timings) - min(t.sent for t in timings)
    inputs, outputs = (sum(getattr(t, name) for t in good) for name in ("input_tokens", "output_tokens"))
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(timings) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / duration,
        "request_goodput": sum(_meets(t, objectives) for t in good) / duration if objectives else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_concurrent_requests": _most_at_once(timings),
        "mean_normalized_latency_ms": _mean([1000 * t.e2el / t.output_tokens for t in good]),
    }
    for name in metrics:
        values = _values(good, name)
        result |= {
            f"mean_{name}_ms": _mean(values),
            f"median_{name}_ms": float(np.median(values)) if values else 0.0,
            f"std_{name}_ms": float(np.std(values)) if values else 0.0,
        }
        for p in percentiles:
            result[f"p{p:g}_{name}_ms"] = float(np.percentile(values, p)) if values else 0.0
    return result


def details(timings: list[Timing]) -> dict[str, Any]:
    """Of each request; seconds, as vLLM has them."""
    return {
        "input_lens": [t.input_tokens for t in timings],
        "output_lens": [t.output_tokens for t in timings],
        "ttfts": [t.ttft if t.pieces else 0.0 for t in timings],
        "itls": [t.itl for t in timings],
        "e2els": [t.e2el for t in timings],
        "errors": [t.error or "" for t in timings],
    }


def lines(result: dict[str, Any], metrics: list[str]) -> list[str]:
    """A result for a person."""
    shown = [
        f"Requests:                {result['completed']} completed, {result['failed']} failed, "
        f"{result['duration']:.2f} s, at most {result['max_concurrent_requests']} at once",
        f"Requests per second:     {result['request_throughput']:.2f}",
        f"Output tokens per second: {result['output_throughput']:.1f}",
        f"Total tokens per second: {result['total_token_throughput']:.1f} "
        f"({result['total_input_tokens']} in, {result['total_output_tokens']} out)",
    ]
    if result["request_goodput"] is not None:
        shown.append(f"Goodput:                 {result['request_goodput']:.2f} requests per second")
    for name in metrics:
        numbers = {key.partition("_")[0]: value for key, value in result.items() if key.endswith(f"_{name}_ms")}
        shown.append(f"{METRICS[name]}, ms: " + ", ".join(f"{key} {value:.1f}" for key, value in numbers.items()))
    return shown


def _values(timings: list[Timing], name: str) -> list[float]:
    """Milliseconds."""
    if name == "itl":
        return [1000 * gap for t in timings for gap in t.itl]
    return [1000 * value for t in timings if (value := getattr(t, name)) is not None]


def _meets(timing: Timing, objectives: dict[str, float]) -> bool:
    """Whether a request meets every objective; one of a single token meets any for the others."""
    return all(1000 * (getattr(timing, name) or 0.0) <= limit for name, limit in objectives.items())


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _most_at_once(timings: list[Timing]) -> int:
    changes = sorted([(t.ended, -1) for t in timings] + [(t.sent, 1) for t in timings])
    return max(itertools.accumulate(change for _, change in changes))
