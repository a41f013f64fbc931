"""EngineThread: the one thread that touches an engine. It makes steps, and runs between them what others ask for."""

import concurrent.futures
import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jpaged import logs
from jpaged.engine import LLMEngine
from jpaged.errors import EngineDeadError
from jpaged.outputs import RequestOutput

log = logging.getLogger("jpaged")

COMPILE_TIMEOUT = 900.0
"""Seconds that a step may take while it compiles a program."""
_BEAT = 1.0
"""Seconds after which the thread shows that it lives when there is nothing to do."""


class EngineThread:
    """Starts with its first breath; a watchdog looks after it.

    Args:
      engine: belongs to the thread from now on.
      deliver: called on it with the outputs of each step.
      on_death: called once, on whatever thread, when a step has failed or is stuck.
      step_timeout: seconds after which a step counts as stuck and the engine as dead. Compiling is not counted.
      slow_step: seconds from which on a step is logged.

    Attributes:
      paused: nothing is computed; set on the thread itself.
      failure: why the engine is dead; None while it lives.
    """

    def __init__(
        self,
        engine: LLMEngine,
        deliver: Callable[[list[RequestOutput]], None],
        on_death: Callable[[EngineDeadError], None],
        *,
        step_timeout: float,
        slow_step: float,
    ) -> None:
        self.engine = engine
        self.paused = False
        self.failure: EngineDeadError | None = None
        self._deliver, self._on_death = deliver, on_death
        self._step_timeout, self._slow_step = step_timeout, slow_step
        self._compiled = 0.0  # seconds that the thread has spent on it
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of `failure`, `_stopping`, and of putting commands into the queue
        self._stopping = threading.Event()
        self._deadline = time.monotonic() + step_timeout
        self._on_compile = engine.runner.on_compile
        engine.runner.on_compile = self._while_compiling
        # Daemons: a step that is stuck can't be ended, and must not keep the process.
        self._thread = threading.Thread(target=self._run, name="jpaged-engine", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="jpaged-watchdog", daemon=True).start()

    # ------------------------------------------------------------------------------------------ for other threads

    def call[T](self, function: Callable[[LLMEngine], T]) -> "concurrent.futures.Future[T]":
        """Runs a function between two steps; what it returns or raises is the future's.

        Raises:
          EngineDeadError: the engine has failed, or was shut down.
        """
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._send(functools.partial(self._execute, function, done))
        return done

    def tell(self, command: Callable[[], None]) -> None:
        """Runs something between two steps. If the engine is dead, there is nothing to be done any more."""
        with contextlib.suppress(EngineDeadError):
            self._send(command)

    def check_alive(self) -> None:
        """Raises EngineDeadError if the engine has failed, or was shut down."""
        if self.failure is not None:
            raise EngineDeadError(str(self.failure)) from self.failure
        if self._stopping.is_set():
            raise EngineDeadError("the engine was shut down.")

    @property
    def is_healthy(self) -> bool:
        """Whether it has ended a step (or found nothing to do) within the last `step_timeout`."""
        return self.failure is None and not self._stopping.is_set() and time.monotonic() < self._deadline

    def close(self) -> None:
        """Ends after the step that is running; what was asked for and not done gets an EngineDeadError."""
        with self._lock:
            self._stopping.set()
        self._commands.put(None)
        self._thread.join(self._step_timeout if self.failure is None else 1.0)
        self.engine.runner.on_compile = self._on_compile
        self._refuse_commands()

    def _send(self, command: Callable[[], None]) -> None:
        with self._lock:
            self.check_alive()
            self._commands.put(command)

    # ---------------------------------------------------------------------------------------- the thread itself

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self.engine.has_unfinished_requests() and not self.paused:
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
            if self.failure is not None:  # the watchdog gave up, and the step came back after all
                return False
            idle = self.paused or not self.engine.has_unfinished_requests()
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
            if not self.paused and self.engine.has_unfinished_requests():
                return True

    def _execute(self, function: Callable[[LLMEngine], Any], done: concurrent.futures.Future) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            self.check_alive()
            done.set_result(function(self.engine))
        except Exception as error:
            done.set_exception(error)

    # --------------------------------------------------------------------------------------------------- death

    def _die(self, error: EngineDeadError) -> None:
        with self._lock:
            if self.failure is not None or self._stopping.is_set():
                return
            self.failure = error
        log.error("engine_dead", exc_info=error, extra={"fields": {"reason": str(error)}})
        self._on_death(error)
        self._refuse_commands()

    def _refuse_commands(self) -> None:
        """Fails every command that is waiting; none can come after."""
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if command is not None and isinstance(command, functools.partial):
                    command()  # an `_execute`, which finds the engine dead

    def _watch(self) -> None:
        while not self._stopping.wait(min(_BEAT, self._step_timeout / 4)):
            if self.failure is None and time.monotonic() > self._deadline:
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
