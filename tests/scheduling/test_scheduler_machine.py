"""Scheduler under random operations: hypothesis looks for the shortest way to break a promise, and a long seeded run
for what only many operations break. The promises themselves are checked by `NullEngine` at every step."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from jpaged.errors import InvalidRequestError
from jpaged.sequence import FinishReason
from tests.scheduling.null_engine import VOCAB, NullEngine

FAMILIES = [[0] * 40, [0] * 9 + [1] * 31, [1, 2, 3, 0] * 10, list(range(4)) * 3 + [2] * 28]
prompts = st.builds(
    lambda family, cut, tail: family[:cut] + tail,
    st.sampled_from(FAMILIES),
    st.integers(0, 20),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=2),
)
requests = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "max_tokens": st.integers(1, 20),
        "n": st.sampled_from([1, 1, 1, 1, 2, 3, 5]),
        "beams": st.sampled_from([False, False, False, True]),
        "stop": st.booleans(),
        "priority": st.integers(-2, 2),
        "salt": st.sampled_from(["", "", "", "salt"]),
        "prompt_logprobs": st.sampled_from([None, None, None, None, 0]),
    }
)


@st.composite
def engines(draw):
    tile, size, rows = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 6))
    return NullEngine(
        num_blocks=draw(st.integers(20, 50)) // size,
        block_size=size,
        rows=rows,
        max_len=48,
        tile_size=tile,
        budget=max(rows, tile * draw(st.integers(1, 6)) + draw(st.integers(0, 6))),
        watermark=draw(st.sampled_from([0.0, 0.01, 0.2])),
        caching=draw(st.sampled_from([True, True, False])),
        max_tiles=draw(st.sampled_from([None, 1, 2])),
        swap_blocks=draw(st.sampled_from([0, 4, 12, 100])),
        preemption_mode=draw(st.sampled_from(["auto", "auto", "swap", "recompute"])),
        windows=draw(
            st.sampled_from([(None,)] * 3 + [(1,), (5,), (12,), (None, 1), (None, 5), (None, 12, 12), (9, 4)])
        ),
        guesses=draw(st.sampled_from([0, 0, 1, 3, 6])),
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Preemptions come by themselves: the pools are tiny."""

    @initialize(engine=engines(), use_priorities=st.booleans())
    def start(self, engine, use_priorities):
        self.engine, self.use_priorities = engine, use_priorities

    @rule(requests=st.lists(requests, min_size=1, max_size=4), steps=st.integers(0, 4))
    def add(self, requests, steps):
        engine = self.engine
        for request in requests:
            if not self.use_priorities:
                request = request | {"priority": 0}
            length = min(len(request["prompt"]) + request["max_tokens"], engine.max_len)
            size = engine.blocks.block_size
            shared = engine.blocks.blocks_for(len(request["prompt"]) // size * size) if request["n"] > 1 else 0
            need = shared + request["n"] * (engine.blocks.blocks_for(length - 1) - shared)
            if request["n"] == 1:
                need = engine.blocks.most_blocks(length - 1)
            fits = request["n"] <= len(engine.scheduler.batch.by_row) and need <= engine.blocks.allocator.num_usable
            try:
                engine.add(**request)
            except InvalidRequestError:
                assert not fits
            else:
                assert fits
        self.step(steps)

    @precondition(lambda self: self.engine.has_work)
    @rule(count=st.sampled_from([1, 1, 2, 5, 20]))
    def step(self, count):
        for _ in range(count):
            self.engine.step()
            self.engine.check_tables()

    @precondition(lambda self: self.engine.unfinished)
    @rule(data=st.data())
    def abort(self, data):
        self.engine.abort(data.draw(st.sampled_from(self.engine.unfinished)))
        self.engine.check()

    @precondition(lambda self: self.engine.unfinished)
    @rule(data=st.data())
    def stop_by_text(self, data):
        """As the output processor does after a commit."""
        self.stop_some(self.engine.step(), data)

    @precondition(lambda self: self.engine.has_work)
    @rule(data=st.data())
    def interrupt(self, data):
        self.stop_some(self.engine.interrupt(), data)

    def stop_some(self, received, data):
        for sequence in received:
            if not sequence.finished and data.draw(st.booleans()):
                self.engine.scheduler.finish(sequence, FinishReason.STOP, "text")
        self.engine.check()

    @precondition(lambda self: self.engine.has_work)
    @rule()
    def reset_prefix_cache(self):
        self.engine.blocks.reset_prefix_cache()
        self.engine.check()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.engine.drain()
        self.engine.check_outputs()
        if not self.use_priorities:
            arrivals = [g.order for g in self.engine.first_scheduled]
            assert arrivals == sorted(arrivals), "first come, first served"


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=30)


