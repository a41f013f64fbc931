"""The recorder: what it keeps is what there was, and the engine does not notice."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import SamplingParams
from jpaged.memory_view import Recorder, measure, record
from jpaged.memory_view.delta import apply, difference
from jpaged.memory_view.snapshot import Counters, PoolShape, RequestState, SequenceState, Snapshot, Status
from tests.engine.support import run
from tests.memory_view.runs import random_steps, small_engine

POOL = PoolShape(num_blocks=16, block_size=4)
COUNTS = st.integers(0, 40)


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=30)
def test_differences_give_back_every_snapshot_of_a_run(seed, caching):
    engine = small_engine(caching)
    recorder = Recorder(engine)
    seen = [recorder.latest]
    for _ in random_steps(engine, seed):
        seen.append(recorder.observe())
    recorder.recording.frames = json.loads(json.dumps(recorder.recording.frames))
    assert list(recorder.recording.snapshots()) == seen
    assert [measure(s) for s in seen] == recorder.recording.measures


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
    size, most_shared = engine.blocks.block_size, 0
    for _ in random_steps(engine, seed):
        seen = recorder.observe()
        found = recorder.recording.measures[-1]
        entries = [block for sequence in seen.sequences for block in sequence.blocks]
        engine.blocks.allocator.check_invariants(entries)  # references = the snapshot's table entries

        placed = {(s.blocks[i // size], i % size) for s in seen.sequences for i in range(s.placed)}
        written = {(s.blocks[i // size], i % size) for s in seen.sequences for i in range(s.written)}
        assert found.used == engine.blocks.num_used == len(set(entries))
        assert found.shared == sum(entries.count(block) > 1 for block in set(entries))
        assert (found.entries, found.written) == (len(entries), len(written))
        assert (found.reserved, found.empty) == (len(placed - written), size * len(set(entries)) - len(placed))
        assert found.used + found.cached + found.free == engine.blocks.allocator.num_usable
        assert (found.running, found.waiting) == (len(engine.scheduler.running), engine.scheduler.num_waiting)
        most_shared = max(most_shared, found.shared)
    assert most_shared > 0, "this run says nothing about sharing"


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
    """2,000 steps x 2,000 blocks are a megabyte or two; here, the same per step and row."""
    engine = small_engine()
    with record(engine) as recording:
        steps = sum(1 for _ in random_steps(engine, seed=3, steps=400))
    rows = sum(m.running for m in recording.measures)
    assert len(recording) == steps + 1
    assert len(json.dumps(recording.frames, separators=(",", ":"))) < 40 * rows + 40 * steps
