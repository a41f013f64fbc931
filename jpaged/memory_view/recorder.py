"""Watching an engine from outside: a snapshot after each step, kept as the difference to the one before.

The engine does not know that it is watched: `record` puts its own function in front of `engine.step` for as long as
it lasts, and an engine that nobody records does nothing for it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jpaged.memory_view.delta import Frame, apply, difference, empty
from jpaged.memory_view.snapshot import (
    Measures,
    Observable,
    PoolShape,
    Snapshot,
    live_groups,
    measure,
    snapshot,
)


class Recording:
    """The steps that were seen.

    Args:
      pool: its shape.
      title: what ran; shown above the picture.
      decode: token id -> text, for the picture; None: ids are shown.
    """

    def __init__(self, pool: PoolShape, title: str = "", decode: Callable[[int], str] | None = None) -> None:
        self.pool, self.title, self.decode = pool, title, decode
        self.frames: list[Frame] = []
        self.measures: list[Measures] = []
        self.milliseconds: list[int] = []
        """When each step returned, since the recording began."""

    def __len__(self) -> int:
        return len(self.frames)

    def snapshots(self) -> Iterator[Snapshot]:
        """Every step's snapshot again, rebuilt from the differences."""
        now = empty(self.pool)
        for frame in self.frames:
            now = apply(now, frame)
            yield now

    def to_html(self) -> str:
        """One page that replays the recording, with nothing outside it."""
        from jpaged.memory_view.html import page

        return page(self)

    def save(self, path: str | Path) -> None:
        """Writes `to_html` to a file."""
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from jpaged.memory_view.html import notebook_frame

        return notebook_frame(self)


class Recorder:
    """Takes a snapshot each time it is told that a step is over.

    Args:
      engine: `LLMEngine`, or anything else that is `Observable`.
      title: what runs; None: the engine's model.
    """

    def __init__(self, engine: Observable, title: str | None = None) -> None:
        self._engine = engine
        self._groups = live_groups(engine)
        self._start = time.monotonic()
        self.latest = snapshot(engine, self._groups)
        if title is None:
            title = str(getattr(getattr(engine, "config", None), "model", ""))
        self.recording = Recording(self.latest.pool, title, _decoder(engine))
        self._last = empty(self.latest.pool)
        self._add()

    def observe(self) -> Snapshot:
        """Call it after each `engine.step()`."""
        live = live_groups(self._engine)
        known = set(map(id, live))
        # Groups that have ended since are looked at once more: how they ended, and their last tokens.
        gone = [group for group in self._groups if id(group) not in known]
        self._groups = live
        self.latest = snapshot(self._engine, sorted([*gone, *live], key=lambda group: group.order[1]))
        self._add()
        return self.latest

    def _add(self) -> None:
        recording = self.recording
        recording.frames.append(difference(self._last, self.latest))
        recording.measures.append(measure(self.latest))
        recording.milliseconds.append(round(1000 * (time.monotonic() - self._start)))
        self._last = self.latest


@contextlib.contextmanager
def record(engine: Any, *, live: bool = False, title: str | None = None) -> Iterator[Recording]:
    """Records every step of an engine.

        with record(llm) as recording:
            llm.generate(prompts)
        recording.save("memory.html")      # in a notebook: `recording` as a cell's last line shows it

    Args:
      engine: an `LLM`, an `LLMEngine`, or anything else that is `Observable`.
      live: also draw the pool on standard error, if that is a terminal (and pass use_tqdm=False to `LLM.generate`,
        whose progress bar would stand in it).
      title: what runs; None: the engine's model.

    Yields: the recording, which grows with each step.
    """
    from jpaged.memory_view.terminal import TerminalView

    engine = getattr(engine, "engine", engine)
    recorder = Recorder(engine, title)
    view = TerminalView(recorder) if live else None
    step, replaced = engine.step, vars(engine).get("step")

    def watched_step() -> Any:
        result = step()
        recorder.observe()
        if view is not None:
            view.draw()
        return result

    engine.step = watched_step
    try:
        yield recorder.recording
    finally:
        if replaced is None:
            del engine.step  # the class's own is back
        else:
            engine.step = replaced  # a recording around this one
        if view is not None:
            view.close()


def _decoder(engine: Any) -> Callable[[int], str] | None:
    tokenizer = getattr(engine, "tokenizer", None)
    if tokenizer is None:
        return None
    backend = tokenizer.backend_tokenizer

    def text(token: int) -> str:
        raw = backend.id_to_token(token)
        if raw is None:
            return f"#{token}"
        # SentencePiece writes a space so; its decoder would drop it at the start of a text.
        return raw.replace("▁", " ") if "▁" in raw else backend.decode([token], skip_special_tokens=False)

    return text