@pytest.mark.parametrize("windows", [(None,), (10,), (None, 10)])
@pytest.mark.parametrize("caching", [True, False])
def test_outputs_do_not_depend_on_the_pool(caching, windows):
    """The same requests in a roomy pool and in ever smaller ones: the same outputs, only later."""
    steps = []
    for num_blocks in (400, 36, 12, 9):
        engine = NullEngine(
            num_blocks=num_blocks,
            block_size=4,
            rows=6,
            max_len=48,
            tile_size=4,
            budget=24,
            caching=caching,
            windows=windows,
        )
        rng = random.Random(5)
        for _ in range(30):
            family = rng.choice(FAMILIES)
            engine.add(
                [*family[: rng.randrange(1, 20)], rng.randrange(VOCAB)], rng.randrange(1, 12), stop=rng.random() < 0.3
            )
        engine.drain()
        engine.check_outputs()
        steps.append(engine.num_steps)
        assert (engine.scheduler.num_preemptions > 0) == (num_blocks < 20)
    assert steps == sorted(steps)


def test_a_stream_of_small_requests_does_not_starve_a_large_one():
    engine = NullEngine(num_blocks=20, block_size=2, rows=4, max_len=48, tile_size=4, budget=12)
    rng = random.Random(0)
    large = None
    for i in range(300):
        engine.add([rng.randrange(VOCAB) for _ in range(3)], 5)
        if i == 20:
            large = engine.add([rng.randrange(VOCAB) for _ in range(30)], 10)
        engine.step()
        if large is not None and large.finished:
            break
    assert large.finished, "and its deadline, which counts only those before it, has been checked at every step"
    assert len(engine.unfinished) > 20, "the stream never let up"
    engine.drain()


def test_no_block_is_held_after_100_000_random_operations():
    """Seeded. The device stays out of it, and the invariants are looked at now and then: seconds, not minutes."""
    rng = random.Random(2024)
    engine = NullEngine(
        num_blocks=32, block_size=4, rows=12, max_len=64, tile_size=8, budget=44, checked=False, swap_blocks=20
    )
    added = 0
    for operation in range(100_000):
        kind = rng.random()
        if kind < 0.2 and len(engine.unfinished) < 40:
            family, n = rng.choice(FAMILIES), rng.choice([1, 1, 1, 1, 2, 4])
            engine.add(
                [*family[: rng.randrange(12)], rng.randrange(VOCAB)],
                rng.randrange(1, 40 // n + 1),
                stop=rng.random() < 0.3,
                n=n,
                beams=rng.random() < 0.1,
                priority=rng.choice([0, 0, 0, -1, 1]),
                salt=rng.choice(["", "", "salt"]),
            )
            added += 1
        elif kind < 0.23 and engine.unfinished:
            engine.abort(rng.choice(engine.unfinished))
        elif kind < 0.231:
            engine.blocks.reset_prefix_cache()
        elif kind < 0.232:
            engine.interrupt()
        else:
            for sequence in engine.step():
                if rng.random() < 0.01:
                    engine.scheduler.finish(sequence, FinishReason.STOP, "text")
        if operation % 500 == 0:
            engine.check()
            engine.check_tables()
    engine.drain()
    assert engine.blocks.allocator.num_free == 32
    engine.blocks.reset_prefix_cache()
    assert engine.blocks.allocator.num_cached == 0
    assert len(engine.blocks.cache) == 0
    # It was not for nothing: requests were preempted, shared with and refused blocks many times.
    assert added > 10_000
    assert engine.scheduler.num_preemptions > 1_000
    assert engine.blocks.stats.hits > 10_000
    assert engine.blocks.num_copies > 1_000
    assert engine.scheduler.num_swaps_in > 100


def test_ten_thousand_queued_requests_all_finish():
    """All are there before the first step; singles, samples and beams, in a pool that holds a handful of them."""
    rng = random.Random(7)
    sizes = {"num_blocks": 20, "block_size": 4, "rows": 16, "max_len": 48, "tile_size": 8, "budget": 48}
    engine = NullEngine(**sizes, watermark=0.0, swap_blocks=20, checked=False, timed=False)
    refused = []
    while len(engine.groups) < 10_000:
        n, family = rng.choice([1, 1, 1, 1, 2, 4, 20]), rng.choice(FAMILIES)
        try:
            engine.add([*family[: rng.randrange(12)], n % VOCAB], rng.randrange(1, 6), n=n, beams=rng.random() < 0.1)
        except InvalidRequestError as error:
            refused.append(str(error))
    assert engine.scheduler.num_waiting == 10_000
    engine.drain()
    sequences = [sequence for group in engine.groups for sequence in group.sequences]
    assert all(len(s.tokens) == s.max_length and s.finish_reason is FinishReason.LENGTH for s in sequences)
    assert len(refused) > 1_000
    assert all("max_num_seqs=16" in error or "whole pool has 20" in error for error in refused)
    assert engine.scheduler.num_preemptions > 1_000
    assert engine.scheduler.num_swaps_in > 300
