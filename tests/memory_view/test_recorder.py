"""The recorder: what it keeps is what there was."""

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import SamplingParams
from jpaged.memory_view import Recorder, measure, record
from jpaged.memory_view.delta import apply, difference, empty
from jpaged.memory_view.snapshot import Counters, PoolShape, RequestState, SequenceState, Snapshot, Status
from tests.engine.support import run
from tests.scheduling.null_engine import NullEngine


def small_engine(caching: bool = True) -> NullEngine:
    return NullEngine(
        num_blocks=24, block_size=4, rows=6, max_len=64, tile_size=4, budget=6 + 16, watermark=0.05, caching=caching
    )


def random_steps(engine: NullEngine, seed: int, steps: int = 120):
    """Requests come, with common prefixes, and some are aborted; yields after each step."""
    dice = random.Random(seed)
    prefix = [dice.randrange(4) for _ in range(12)]
    for _ in range(steps):
        if dice.random() < 0.25 and len(engine.unfinished) < 10:
            prompt = prefix[: dice.randrange(13)] + [dice.randrange(4) for _ in range(dice.randrange(1, 12))]
            engine.add(prompt, dice.randrange(1, 24), n=dice.choice((1, 1, 2)), stop=dice.random() < 0.3)
        if dice.random() < 0.03 and engine.unfinished:
            engine.abort(dice.choice(engine.unfinished))
        engine.step()
        yield


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=25)
def test_differences_give_back_every_snapshot(seed, caching):
    engine = small_engine(caching)
    recorder = Recorder(engine)
    seen = [recorder.latest]
    for _ in random_steps(engine, seed):
        seen.append(recorder.observe())
    recorder.recording.frames = json.loads(json.dumps(recorder.recording.frames))
    assert list(recorder.recording.snapshots()) == seen
