"""jpaged top: a running server in the terminal. reader.py asks the server, screen.py draws, `Top` goes round."""

import dataclasses
import os
import shutil
import sys
import time
from typing import Annotated

from tyro import conf

from jpaged.cli.flags import Switch
from jpaged.cli.top.reader import Picture, Reader, ServerError
from jpaged.cli.top.screen import draw, plain
from jpaged.errors import InvalidConfigError

_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"
_CLEAR, _HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[2J", "\x1b[H", "\x1b[K", "\x1b[J"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Top:
    """Watch a server: its batch, its KV pool, its rates. Ctrl-C ends.

    The pool and the requests are shown if the server was started with --enable-ui; what is in /metrics, in any case.
    """

    url: Annotated[conf.Positional[str], conf.arg(metavar="URL")] = "http://127.0.0.1:8000"
    """Where the server is."""
    api_key: str = ""
    """Of the server. Better: the environment variable JPAGED_API_KEY, where other users of the machine can't see it."""
    interval: float = 1.0
    """Seconds between two looks."""
    once: Switch = False
    """Draw one picture and end; so does a standard output that is not a terminal."""

    def run(self) -> int:
        if not 0.1 <= self.interval <= 3600:
            raise InvalidConfigError(f"interval={self.interval!r} must be in [0.1, 3600].")
        key = self.api_key or os.environ.get("JPAGED_API_KEY", "").partition(",")[0].strip()
        reader = Reader(self.url, key)
        if self.once or not sys.stdout.isatty():
            picture = reader.read()
            width, height = shutil.get_terminal_size()
            lines = draw(picture, self.url, width, height)
            print("\n".join(lines if sys.stdout.isatty() else map(plain, lines)))
            return 0
        picture = reader.read()  # if that does not work, it is said and not drawn
        sys.stdout.write(_CLEAR)
        while True:
            self._show(picture)
            time.sleep(self.interval)
            picture = _next(reader, picture)

    def _show(self, picture: Picture) -> None:
        width, height = shutil.get_terminal_size()
        lines = draw(picture, self.url, width, height - 1)
        body = "".join(f"{line}{_CLEAR_LINE}\n" for line in lines)
        sys.stdout.write(f"{_HOME}{_WRAP_OFF}{body}{_CLEAR_BELOW}{_WRAP_ON}")
        sys.stdout.flush()


def _next(reader: Reader, before: Picture) -> Picture:
    """The next picture; if there is none, the one before, with the reason."""
    try:
        return reader.read()
    except ServerError as error:
        return dataclasses.replace(before, problem=str(error))
