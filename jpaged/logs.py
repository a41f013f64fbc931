"""What is logged: events with fields, written as text or as JSON by a thread of their own.

    preemption           request_id, how (swap or recompute), tokens_lost
    swap_out, swap_in    blocks, bytes, seconds
    slow_step            seconds, compiling (seconds of them), running, waiting
    engine_dead          reason
    lines_dropped        count

Whoever logs never waits: a line goes into a queue. Never is a text of a request, or of an answer, in a line.
"""

import json
import logging
import queue
import threading
import time
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]
MOST = 10_000
"""Lines that may wait to be written; what is more is dropped and counted."""
_PATIENCE = 1.0
"""Seconds that the end of a process waits for lines to be written."""


def report(log: logging.Logger, event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Logs that something happened.

    Args:
      event: one of the above.
      fields: numbers, words and ids.
    """
    if log.isEnabledFor(level):
        log.log(level, event, extra={"fields": fields})


def to_stream(stream: TextIO, form: LogFormat) -> None:
    """Sends all of this process's log lines there, from now on."""
    logging.basicConfig(handlers=[Handoff(stream, JsonLines() if form == "json" else TextLines())], force=True)


class TextLines(logging.Formatter):
    """Time, logger, level and message; fields as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s %(levelname)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name
        fields = getattr(record, "fields", {})
        return " ".join((super().formatMessage(record), *(f"{name}={_word(value)}" for name, value in fields.items())))


class JsonLines(logging.Formatter):
    """One object a line: time (seconds since 1970), level, logger; then `event` and its fields, or `message`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
        fields = getattr(record, "fields", None)
        line |= {"message": record.getMessage()} if fields is None else {"event": record.getMessage(), **fields}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _word(value: Any) -> str:
    """Without spaces and line ends, whoever chose it."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if text.isprintable() and text and " " not in text else json.dumps(text)


class Handoff(logging.Handler):
    """Gives records to a thread that writes them.

    Args:
      stream: where to; it may block for as long as it likes.
      formatter: makes lines of records, on that thread.
    """

    def __init__(self, stream: TextIO, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._stream = stream
        self._queue: queue.Queue[logging.LogRecord | threading.Event] = queue.Queue(MOST)
        self._dropped = 0
        threading.Thread(target=self._write_all, name="jpaged-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        """Waits, but not for long, until all that was logged is written. `logging` calls it when the process ends."""
        written, deadline = threading.Event(), time.monotonic() + _PATIENCE
        try:
            self._queue.put(written, timeout=_PATIENCE)
        except queue.Full:
            return
        written.wait(deadline - time.monotonic())

    def _write_all(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            try:
                if self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    self._write(_record("lines_dropped", count=dropped))
                self._write(item)
            except (OSError, ValueError):  # nobody reads any more: no reason to stop
                continue

    def _write(self, record: logging.LogRecord) -> None:
        self._stream.write(self.format(record) + "\n")
        self._stream.flush()


def _record(event: str, **fields: Any) -> logging.LogRecord:
    level = logging.WARNING
    return logging.makeLogRecord(
        {"name": "jpaged", "levelno": level, "levelname": logging.getLevelName(level), "msg": event, "fields": fields}
    )


def flush() -> None:
    """Before a process ends in a way that `logging` does not see."""
    for handler in logging.getLogger().handlers:
        handler.flush()
