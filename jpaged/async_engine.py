"""AsyncLLM: the engine for asyncio programs. One thread owns the `LLMEngine`; everybody else talks to it by a queue.

event loop(s)                            engine's thread
  submit: text -> tokens (a pool) -- command --> add_request                    step, step, step, ...
  Stream.__anext__ <-- cut to what is new <-- wake <-- outputs of a step, which say all that there is so far
  abort, call ------------------------ command --> between two steps
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from jpaged import logs
from jpaged.config import EngineConfig
from jpaged.engine import InFlight, LLMEngine
from jpaged.errors import EngineDeadError, QueueFullError
from jpaged.outputs import RequestOutput
from jpaged.runtime.samplers import Samplers, request_variant
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.sequence import Pooling
from jpaged.snapshots import Snapshot
from jpaged.startup import WARM_VARIANTS
from jpaged.streams import Stream, Streams
from jpaged.tokenization import Prompt, encode_prompt

log = logging.getLogger("jpaged")

COMPILE_TIMEOUT = 900.0
"""Seconds that a step may take while it compiles a program."""
_BEAT = 1.0
"""Seconds after which the engine's thread shows that it lives when there is nothing to do."""


class AsyncLLM:
    """A model that serves many requests at once to an asyncio program.

        llm = AsyncLLM(model="smollm2-135m")
        async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

    Leaving the loop, or cancelling its task, aborts the request.

    Args:
      config: the engine's arguments; or give them as keywords.
      engine: one that is there already, and from now on belongs to this object's thread.
      max_num_queued_reqs: most requests that wait for a place in the batch; None: no limit.
      max_num_queued_tokens: most prompt tokens of the requests that wait.
      step_timeout: seconds after which a step counts as stuck and the engine as dead. Compiling is not counted.
      slow_step: seconds from which on a step is logged as slow.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        engine: LLMEngine | None = None,
        max_num_queued_reqs: int | None = None,
        max_num_queued_tokens: int | None = None,
        step_timeout: float = 60.0,
        slow_step: float = 5.0,
        **arguments,
    ) -> None:
        self.engine = engine or LLMEngine(config, **arguments)
        self.on_outputs: list[Callable[[list[RequestOutput]], None]] = []
        """Called on the engine's thread with the outputs of each step, before their readers have them."""
        self.on_death: Callable[[EngineDeadError], None] = lambda error: None
        """Called once, on whatever thread, when the engine has died."""
        self.num_rejected = 0
        """Requests that found the queue full."""
        self._max_reqs, self._max_tokens = max_num_queued_reqs, max_num_queued_tokens
        self._step_timeout, self._slow_step = step_timeout, slow_step
        self._compiled = 0.0  # seconds that the engine's thread has spent on it
        self._streams = Streams()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what follows, and of putting commands into the queue
        self._failure: EngineDeadError | None = None
        self._stopping = threading.Event()
        self._paused = False
        self._workers = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="jpaged-tokenizer")
        self._samplers: Samplers | None = None  # who wants no warm-up has steps compile what they need
        if self.engine.config.warmup:
            self._samplers = Samplers(self.engine.runner, self.engine.scheduler.buckets, WARM_VARIANTS)
        self._deadline = time.monotonic() + step_timeout
        self._on_compile = self.engine.runner.on_compile
        self.engine.runner.on_compile = self._while_compiling
        # Daemons: a step that is stuck can't be ended, and must not keep the process.
        self._thread = threading.Thread(target=self._run, name="jpaged-engine", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="jpaged-watchdog", daemon=True).start()

    # ---------------------------------------------------------------------------------------------- requests

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Continues a prompt; yields as `params.output_kind` says. Arguments and errors are those of `submit`."""
        async with await self.submit(prompt, params, request_id, priority=priority) as stream:
            async for output in stream:
                yield output

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        scored_from: int = 0,
        pooling: Pooling | None = None,
        keep: bool = False,
    ) -> Stream:
        """Queues a request; returns when it is accepted.

        Args:
          prompt: text, chat or token ids; see `jpaged.tokenization`. It is tokenised on a thread of its own.
          params: how to sample; None: `SamplingParams()`.
          request_id: unique among the unfinished requests; None: made up.
          priority: smaller is served first; needs scheduling_policy="priority".
          scored_from, pooling: see `LLMEngine.add_request`.
          keep: it goes on when its reader leaves, until `drop`; others may `attach`.

        Raises:
          InvalidRequestError: it can't be served as asked.
          QueueFullError: too much is waiting; try again later.
          EngineDeadError: the engine has failed.
        """
        params = params or SamplingParams()
        text, tokens, salt = await self.in_worker(encode_prompt, prompt, self.engine.tokenizer)
        if params.structured_outputs is not None:  # compiled here, found by `add_request`
            await self.in_worker(self.engine.grammars.matcher, params.structured_outputs)
        await self._prepare(params)
        tokenized: Any = {"prompt": text, "prompt_token_ids": tokens, "cache_salt": salt}
        stream = self._stream(request_id or f"req-{uuid.uuid4().hex}", params.output_kind)
        try:
            options = {"priority": priority, "scored_from": scored_from, "pooling": pooling}
            await self.call(lambda engine: self._add(engine, stream, tokenized, params, keep, **options))
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    async def attach(self, request_id: str, kind: RequestOutputKind) -> Stream | None:
        """One more reader of an unfinished request; None: there is none of this name.

        Args:
          kind: DELTA: the first output begins with the first token.
        """
        stream = self._stream(request_id, kind)
        try:
            return stream if await self.call(lambda engine: self._streams.join(stream)) else None
        except asyncio.CancelledError:
            stream.close()
            raise

    def ended(self, output: RequestOutput, kind: RequestOutputKind) -> Stream:
        """A reader of a request that has finished: it gets this output."""
        stream = self._stream(output.request_id, kind)
        stream.put(output)
        return stream

    async def restore(self, snapshot: Snapshot) -> None:
        """Goes on with a snapshot's requests, as if they had been submitted with `keep`; see `LLMEngine.restore`."""

        def go_on(engine: LLMEngine) -> None:
            engine.restore(snapshot)
            for record in snapshot.requests:
                self._streams.open(record.request_id, kept=True)

        await self.call(go_on)

    async def suspend[T](self, take: Callable[[LLMEngine], T], error: Exception) -> T:
        """Stops computing, takes what `take` wants to keep of the engine, and ends every stream with an error."""

        def stop(engine: LLMEngine) -> T:
            self._paused = True
            taken = take(engine)
            self._streams.fail_all(error)
            return taken

        return await self.call(stop)

    async def _prepare(self, params: SamplingParams) -> None:
        """Has what the request needs compiled, if it is the first of its kind: others go on meanwhile."""
        variant = request_variant(params)
        if self._samplers is not None and not self._samplers.covers(variant):
            await asyncio.wrap_future(self._samplers.prepare(variant))

    def _stream(self, request_id: str, kind: RequestOutputKind) -> Stream:
        return Stream(request_id, kind, self._streams.lock, self._forget)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests; their readers get what they had, with finish reason `abort`. Unknown ids are ignored."""
        await self.call(lambda engine: engine.abort(request_id))

    def drop(self, request_ids: list[str]) -> None:
        """Aborts requests, and does not wait for it. Nobody needs to read them any more."""
        with contextlib.suppress(EngineDeadError):
            self._send(lambda: self.engine.abort(request_ids))

    async def abort_all(self) -> None:
        """Ends every request, as `abort` does."""
        await self.call(lambda engine: engine.abort_all())

    async def update_weights(self, params: Any, *, in_flight: InFlight = "recompute") -> int:
        """Serves other parameters from the next step on. Arguments, result and errors are `LLM.update_weights`'.

        Requests go on meanwhile as `in_flight` says; their readers notice nothing else.
        """
        return await self.call(lambda engine: engine.update_weights(params, in_flight=in_flight))

    async def pause(self) -> None:
        """Stops computing after the step that is running; requests wait, new ones are taken."""
        await self.call(lambda engine: setattr(self, "_paused", True))

    async def resume(self) -> None:
        """Goes on after `pause`."""
        await self.call(lambda engine: setattr(self, "_paused", False))

    async def call[T](self, function: Callable[[LLMEngine], T]) -> T:
        """Runs a function on the engine's thread, between two steps, and returns what it returns."""
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._send(functools.partial(self._execute, function, done))
        return await asyncio.wrap_future(done)

    async def in_worker[T](self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs what would keep the event loop (tokenising, templates) on a thread of the pool."""
        self._check_alive()
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)

    def _forget(self, stream: Stream) -> None:
        """A reader has left: a request that nobody reads is aborted."""

        def drop() -> None:
            if self._streams.leave(stream):
                self.engine.abort(stream.request_id)

        with contextlib.suppress(EngineDeadError):  # then there is nothing to abort
            self._send(drop)

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._streams)

    # ------------------------------------------------------------------------------------------------- health

    @property
    def failure(self) -> EngineDeadError | None:
        """Why the engine is dead; None while it lives."""
        return self._failure

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's thread has ended a step (or found nothing to do) within the last `step_timeout`."""
        return self._failure is None and not self._stopping.is_set() and time.monotonic() < self._deadline

    async def shutdown(self, drain: float = 0.0) -> None:
        """Waits up to `drain` seconds for running requests, aborts the others and stops the threads."""
        with contextlib.suppress(EngineDeadError):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain):
                    while self._streams and self._failure is None:
                        await asyncio.sleep(0.02)
            await self.abort_all()
            while self._streams and self._failure is None:
                await asyncio.sleep(0.02)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Stops the engine's thread after the step that is running; readers that are left get an EngineDeadError."""
        with self._lock:
            self._stopping.set()
        self._commands.put(None)
        self._thread.join(self._step_timeout if self._failure is None else 1.0)
        self.engine.runner.on_compile = self._on_compile
        self._fail_all(EngineDeadError("the engine was shut down."))
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self._samplers is not None:
            self._samplers.close()

    # ------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self.engine.has_unfinished_requests() and not self._paused:
                    self._deliver(self._step())
        except BaseException as error:
            dead = error if isinstance(error, EngineDeadError) else EngineDeadError(f"{type(error).__name__}: {error}")
            self._die(dead)

    def _step(self) -> list[RequestOutput]:
        start, compiled = time.monotonic(), self._compiled
        outputs = self.engine.step()
        seconds = time.monotonic() - start
        if seconds > self._slow_step:
            logs.report(
                log,
                "slow_step",
                level=logging.WARNING,
                seconds=round(seconds, 3),
                compiling=round(self._compiled - compiled, 3),
                running=len(self.engine.scheduler.running),
                waiting=self.engine.scheduler.num_waiting,
            )
        return outputs

    def _take_commands(self) -> bool:
        """Runs what has been asked for; waits if there is nothing to compute. False: the thread shall end."""
        while True:
            self._deadline = time.monotonic() + self._step_timeout
            if self._failure is not None:  # the watchdog gave up, and the step came back after all
                return False
            idle = self._paused or not self.engine.has_unfinished_requests()
            try:
                for _ in range(max(1, self._commands.qsize())):  # no more: a flood must not keep the engine
                    command = self._commands.get(block=idle, timeout=_BEAT if idle else None)
                    if command is None:
                        return False
                    command()
                    self._deliver(self.engine.take_aborted())  # at once: its id may be used again by the next one
                    idle = False
            except queue.Empty:
                pass
            if not self._paused and self.engine.has_unfinished_requests():
                return True

    def _execute(self, function: Callable[[LLMEngine], Any], done: concurrent.futures.Future) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            self._check_alive()
            done.set_result(function(self.engine))
        except Exception as error:
            done.set_exception(error)

    def _add(
        self, engine: LLMEngine, stream: Stream, prompt: Prompt, params: SamplingParams, keep: bool, **options: Any
    ) -> None:
        waiting, most = engine.scheduler.num_waiting, self._max_reqs
        tokens, most_tokens = engine.scheduler.num_waiting_tokens, self._max_tokens
        if most is not None and waiting >= most:
            self.num_rejected += 1
            raise QueueFullError(f"{waiting} requests are waiting already, and the limit is {most}: try again later.")
        new = len(prompt["prompt_token_ids"])  # type: ignore[call-overload, index]
        if most_tokens is not None and waiting and tokens + new > most_tokens:
            self.num_rejected += 1
            raise QueueFullError(
                f"requests with {tokens} prompt tokens are waiting already, and the limit is {most_tokens}: "
                "try again later."
            )
        if keep or params.output_kind is RequestOutputKind.DELTA:
            params = dataclasses.replace(params, output_kind=RequestOutputKind.CUMULATIVE)  # streams cut
        engine.add_request(stream.request_id, prompt, params, **options)
        self._streams.open(stream.request_id, kept=keep)
        self._streams.join(stream)
        if keep:
            stream.begun = engine.snapshot([stream.request_id])

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for listen in self.on_outputs:
            listen(outputs)
        self.engine.abort(self._streams.deliver(outputs))

    # --------------------------------------------------------------------------------------------------- death

    def _send(self, command: Callable[[], None]) -> None:
        with self._lock:
            self._check_alive()
            self._commands.put(command)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(str(self._failure)) from self._failure
        if self._stopping.is_set():
            raise EngineDeadError("the engine was shut down.")

    def _die(self, error: EngineDeadError) -> None:
        with self._lock:
            if self._failure is not None or self._stopping.is_set():
                return
            self._failure = error
        log.error("engine_dead", exc_info=error, extra={"fields": {"reason": str(error)}})
        self.on_death(error)
        self._fail_all(error)

    def _fail_all(self, error: EngineDeadError) -> None:
        """Fails every request and every command that is waiting; none can come after."""
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if command is not None and isinstance(command, functools.partial):
                    command()  # an `_execute`, which finds the engine dead
        self._streams.fail_all(error)

    def _watch(self) -> None:
        while not self._stopping.wait(min(_BEAT, self._step_timeout / 4)):
            if self._failure is None and time.monotonic() > self._deadline:
                self._die(EngineDeadError(f"a step has not ended for {self._step_timeout:g} s: the engine is stuck."))

    @contextlib.contextmanager
    def _while_compiling(self, key: tuple) -> Iterator[None]:
        if threading.current_thread() is not self._thread:  # no step waits for it
            with self._on_compile(key):
                yield
            return
        start = time.monotonic()
        self._deadline = start + COMPILE_TIMEOUT
        try:
            with self._on_compile(key):
                yield
        finally:
            self._compiled += time.monotonic() - start
            self._deadline = time.monotonic() + self._step_timeout
