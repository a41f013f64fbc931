"""A client of OpenAI-compatible servers that takes the time: when each piece of a streamed answer came.

It reads answers as plain bytes, so that it can keep up with a server on the same machine.
"""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2 as httpx

from jpaged.cli.bench.workloads import Ask
from jpaged.errors import InvalidConfigError


@dataclasses.dataclass
class Timing:
    """What one request took; seconds on `time.perf_counter`'s clock."""

    sent: float = 0.0
    pieces: list[float] = dataclasses.field(default_factory=list)
    """When each piece of the answer came. A piece is a token, unless the server puts more into one."""
    ended: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.pieces[0] - self.sent

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the gaps between pieces."""
        return [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first one; None of a single token."""
        return (self.pieces[-1] - self.pieces[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def e2el(self) -> float:
        """From sending the request to the end of the answer."""
        return self.ended - self.sent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go, and what they say beside their prompts.

    Attributes:
      fields: of every request's body.
    """

    base_url: str
    endpoint: str
    chat: bool
    fields: dict[str, Any]
    api_key: str | None

    def body_of(self, ask: Ask) -> dict[str, Any]:
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        if self.chat:
            message = {"role": "user", "content": ask.prompt}
            return {"messages": [message], "max_completion_tokens": ask.output_len, **streamed, **self.fields}
        return {"prompt": ask.prompt, "max_tokens": ask.output_len, **streamed, **self.fields}

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        patience = httpx.Timeout(None, connect=60.0)
        async with httpx.AsyncClient(
            base_url=self.base_url, headers=headers, limits=limits, timeout=patience
        ) as client:
            yield client


async def first_model(client: httpx.AsyncClient) -> dict[str, Any]:
    """What the server says of the (first) model that it serves.

    Raises:
      InvalidConfigError: it can't be asked.
    """
    try:
        answer = await client.get("/v1/models")
        return answer.raise_for_status().json()["data"][0]
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        raise InvalidConfigError(f"{client.base_url} can't be asked for its models: {error or type(error)}.") from error


async def run(
    client: httpx.AsyncClient,
    target: Target,
    asks: list[Ask],
    arrivals: list[float],
    *,
    max_concurrency: int | None = None,
    on_done: Callable[[Timing], None] = lambda timing: None,
) -> list[Timing]:
    """Sends each request at its time, or as soon as fewer than `max_concurrency` are under way."""
    places = asyncio.Semaphore(max_concurrency or len(asks))
    start = time.perf_counter()

    async def one(ask: Ask, arrival: float) -> Timing:
        await asyncio.sleep(start + arrival - time.perf_counter())
        async with places:
            timing = await send(client, target, ask)
        on_done(timing)
        return timing

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(ask, arrival)) for ask, arrival in zip(asks, arrivals, strict=True)]
    return [task.result() for task in tasks]


async def send(client: httpx.AsyncClient, target: Target, ask: Ask) -> Timing:
    """One request; whatever goes wrong is the timing's `error`."""
    timing = Timing()
    content = json.dumps(target.body_of(ask)).encode()
    timing.sent = time.perf_counter()
    try:
        headers = {"Content-Type": "application/json"}
        async with client.stream("POST", target.endpoint, content=content, headers=headers) as answer:
            if answer.status_code == 200:
                await _read(answer, target.chat, timing)
            else:
                body = (await answer.aread()).decode(errors="replace")
                timing.error = f"{answer.status_code}: {' '.join(body.split())[:300]}"
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        timing.error = f"{type(error).__name__}: {error}"
    timing.ended = time.perf_counter()
    if timing.error is None and not timing.pieces:
        timing.error = "the answer has no tokens"
    timing.output_tokens = timing.output_tokens or len(timing.pieces)
    return timing


async def _read(answer: httpx.Response, chat: bool, timing: Timing) -> None:
    buffer = b""
    async for received in answer.aiter_raw():
        now = time.perf_counter()
        *events, buffer = (buffer + received).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data:").strip()
            if event.startswith(b"data:") and data != b"[DONE]":
                _take(json.loads(data), chat, timing, now)


def _take(chunk: dict[str, Any], chat: bool, timing: Timing, now: float) -> None:
    if "error" in chunk:
        timing.error = str(chunk["error"])[:300]
    for choice in chunk.get("choices") or ():
        piece = choice.get("delta") or {} if chat else choice
        text = piece.get("content") if chat else piece.get("text")
        # A chat begins with a piece that names the role. A token that ends inside a character has no text yet.
        if not chat or text or piece.get("reasoning_content") or piece.get("tool_calls"):
            timing.pieces.append(now)
        timing.text += text or ""
    if usage := chunk.get("usage"):
        timing.input_tokens = usage.get("prompt_tokens") or 0
        timing.output_tokens = usage.get("completion_tokens") or 0
