"""The picture in a terminal, as text."""

import io
import re

from jpaged.memory_view import Recorder, measure
from jpaged.memory_view.snapshot import Counters, PoolShape, RequestState, SequenceState, Snapshot, Status
from jpaged.memory_view.terminal import TerminalView, render
from tests.memory_view.runs import random_steps, small_engine


def request(number: int, name: str, status: Status = Status.RUNNING) -> RequestState:
    return RequestState(number, name, status, "", 4, 0, 0)


SNAPSHOT = Snapshot(
    PoolShape(num_blocks=10, block_size=4),
    (request(0, "zero"), request(1, "one\x1b[2J\n"), request(2, "two", Status.WAITING)),
    (
        SequenceState(0, 0, (1,) * 10, (1, 2, 3), written=10, placed=10),
        SequenceState(0, 1, (1,) * 9, (1, 2, 4), written=9, placed=9),
        SequenceState(1, 0, (1,) * 8, (1, 5), written=4, placed=8),
        SequenceState(2, 0, (1,) * 8, (), written=0, placed=0),
    ),
    frozenset({6, 7}),
    Counters(cache_queries=40, cache_hits=10, copies=1, swaps_out=5, swaps_in=2, preemptions=3),
)


def lines(width: int = 80, height: int = 24) -> list[str]:
    drawn = render(SNAPSHOT, measure(SNAPSHOT), width, height, "a model\x1b[H", 7)
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in drawn]


def test_every_number_and_block_is_there():
    assert lines() == [
        "a model?[H: 9 blocks x 4 tokens, step 7",
        "><×3×2██████░░░░ · ·",
        "used 5 | shared 2 | cached 2 | free 2 | saved by sharing 37.5 % | waste 25.0 %",
        "prefix hits 25.0 % | copies 1 | swapped out 5, in 2 | preempted 3",
        "█ zero ×2           10 tokens  1×3 2×2 3",
        "█ one?[2J?           8 tokens  1×3 5",
        "1 waiting",
    ]


def test_it_fits_the_terminal():
    engine = small_engine()
    recorder = Recorder(engine)
    for _ in random_steps(engine, seed=5):
        recorder.observe()
        for width, height in ((80, 24), (20, 8), (40, 6)):
            drawn = render(recorder.latest, recorder.recording.measures[-1], width, height)
            assert len(drawn) <= height


def test_many_blocks_share_a_character():
    big = Snapshot(PoolShape(10_000, 16), SNAPSHOT.requests, SNAPSHOT.sequences, SNAPSHOT.cached)
    drawn = render(big, measure(big), 60, 20)
    assert len(drawn) <= 20
    assert "▃" in drawn[1], "5 of the first 15 blocks are used"


def test_nothing_is_drawn_where_nobody_looks():
    stream = io.StringIO()
    view = TerminalView(Recorder(small_engine()), stream)
    view.draw()
    view.close()
    assert stream.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_picture_replaces_the_one_before():
    stream = Terminal()
    view = TerminalView(Recorder(small_engine()), stream)
    view.draw()
    first = stream.getvalue()
    view.draw()
    assert stream.getvalue() == first, "it is drawn so often only"
    view.close()
    count = first.count("\n")
    assert stream.getvalue()[len(first) :].startswith(f"\x1b[{count}F\x1b[J")
