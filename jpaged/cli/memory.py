"""--show-memory and --memory-replay: the pool, drawn while a command runs and kept as a page."""

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jpaged.cli.status import Status
from jpaged.errors import InvalidRequestError
from jpaged.memory_view import Recorder
from jpaged.memory_view.terminal import TerminalView

if TYPE_CHECKING:
    from jpaged.engine import LLMEngine


class MemoryPicture:
    """Looks at the engine when it is told that a step is over.

    Args:
      show: draw the pool on standard error, if that is a terminal.
    """

    def __init__(self, engine: "LLMEngine", show: bool) -> None:
        self._recorder = Recorder(engine)
        self.recording = self._recorder.recording
        self.view = TerminalView(self._recorder) if show else None

    def after_step(self, *, draw: bool) -> None:
        """Args: draw: whether nothing else is being written to the terminal now."""
        self._recorder.observe()
        if draw and self.view is not None:
            self.view.draw()

    @property
    def on_terminal(self) -> bool:
        return self.view is not None and self.view.on_terminal


def check_replay_path(path: Path | None) -> None:
    """Raises InvalidRequestError, before a model is loaded, if the page could not be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InvalidRequestError(f"--memory-replay {path}: it must be a file in a folder that exists.")


@contextlib.contextmanager
def memory_picture(
    engine: "LLMEngine", status: Status, *, show: bool, replay: Path | None
) -> Iterator[MemoryPicture | None]:
    """A picture for the time of a command, or None if none is wanted; writes the page at the end, failed or not.

    On a terminal the answers are held back until the picture stands still.
    """
    if not show and replay is None:
        yield None
        return
    picture = MemoryPicture(engine, show)
    held_back = io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            if picture.on_terminal and sys.stdout.isatty():
                stack.enter_context(contextlib.redirect_stdout(held_back))
            yield picture
    finally:
        if picture.view is not None:
            picture.view.close()
        if replay is not None:
            picture.recording.save(replay)
            status.line(f"{len(picture.recording)} steps recorded: open {replay} in a browser")
        sys.stdout.write(held_back.getvalue())
        sys.stdout.flush()
