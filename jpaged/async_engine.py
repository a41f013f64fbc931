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
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from jpaged.config import EngineConfig
from jpaged.engine import InFlight, LLMEngine
from jpaged.engine_thread import EngineThread
from jpaged.errors import EngineDeadError, QueueFullError
from jpaged.outputs import RequestOutput
from jpaged.runtime.samplers import Samplers, request_variant
from jpaged.sampling_params import RequestOutputKind, SamplingParams
from jpaged.sequence import Readout
from jpaged.snapshots import Snapshot
from jpaged.startup import WARM_VARIANTS
from jpaged.streams import Stream, Streams
from jpaged.tokenization import Prompt, encode_prompt

_MAX_COMPILING = 32
"""Requests that have a grammar compiled, or wait for a process to try it."""


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
        self._streams = Streams()
        self._workers = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="jpaged-tokenizer")
        self._compilers = concurrent.futures.ThreadPoolExecutor(_MAX_COMPILING, thread_name_prefix="jpaged-grammar")
        self._samplers: Samplers | None = None  # who wants no warm-up has steps compile what they need
        if self.engine.config.warmup:
            self._samplers = Samplers(self.engine.runner, self.engine.scheduler.buckets, WARM_VARIANTS)
        self._thread = EngineThread(
            self.engine, self._deliver, self._died, step_timeout=step_timeout, slow_step=slow_step
        )

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
        readout: Readout | None = None,
        keep: bool = False,
    ) -> Stream:
        """Queues a request; returns when it is accepted.

        Args:
          prompt: text, chat or token ids; see `jpaged.tokenization`. It is tokenised on a thread of its own.
          params: how to sample; None: `SamplingParams()`.
          request_id: unique among the unfinished requests; None: made up.
          priority: smaller is served first; needs scheduling_policy="priority".
          readout: what else is read off the prompt.
          keep: it goes on when its reader leaves, until `drop`; others may `attach`.

        Raises:
          InvalidRequestError: it can't be served as asked.
          QueueFullError: too much is waiting; try again later.
          EngineDeadError: the engine has failed.
        """
        params = params or SamplingParams()
        text, tokens, salt = await self.in_worker(encode_prompt, prompt, self.engine.tokenizer)
        await self._prepare_grammar(params)
        await asyncio.wrap_future(self.prepare(params))
        tokenized: Any = {"prompt": text, "prompt_token_ids": tokens, "cache_salt": salt}
        stream = self._stream(request_id or f"req-{uuid.uuid4().hex}", params.output_kind)
        try:
            options = {"priority": priority, "readout": readout}
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
            self._thread.paused = True
            taken = take(engine)
            self._streams.fail_all(error)
            return taken

        return await self.call(stop)

    def prepare(self, params: SamplingParams) -> concurrent.futures.Future[None]:
        """Has what requests like this one need compiled, beside the steps. `submit` does so too, and waits for it."""
        variant, nothing = request_variant(params), concurrent.futures.Future[None]()
        if self._samplers is not None and not self._samplers.covers(variant):
            return self._samplers.prepare(variant)
        nothing.set_result(None)
        return nothing

    async def _prepare_grammar(self, params: SamplingParams) -> None:
        """Has the grammar compiled, if there is one; `add_request` finds it. Tokenising does not wait for it."""
        wanted = params.structured_outputs
        if wanted is not None and wanted not in self.engine.grammars:
            self._thread.check_alive()
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._compilers, self.engine.grammars.matcher, wanted)

    def _stream(self, request_id: str, kind: RequestOutputKind) -> Stream:
        return Stream(request_id, kind, self._streams.lock, self._forget)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests; their readers get what they had, with finish reason `abort`. Unknown ids are ignored."""
        await self.call(lambda engine: engine.abort(request_id))

    def drop(self, request_ids: list[str]) -> None:
        """Aborts requests, and does not wait for it. Nobody needs to read them any more."""
        self._thread.tell(lambda: self.engine.abort(request_ids))

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
        await self.call(lambda engine: setattr(self._thread, "paused", True))

    async def resume(self) -> None:
        """Goes on after `pause`."""
        await self.call(lambda engine: setattr(self._thread, "paused", False))

    async def call[T](self, function: Callable[[LLMEngine], T]) -> T:
        """Runs a function on the engine's thread, between two steps, and returns what it returns."""
        return await asyncio.wrap_future(self._thread.call(function))

    async def in_worker[T](self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs what would keep the event loop (tokenising, templates) on a thread of the pool."""
        self._thread.check_alive()
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)

    def _forget(self, stream: Stream) -> None:
        """A reader has left: a request that nobody reads is aborted."""

        def drop() -> None:
            if self._streams.leave(stream):
                self.engine.abort(stream.request_id)

        self._thread.tell(drop)

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._streams)

    # ------------------------------------------------------------------------------------------------- health

    @property
    def failure(self) -> EngineDeadError | None:
        """Why the engine is dead; None while it lives."""
        return self._thread.failure

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's thread has ended a step (or found nothing to do) within the last `step_timeout`."""
        return self._thread.is_healthy

    async def shutdown(self, drain: float = 0.0) -> None:
        """Waits up to `drain` seconds for running requests, aborts the others and stops the threads."""
        with contextlib.suppress(EngineDeadError):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain):
                    while self._streams and self.failure is None:
                        await asyncio.sleep(0.02)
            await self.abort_all()
            while self._streams and self.failure is None:
                await asyncio.sleep(0.02)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Stops the engine's thread after the step that is running; readers that are left get an EngineDeadError."""
        self._thread.close()
        self._streams.fail_all(EngineDeadError("the engine was shut down."))
        self.engine.end_compiling()
        for pool in (self._workers, self._compilers):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._samplers is not None:
            self._samplers.close()

    # ------------------------------------------------------------------------------------- on the engine's thread

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

    def _died(self, error: EngineDeadError) -> None:
        self.on_death(error)
        self._streams.fail_all(error)
