"""The recorder: what it keeps is what there was, and the engine does not notice."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import SamplingParams
from jpaged.memory_view import Recorder, measure, record
from jpaged.memory_view.delta import apply, difference
from jpaged.memory_view.snapshot import Counters, PoolShape, RequestState, SequenceState, Snapshot, Status
from tests.engine.support import run
from tests.memory_view.runs import random_steps, small_engine
from tests.scheduling.null_engine import NullEngine

POOL = PoolShape(num_blocks=16, block_size=4)
COUNTS = st.integers(0, 40)


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([(None,), (None, 8)]))
@settings(max_examples=30)
def test_differences_give_back_every_snapshot_of_a_run(seed, caching, windows):
    engine = small_engine(caching, windows)
    recorder = Recorder(engine)
    seen = [recorder.latest]
    for _ in random_steps(engine, seed):
        seen.append(recorder.observe())
    recorder.recording.frames = json.loads(json.dumps(recorder.recording.frames))
    assert list(recorder.recording.snapshots()) == seen
    assert [measure(s) for s in seen] == recorder.recording.measures
    assert recorder.recording.measures[-1].used == engine.blocks.num_used


@st.composite
def snapshots(draw):
    """Any two of these may follow each other: tables and texts that shrink, fork and change in the middle."""
    numbers = sorted(draw(st.sets(st.integers(0, 5), max_size=4)))
    requests, sequences = [], []
    for number in numbers:
        text = draw(st.sampled_from(["a", "</script>", ""]))
        status = draw(st.sampled_from(list(Status)))
        requests.append(RequestState(number, text, status, draw(st.sampled_from(["", "stop"])), *draw_counts(draw, 4)))
        for index in sorted(draw(st.sets(st.integers(0, 3), max_size=3))):
            tokens = tuple(draw(st.lists(st.integers(0, 3), max_size=6)))
            blocks = tuple(draw(st.lists(st.integers(1, 15), max_size=4)))
            written, reserved = draw_counts(draw, 2) if blocks else (0, 0)
            sequences.append(SequenceState(number, index, tokens, blocks, written, written + reserved))
    cached = draw(st.frozensets(st.integers(1, 15)))
    return Snapshot(POOL, tuple(requests), tuple(sequences), cached, Counters(*draw_counts(draw, 7)))


def draw_counts(draw, count):
    return [draw(COUNTS) for _ in range(count)]


@given(snapshots(), snapshots())
@settings(max_examples=300)
def test_a_difference_says_all_that_changed(before, after):
    frame = json.loads(json.dumps(difference(before, after)))
    assert apply(before, frame) == after
    assert difference(after, after) == {}


@given(st.integers(0, 2**32))
@settings(max_examples=15)
def test_measures_equal_a_direct_count(seed):
    engine = small_engine()
    recorder = Recorder(engine)
    most_shared = 0
    for _ in random_steps(engine, seed):
        recorder.observe()
        check_measures(engine, recorder)
        most_shared = max(most_shared, recorder.recording.measures[-1].shared)
    assert most_shared > 0, "this run says nothing about sharing"


def check_measures(engine, recorder):
    seen, found, size = recorder.latest, recorder.recording.measures[-1], engine.blocks.block_size
    entries = [block for sequence in seen.sequences for block in sequence.blocks]
    engine.blocks.allocator.check_invariants(entries)  # references = the snapshot's table entries
    placed = {(s.blocks[i // size], i % size) for s in seen.sequences for i in range(s.placed)}
    written = {(s.blocks[i // size], i % size) for s in seen.sequences for i in range(s.written)}
    scheduler = engine.scheduler
    assert found.used == engine.blocks.num_used == len(set(entries))
    assert found.shared == sum(entries.count(block) > 1 for block in set(entries))
    assert (found.entries, found.written) == (len(entries), len(written))
    assert (found.reserved, found.empty) == (len(placed - written), size * len(set(entries)) - len(placed))
    assert found.used + found.cached + found.free == engine.blocks.allocator.num_usable
    assert found.host == scheduler.swap_space.num_used
    groups = (len(scheduler.running), scheduler.num_waiting, scheduler.num_swapped)
    assert (found.running, found.waiting, found.swapped) == groups


def test_the_random_runs_have_everything_in_them():
    """Or the tests over them say less than they seem to."""
    engine = small_engine()
    recorder = Recorder(engine)
    for _ in random_steps(engine, seed=1, steps=400):
        recorder.observe()
        check_measures(engine, recorder)
    counters = recorder.latest.counters
    assert min(counters.cache_hits, counters.copies, counters.swaps_out, counters.swaps_in, counters.tokens_lost) > 0
    statuses = {request.status for snapshot in recorder.recording.snapshots() for request in snapshot.requests}
    assert statuses == set(Status)


@pytest.fixture
def asked(tiny):
    engine = tiny(num_blocks=40)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    for name, prompt in (("one", list(range(5, 30))), ("two", list(range(5, 25))), ("one again", list(range(5, 30)))):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    return engine


def test_a_real_run_is_followed_to_its_end(asked):
    with record(asked) as recording:
        outputs = run(asked)
    snapshots = list(recording.snapshots())
    last = {s.request: s.tokens for snapshot in snapshots for s in snapshot.sequences}
    assert list(last.values()) == [tuple(o.prompt_token_ids + o.outputs[0].token_ids) for o in outputs.values()]
    ends = {r.request_id: r.finish_reason for snapshot in snapshots for r in snapshot.requests if r.finish_reason}
    assert ends == dict.fromkeys(("one", "two", "one again"), "length")
    assert snapshots[-1].counters.cache_hits > 0
    assert max(m.shared for m in recording.measures) >= 24 // 4


def test_the_engine_is_as_before_when_the_recording_ends(asked):
    step = type(asked).step
    with record(asked) as outer:
        with record(asked) as inner:
            asked.step()
        asked.step()
    assert (len(inner), len(outer)) == (2, 3)
    assert "step" not in vars(asked)
    assert asked.step.__func__ is step
    run(asked)
    assert len(outer) == 3


def test_an_id_may_be_used_again(tiny):
    engine = tiny()
    with record(engine) as recording:
        for _ in range(2):
            engine.add_request("same", {"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=2))
            run(engine)
    assert {r.number for s in recording.snapshots() for r in s.requests} == {0, 1}


def test_a_long_recording_stays_small():
    """2,000 steps of 32 sequences in 2,000 blocks make a page of at most two megabytes; here, a tenth of that."""
    rows, steps, dice = 32, 200, random.Random(1)
    engine = NullEngine(
        num_blocks=2000, block_size=16, rows=rows, max_len=1024, tile_size=32, budget=rows + 512, checked=False
    )
    with record(engine) as recording:
        for _ in range(steps):
            while len(engine.unfinished) < rows:
                engine.add([dice.randrange(4) for _ in range(dice.randrange(50, 400))], dice.randrange(50, 500))
            engine.step()
    assert sum(m.running for m in recording.measures) > steps * rows * 0.9
    assert len(recording.to_html()) < 2_000_000 * steps / 2000
