"""What a command is doing, on standard error: a ticking line on a terminal, plain lines elsewhere.

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
        self._busy = False

    def line(self, text: str) -> None:
        """Writes a line that stays."""
        self._write(text + "\n")

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[list[str]]:
        """Reports something while it lasts, and how long it took; gives a list to add remarks to."""
        remarks: list[str] = []
        if self.muted or self._busy:  # what is part of something else is not reported by itself
            yield remarks
            return
        self._busy = True
        try:
            with self._ticking(what) if self.on_terminal else self._plainly(what, remarks):
                yield remarks
        finally:
            self._busy = False

    @contextlib.contextmanager
    def _plainly(self, what: str, remarks: list[str]) -> Iterator[None]:
        start = time.monotonic()
        self._write(f"{what} ... ")
        try:
            yield
        except BaseException:
            self._write("\n")
            raise
        self._write(", ".join((f"{time.monotonic() - start:.1f} s", *remarks)) + "\n")

    @contextlib.contextmanager
    def _ticking(self, what: str) -> Iterator[None]:
        done, start = threading.Event(), time.monotonic()

        def tick() -> None:
            shown = ""
            while not done.wait(0.2):  # what is over at once does not flicker by
                line = f"\r\x1b[2K{what} ... {time.monotonic() - start:.0f} s"
                if line != shown:
                    self._write(line)
                    shown = line
            if shown:
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
