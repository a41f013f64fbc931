"""Streams: the readers of an engine's requests, each at its own pace.

The engine's outputs say all that a request has so far. A stream keeps the newest one that its reader has not taken,
and cuts it to what is new for this reader. So a slow reader costs neither memory nor the engine's time, a request may
have several readers, or none for a while, and one that comes late misses nothing.
"""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Self

from jpaged.outputs import RequestOutput, changed
from jpaged.sampling_params import RequestOutputKind
from jpaged.snapshots import Snapshot


class Stream:
    """One request's outputs, for one reader: iterate over it. Made by `AsyncLLM.submit` and `attach`.

    With output_kind DELTA an output holds what is new since the last one that was taken; with CUMULATIVE a reader that
    is slower than the engine misses outputs in between.

    Attributes:
      request_id: the request's name.
      begun: of a request that is kept: how it began, for `LLMEngine.restore`.
    """

    def __init__(
        self, request_id: str, kind: RequestOutputKind, lock: threading.Lock, on_close: Callable[["Stream"], None]
    ) -> None:
        self.request_id = request_id
        self.begun: Snapshot | None = None
        self._kind = kind
        self._lock, self._on_close = lock, on_close
        self.loop = asyncio.get_running_loop()
        self.ready = asyncio.Event()
        self._pending: RequestOutput | None = None
        self._taken: dict[int, tuple[int, int]] = {}  # of each completion: tokens and characters that the reader has
        self._error: Exception | None = None
        self._done = False

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output; the last one is `finished`.

        Raises:
          EngineDeadError: the engine failed under the request.
        """
        while not self._done:
            self.ready.clear()
            with self._lock:
                output, self._pending = self._pending, None
                error = self._error
            if output is not None:
                self._done = output.finished
                return self._cut(output) if self._kind is RequestOutputKind.DELTA else output
            if error is not None:
                self._done = True
                raise error
            await self.ready.wait()
        raise StopAsyncIteration

    def _cut(self, output: RequestOutput) -> RequestOutput:
        """What is new in it; from now on the reader has it."""
        new = []
        for completion in output.outputs:
            new.append(completion.after(*self._taken.get(completion.index, (0, 0))))
            self._taken[completion.index] = len(completion.token_ids), len(completion.text)
        return changed(output, outputs=new)

    def close(self) -> None:
        """The reader leaves: nothing more comes. May be called twice."""
        if not self._done:
            self._done = True
            self._on_close(self)
            self.ready.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    # The engine's side; the lock is held.

    def put(self, output: RequestOutput) -> bool:
        """Offers an output; returns whether the reader must be woken (else it has something to take already)."""
        if self._kind is RequestOutputKind.FINAL_ONLY and not output.finished:
            return False
        waiting = self._pending is None
        self._pending = output
        return waiting

    def fail(self, error: Exception) -> None:
        self._error = error


@dataclasses.dataclass(eq=False, slots=True)
class _Request:
    """An unfinished request."""

    kept: bool
    """It goes on without readers."""
    readers: list[Stream] = dataclasses.field(default_factory=list)


class Streams:
    """The unfinished requests and who reads them. Changed by the engine's thread alone.

    Attributes:
      lock: held where a stream's outputs change hands.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._requests: dict[str, _Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def open(self, request_id: str, *, kept: bool) -> None:
        """A request begins.

        Args:
          kept: it goes on when its last reader has left.
        """
        self._requests[request_id] = _Request(kept)

    def join(self, stream: Stream) -> bool:
        """One more reader of a request. Returns whether it is unfinished; else nothing will come."""
        request = self._requests.get(stream.request_id)
        if request is not None:
            request.readers.append(stream)
        return request is not None

    def leave(self, stream: Stream) -> bool:
        """A reader has left. Returns whether its request has lost its last one, and is forgotten."""
        request = self._requests.get(stream.request_id)
        if request is None or stream not in request.readers:
            return False
        request.readers.remove(stream)
        if request.readers or request.kept:
            return False
        del self._requests[stream.request_id]
        return True

    def deliver(self, outputs: Iterable[RequestOutput]) -> list[str]:
        """Hands outputs to their readers. Returns the requests whose readers are lost with their event loop."""
        woken = []
        with self.lock:
            for output in outputs:
                request = self._requests.get(output.request_id)
                if request is not None:
                    woken += [stream for stream in request.readers if stream.put(output)]
        for output in outputs:
            if output.finished:
                self._requests.pop(output.request_id, None)
        return [stream.request_id for stream in _wake(woken) if self.leave(stream)]

    def fail_all(self, error: Exception) -> None:
        """Ends every stream with an error."""
        with self.lock:
            streams = [stream for request in self._requests.values() for stream in request.readers]
            for stream in streams:
                stream.fail(error)
        self._requests.clear()
        _wake(streams)


def _wake(streams: list[Stream]) -> list[Stream]:
    """Wakes the readers of streams, in one call for each event loop; returns those whose loop is closed."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
    for stream in streams:
        by_loop.setdefault(stream.loop, []).append(stream)
    lost: list[Stream] = []
    for loop, mine in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_ready, mine)
        except RuntimeError:
            lost += mine
    return lost


def _set_ready(streams: list[Stream]) -> None:
    for stream in streams:
        stream.ready.set()
