"""The pool in a terminal, drawn in place while the engine runs.

    ██ one owner, in its colour    ×7 shared, how often    ░░ cached    · free    >< the null block

Where there is no room for two characters a block, one stands for several blocks, and ▁ to █ say how many are used.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, TextIO

from jpaged.memory_view.snapshot import Measures, RequestState, Snapshot, Status

if TYPE_CHECKING:
    from jpaged.memory_view.recorder import Recorder

COLOURS = (33, 214, 36, 176, 117, 202, 250, 227)  # of the 256; the page's, as near as they come
FRAMES_PER_SECOND = 12
_TIDY = 32
"""Blocks a row, if they fit: a block's number can be read off its place."""
_EIGHTHS = "▁▂▃▄▅▆▇█"
_CLEAR_BELOW, _WRAP_OFF, _WRAP_ON = "\x1b[J", "\x1b[?7l", "\x1b[?7h"


@dataclasses.dataclass(frozen=True, slots=True)
class _Cell:
    character: str
    owner: int | None = None
    """A request's number; None: nobody's."""
    shared: bool = False


class TerminalView:
    """Draws a recorder's latest snapshot over the one before. Silent unless the stream is a terminal.

    Args:
      recorder: what it looks at; `draw` does not observe.
      stream: where to; None: standard error.
    """

    def __init__(self, recorder: "Recorder", stream: TextIO | None = None) -> None:
        self._recorder = recorder
        self._stream = sys.stderr if stream is None else stream
        self.on_terminal = self._stream.isatty()
        self._drawn_lines = 0
        self._drawn_at = 0.0

    def draw(self) -> None:
        """Draws, but not so often that the engine waits for the terminal."""
        if self.on_terminal and time.monotonic() - self._drawn_at >= 1 / FRAMES_PER_SECOND:
            self._draw()

    def close(self) -> None:
        """Leaves the last picture where it stands."""
        if self.on_terminal:
            self._draw()

    def _draw(self) -> None:
        width, height = _size_of(self._stream)
        recording = self._recorder.recording
        lines = render(
            self._recorder.latest, recording.measures[-1], width, height - 1, recording.title, len(recording)
        )
        up = f"\x1b[{self._drawn_lines}F" if self._drawn_lines else "\r"
        with contextlib.suppress(OSError, ValueError):  # a closed standard error is no reason to stop
            self._stream.write(up + _CLEAR_BELOW + _WRAP_OFF + "\n".join(lines) + "\n" + _WRAP_ON)
            self._stream.flush()
        self._drawn_lines = len(lines)
        self._drawn_at = time.monotonic()


def render(
    snapshot: Snapshot, measures: Measures, width: int, height: int, title: str = "", step: int = 0
) -> list[str]:
    """The picture as lines with colours, at most `height` of them; a line may be wider than `width` by its codes."""
    pool, counters = snapshot.pool, snapshot.counters
    head = f"{printable(title) or 'KV pool'}: {pool.num_blocks - 1} blocks x {pool.block_size} tokens, step {step}"
    blocks = f"used {measures.used} | shared {measures.shared} | cached {measures.cached} | free {measures.free}"
    saved = percent(measures.entries - measures.used, measures.entries)
    waste = percent(measures.empty, measures.used * pool.block_size)
    hits = percent(counters.cache_hits, counters.cache_queries)
    moves = (
        f"prefix hits {hits} | copies {counters.copies} | swapped out {counters.swaps_out}, in {counters.swaps_in}"
        f" | preempted {counters.preemptions}"
    )
    running = [r for r in snapshot.requests if r.status is Status.RUNNING]
    tables = min(len(running), max(1, (height - 5) // 3))
    cells = block_map(snapshot, columns=max(8, width - 1), rows=max(1, height - 5 - tables))
    lines = [head, *cells, f"{blocks} | saved by sharing {saved} | waste {waste}", moves]
    lines += [_table(snapshot, request, width) for request in running[:tables]]
    others = len(running) - tables
    waiting = f"{measures.waiting} waiting" + (f", {others} more running" if others > 0 else "")
    return [*lines, waiting][:height]


def block_map(snapshot: Snapshot, columns: int, rows: int) -> list[str]:
    """The blocks, with colours, on at most `rows` lines of `columns` characters."""
    return [_paint(cells) for cells in _cells(snapshot, columns, rows)]


def in_colour(request: int, text: str) -> str:
    """In the colour of a request's blocks."""
    return _paint([_Cell(text, request)])


def _cells(snapshot: Snapshot, columns: int, rows: int) -> list[list[_Cell]]:
    """The block map, cut into rows."""
    owners: dict[int, int] = {}
    for sequence in snapshot.sequences:
        for block in sequence.blocks:
            owners.setdefault(block, sequence.request)
    references, count = snapshot.references(), snapshot.pool.num_blocks
    if count <= columns // 2 * rows:  # room for two characters a block
        columns = _TIDY if count <= _TIDY * rows and columns // 2 >= _TIDY else columns // 2
        cells = [_cell(block, references[block], owners.get(block), snapshot) for block in range(count)]
    else:
        each = -(-count // (columns * rows))
        cells = [_several(range(i, min(i + each, count)), owners, snapshot) for i in range(0, count, each)]
    return [cells[first : first + columns] for first in range(0, len(cells), columns)]


def _cell(block: int, references: int, owner: int | None, snapshot: Snapshot) -> _Cell:
    if block == 0:
        return _Cell("><")
    if owner is None:
        return _Cell("░░" if block in snapshot.cached else " ·")
    if references == 1:
        return _Cell("██", owner)
    return _Cell(f"×{references}" if references < 10 else f"{min(references, 99)}", owner, shared=True)


def _several(blocks: range, owners: dict[int, int], snapshot: Snapshot) -> _Cell:
    used = Counter(owners[block] for block in blocks if block in owners)
    if used:
        [(owner, _)] = used.most_common(1)
        return _Cell(_EIGHTHS[(8 * used.total() - 1) // len(blocks)], owner)
    return _Cell("░" if any(block in snapshot.cached for block in blocks) else "·")


def _paint(cells: list[_Cell]) -> str:
    """A row with colour codes where the colour changes."""
    parts, before = [], None
    for cell in cells:
        look = (cell.owner, cell.shared)
        if look != before:
            parts.append(_code(cell))
            before = look
        parts.append(cell.character)
    return "".join(parts) + "\x1b[0m"


def _code(cell: _Cell) -> str:
    if cell.owner is None:
        return "\x1b[0;2m"
    colour = COLOURS[cell.owner % len(COLOURS)]
    return f"\x1b[0;1;30;48;5;{colour}m" if cell.shared else f"\x1b[0;38;5;{colour}m"


def _table(snapshot: Snapshot, request: RequestState, width: int) -> str:
    """A request's line: its first sequence's block table, and how many more it has."""
    sequences = [s for s in snapshot.sequences if s.request == request.number and s.blocks]
    name = printable(request.request_id)[:24]
    if len(sequences) > 1:
        name += f" ×{len(sequences)}"
    longest = max((len(s.tokens) for s in sequences), default=0)
    references = snapshot.references()
    table = sequences[0].blocks if sequences else ()
    entries = " ".join(f"{b}" if references[b] == 1 else f"{b}×{references[b]}" for b in table)
    text = f"{name:<14} {longest:>5} tokens  {entries}"
    return in_colour(request.number, "█") + " " + text[: max(0, width - 3)]


def printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _size_of(stream: TextIO) -> tuple[int, int]:
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return 80, 24
    return columns or 80, lines or 24
