"""What a command is doing, on standard error: a ticking line on a terminal, one plain line for each thing elsewhere.

    terminal   compiling a step for 1 row + 128 prompt tokens ... 4 s        disappears when it is done
    a pipe     compiling a step for 1 row + 128 prompt tokens ... 4.2 s
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator


class Status:
    """Reports what takes long. `muted` is set while an answer is written, which a report would break into."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self.on_terminal = self._stream.isatty()
        self.muted = False

    def line(self, text: str) -> None:
        """Writes a line that stays."""
        self._write(text + "\n")

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Reports something while it lasts, and how long it took."""
        if self.muted:
            yield
        elif self.on_terminal:
            with self._ticking(what):
                yield
        else:
            start = time.monotonic()
            self._write(f"{what} ... ")
            try:
                yield
            except BaseException:
                self._write("\n")
                raise
            self._write(f"{time.monotonic() - start:.1f} s\n")

    @contextlib.contextmanager
    def _ticking(self, what: str) -> Iterator[None]:
        done, start = threading.Event(), time.monotonic()

        def tick() -> None:
            while not done.wait(0.2):  # what is over at once does not flicker by
                self._write(f"\r\x1b[2K{what} ... {time.monotonic() - start:.0f} s")
            self._write("\r\x1b[2K")

        # XLA compiles without holding Python's lock, so the line keeps ticking.
        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed standard error is no reason to stop
            self._stream.write(text)
            self._stream.flush()
