"""What a server says of itself, over HTTP: /ui/state where it is offered, else /metrics."""

import contextlib
import dataclasses
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from jpaged.errors import InvalidConfigError, JpagedError
from jpaged.memory_view.delta import apply, empty
from jpaged.memory_view.snapshot import PoolShape, Snapshot

TIMEOUT = 30.0
"""Seconds for an answer: a step that compiles keeps /ui/state waiting."""
MAX_BYTES = 64 << 20


class ServerError(JpagedError):
    """A server does not answer as a jpaged server does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A server at one moment."""

    title: str
    running: int
    waiting: int
    swapped: int
    pool_usage: float
    """Part of the blocks that some block table points to."""
    generated: float | None
    """Tokens a second; None: only known after a second look."""
    prompt: float | None
    ttft: tuple[float, float] | None
    """Seconds to the first token of lately finished prompts: median and 99th percentile."""
    mean_ttft: float | None
    """The same, mean of all since the server began, where that is all there is."""
    cached_tokens: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    ended: dict[str, int]
    """Requests by finish reason."""
    rejected: int
    uptime: int | None = None
    """Seconds."""
    now: int = 0
    """Milliseconds, on the clock of the snapshot's requests."""
    snapshot: Snapshot | None = None
    """None: the server does not offer it."""
    problem: str = ""
    """Why this picture is an old one."""


class Reader:
    """Looks at one server, again and again.

    Args:
      url: http:// or https://, with the path of a proxy if there is one.
      key: one of its API keys, or "".

    Raises:
      InvalidConfigError: the URL is none.
    """

    def __init__(self, url: str, key: str = "") -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InvalidConfigError(f"{url!r} is not the URL of a server: give one like http://127.0.0.1:8000.")
        self._url, self._key = url.rstrip("/"), key
        self._cursor, self._snapshot = "", None  # type: str, Snapshot | None
        self._offers_state = True
        self._before: tuple[float, dict[str, float]] | None = None

    def read(self) -> Picture:
        """What there is now.

        Raises:
          ServerError: no answer, or not such a one.
        """
        if self._offers_state:
            try:
                answer = self._get("/ui/state?cursor=" + self._cursor)
            except urllib.error.HTTPError as error:
                if error.code != 404:
                    raise ServerError(_explain(error)) from error
                self._offers_state = False
            else:
                return self._of_state(answer)
        try:
            return self._of_metrics(self._get("/metrics"))
        except urllib.error.HTTPError as error:
            raise ServerError(_explain(error)) from error

    def _get(self, path: str) -> bytes:
        request = urllib.request.Request(self._url + path)  # noqa: S310  # http or https: `__init__` has looked
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
                return answer.read(MAX_BYTES)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self._url} does not answer: {getattr(error, 'reason', error)}.") from error

    def _of_state(self, text: bytes) -> Picture:
        try:
            answer = json.loads(text)
            shape = PoolShape(**answer["pool"])
            snapshot = empty(shape) if answer["reset"] or self._snapshot is None else self._snapshot
            for frame in answer["frames"]:
                snapshot = apply(snapshot, frame)
            self._cursor, self._snapshot = answer["cursor"], snapshot
            rates, totals, measures = answer["rates"], answer["totals"], answer["measures"]
            waits = (rates["ttft_p50"], rates["ttft_p99"])
            return Picture(
                title=answer["title"],
                running=measures["running"],
                waiting=measures["waiting"],
                swapped=measures["swapped"],
                pool_usage=measures["used"] / max(1, shape.num_blocks - 1),
                generated=rates["generated"],
                prompt=rates["prompt"],
                ttft=None if None in waits else waits,
                mean_ttft=None,
                cached_tokens=totals["cached"],
                prompt_tokens=totals["prompt"],
                generated_tokens=totals["generated"],
                preemptions=snapshot.counters.preemptions,
                ended=answer["ended"],
                rejected=answer["rejected"],
                uptime=answer["uptime"],
                now=answer["now"],
                snapshot=snapshot,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self._url}/ui/state is not what a jpaged server of this version says.") from error

    def _of_metrics(self, text: bytes) -> Picture:
        values, ended, title = _parse(text)
        if "num_requests_running" not in values:
            raise ServerError(f"{self._url}/metrics is not that of a jpaged server.")
        now, before = time.monotonic(), self._before
        self._before = (now, values)

        def rate(name: str) -> float | None:
            return None if before is None else (values[name] - before[1][name]) / max(1e-3, now - before[0])

        count = values["time_to_first_token_seconds_count"]
        return Picture(
            title=title,
            running=int(values["num_requests_running"]),
            waiting=int(values["num_requests_waiting"]),
            swapped=int(values["num_requests_swapped"]),
            pool_usage=values["kv_cache_usage_perc"],
            generated=rate("generation_tokens_total"),
            prompt=rate("prompt_tokens_total"),
            ttft=None,
            mean_ttft=values["time_to_first_token_seconds_sum"] / count if count else None,
            cached_tokens=int(values["prefix_cache_hits_total"]),
            prompt_tokens=int(values["prompt_tokens_total"]),
            generated_tokens=int(values["generation_tokens_total"]),
            preemptions=int(values["num_preemptions_total"]),
            ended=ended,
            rejected=int(values["admission_rejections_total"]),
        )


def _parse(text: bytes) -> tuple[dict[str, float], dict[str, int], str]:
    """(samples by name without prefix, requests by finish reason, the model's name)"""
    from prometheus_client.parser import text_string_to_metric_families  # here: other commands do not wait for it

    values: dict[str, float] = {}
    ended: dict[str, int] = {}
    title = ""
    try:
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                name = sample.name.removeprefix("jpaged:")
                title = sample.labels.get("model_name", title)
                if name == "request_success_total":
                    ended[sample.labels["finished_reason"]] = int(sample.value)
                elif "le" not in sample.labels:
                    values[name] = sample.value
    except (ValueError, KeyError):
        pass  # not Prometheus' format: whoever looks for a name will miss it
    return values, ended, title


def _explain(error: urllib.error.HTTPError) -> str:
    """What an error answer says, in one line."""
    said: Any = None
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
        said = json.loads(error.read(1 << 16))["error"]["message"]
    hint = " Set JPAGED_API_KEY." if error.code == 401 else ""
    return f"{error.url} answers {error.code}: {said or error.reason}{hint}"
