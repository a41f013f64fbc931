"""Clients of a streaming server, over bare sockets: good ones, slow ones, and those that go away or fall silent."""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

SMALL_BUFFER = 4096
"""Bytes that a slow reader has room for."""


class Crowd:
    """Keeps a number of streams open until the time is over.

    Args:
      url: of the server.
      asked, want: completion bodies, and each one's texts.
      seed: of everything that is random.
    """

    def __init__(self, url: str, asked: list[dict[str, Any]], want: list[list[str]], seed: int = 0) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._asked, self._want = asked, want
        self._dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.first_tokens: list[float] = []
        self.gaps: list[float] = []
        """Seconds between a good reader's chunks."""

    async def run(self, streams: int, seconds: float) -> None:
        """Ends when the time is over and the streams that run then have ended."""
        deadline = time.monotonic() + seconds

        async def one(delay: float) -> None:
            await asyncio.sleep(delay)
            while time.monotonic() < deadline:
                await self._once()

        # They do not all arrive in the same moment.
        await asyncio.gather(*(one(self._dice.uniform(0, min(5.0, seconds / 4))) for _ in range(streams)))

    async def _once(self) -> None:
        which = self._dice.randrange(len(self._asked))
        kind = self._dice.choices(
            (self._good, self._slow, self._cancelling, self._silent, self._unfinished), (65, 12, 15, 5, 3)
        )[0]
        try:
            await kind(which)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            self.counts["failed"] += 1
            self.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    async def _good(self, which: int) -> None:
        await self._read_all(which, pause=0.0)
        self.counts["good"] += 1

    async def _slow(self, which: int) -> None:
        await self._read_all(which, pause=self._dice.uniform(0.05, 0.5))
        self.counts["slow"] += 1

    async def _cancelling(self, which: int) -> None:
        """Goes away in the middle."""
        reader, writer = await self._send(which)
        with contextlib.closing(writer):
            left = self._dice.randrange(12)
            async for _ in _events(reader):
                if left == 0:
                    break
                left -= 1
        self.counts["cancelled"] += 1

    async def _silent(self, which: int) -> None:
        """Takes nothing of its answer, for long, and is gone without a word."""
        _, writer = await self._send(which)
        await asyncio.sleep(self._dice.uniform(1, 20))
        writer.transport.abort()
        self.counts["silent"] += 1

    async def _unfinished(self, which: int) -> None:
        """Never says all of its request."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        message = _message(self._asked[which])
        writer.write(message[: self._dice.randrange(1, len(message))])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._dice.uniform(1, 20)):
                await reader.read()
        writer.transport.abort()
        self.counts["unfinished"] += 1

    async def _read_all(self, which: int, pause: float) -> None:
        body, begun = self._asked[which], time.monotonic()
        texts = [""] * body.get("n", 1)
        reader, writer = await self._send(which, SMALL_BUFFER if pause else 1 << 16)
        last = None
        with contextlib.closing(writer):
            async for event in _events(reader):
                now = time.monotonic()
                if last is None:
                    self.first_tokens.append(now - begun)
                elif not pause:
                    self.gaps.append(now - last)
                last = now
                for choice in event["choices"]:
                    texts[choice["index"]] += choice["text"]
                if pause:
                    await asyncio.sleep(pause)
        if texts != self._want[which]:
            self.wrong.append(f"{body}: {texts} instead of {self._want[which]}")

    async def _send(self, which: int, limit: int = 1 << 16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=limit)
        writer.write(_message(self._asked[which]))
        await writer.drain()
        return reader, writer


def _message(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: soak\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


async def _events(reader: asyncio.StreamReader):
    """The events of an answer, which must come to its end.

    Raises:
      ValueError: it is not a stream, or says that something went wrong.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    if " 200 " not in head.partition("\r\n")[0]:
        raise ValueError(f"{head.partition('\r\n')[0]}: {(await reader.read(2000))!r}")
    rest = b""
    while size := int(await reader.readline(), 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            data = event.removeprefix(b"data: ")
            if data == b"[DONE]":
                return
            parsed = json.loads(data)
            if "error" in parsed:
                raise ValueError(str(parsed["error"]))
            yield parsed
    raise ValueError("the stream ended without [DONE]")
