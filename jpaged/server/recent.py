"""What a server did in the last seconds: rates and waiting times, for whoever looks at it now."""

import bisect
import collections
import dataclasses
import math

WINDOW = 10.0
"""Seconds over which rates are taken."""
TTFT_WINDOW = 60.0
"""Seconds over which times to first token are."""


@dataclasses.dataclass(frozen=True, slots=True)
class Totals:
    """Tokens since the server began."""

    prompt: int = 0
    cached: int = 0
    """Tokens of prompts that were found in the prefix cache."""
    generated: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """Of the last `WINDOW` seconds, in tokens a second; times to first token in seconds, of `TTFT_WINDOW`."""

    prompt: float
    cached: float
    generated: float
    ttft_p50: float | None
    ttft_p99: float | None
    """None: no request has got its first token lately."""


class Recent:
    """Is told of totals as they grow, on one thread, and asked for rates on any. Times are `time.monotonic`'s.

    Args:
      now: when the server began.
    """

    def __init__(self, now: float) -> None:
        # (a whole second, what there was at its end); seconds in which nothing happened have none
        self._samples: collections.deque[tuple[int, Totals]] = collections.deque([(int(now) - 1, Totals())], 32)
        self._began = now
        self._first_tokens: collections.deque[tuple[float, float]] = collections.deque(maxlen=1024)

    def add(self, now: float, totals: Totals) -> None:
        """What there has been up to now."""
        second = int(now)
        if self._samples[-1][0] == second:
            self._samples.pop()
        self._samples.append((second, totals))

    def add_first_token(self, now: float, seconds: float) -> None:
        self._first_tokens.append((now, seconds))

    def rates(self, now: float, totals: Totals) -> Rates:
        samples = list(self._samples)
        start = now - WINDOW
        place = bisect.bisect_left([second + 1 for second, _ in samples], start)
        _, before = samples[min(max(0, place - 1), len(samples) - 1)]
        seconds = max(1.0, min(WINDOW, now - self._began))
        waits = sorted(wait for time, wait in list(self._first_tokens) if now - time <= TTFT_WINDOW)
        return Rates(
            prompt=(totals.prompt - before.prompt) / seconds,
            cached=(totals.cached - before.cached) / seconds,
            generated=(totals.generated - before.generated) / seconds,
            ttft_p50=_percentile(waits, 0.50),
            ttft_p99=_percentile(waits, 0.99),
        )


def _percentile(values: list[float], part: float) -> float | None:
    """The smallest value that `part` of the (sorted) values do not exceed."""
    return values[max(0, math.ceil(part * len(values)) - 1)] if values else None
