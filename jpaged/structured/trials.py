"""Trials: every grammar of a stranger is compiled in another process first, which is killed if it takes too long.

llguidance bounds most of the work that a hostile schema or expression can make, and not all: intersections of patterns
can take minutes and gigabytes before any limit is reached, and a thread that is in them can't be ended. What came
through its trial is compiled again by whoever asked; that takes as long as the trial did.
"""

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from jpaged.errors import QueueFullError
from jpaged.structured import compiling

_Process = subprocess.Popen[str]

SECONDS = 10.0
"""A grammar that takes longer is refused; one that finds no process free for so long may come again later."""
MAX_PROCESSES = 4
"""Trials at once. A process begins when it is first needed, and stays."""


class Trials:
    """Where grammars are tried; thread-safe.

    Args:
      tokenizer: arguments of `compiling.make_tokenizer`.
    """

    def __init__(self, *tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._free = threading.Semaphore(MAX_PROCESSES)
        self._processes: set[_Process] = set()
        self._idle: list[_Process] = []
        weakref.finalize(self, _end, self._processes)

    def check(self, kind: str, text: str) -> str | None:
        """Compiles a grammar there. Returns why it can't be used; None: it can.

        Raises:
          QueueFullError: too many others are being tried.
        """
        if not self._free.acquire(timeout=SECONDS):
            raise QueueFullError("too many structured_outputs are being compiled: try again later.")
        try:
            process = self._take()
            answer, in_time = _ask_within(SECONDS, process, {"kind": kind, "text": text, "seconds": 2 * SECONDS})
            if answer and in_time:
                self._idle.append(process)
            else:
                self._processes.discard(process)
                _end([process])
        finally:
            self._free.release()
        if answer:
            return json.loads(answer)
        if in_time:
            return f"compiling it takes more than {compiling.MAX_MEMORY >> 30} GiB of memory; make it simpler"
        return f"compiling it takes longer than {SECONDS:g} s; make it simpler"

    def close(self) -> None:
        """Ends what is being tried."""
        _end(self._processes)

    def _take(self) -> _Process:
        """A process that nobody else uses."""
        while self._idle:
            with contextlib.suppress(IndexError):  # somebody else was faster
                process = self._idle.pop()
                if process.poll() is None:
                    return process
        command = [sys.executable, "-P", compiling.__file__]  # -P: what lies about in its folder is not imported
        # In a session of its own, so that Ctrl-C is for the server alone. It ends when nobody can ask any more.
        pipe = subprocess.PIPE
        process = subprocess.Popen(  # noqa: S603  # ourselves
            command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8", start_new_session=True
        )
        self._processes.add(process)
        if not _ask(process, self._tokenizer):
            raise RuntimeError("the process that compiles structured_outputs does not start: see its standard error.")
        return process


def _ask(process: _Process, question: Any) -> str:
    """The line that it answers; "": it has died."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(question) + "\n")  # type: ignore[union-attr]  # it is a pipe
        process.stdin.flush()  # type: ignore[union-attr]
        return process.stdout.readline()  # type: ignore[union-attr]
    return ""


def _ask_within(seconds: float, process: _Process, question: Any) -> tuple[str, bool]:
    """(its answer, whether it was left alone): a process that takes longer is killed."""
    overdue = threading.Event()

    def kill() -> None:
        overdue.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    answer = _ask(process, question)
    timer.cancel()
    timer.join()
    return answer, not overdue.is_set()


def _end(processes: Iterable[_Process]) -> None:
    for process in list(processes):
        process.kill()
        process.wait()
