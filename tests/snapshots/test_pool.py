"""The prefix cache in a snapshot: another engine finds what one has computed, and computes the rest alone."""

import dataclasses

import numpy as np
import pytest

from jpaged import SamplingParams
from jpaged.snapshots.pool import adopt_cache, read_cache
from jpaged.snapshots.store import Store
from tests.engine.support import run

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = {"a": list(range(5, 75)), "b": list(range(90, 120))}


def add(engine, params=GREEDY):
    for name, tokens in PROMPTS.items():
        engine.add_request(name, {"prompt_token_ids": tokens}, params)


def wipe(engine):
    """Tests share a pool: nobody shall find in it what an engine before has left there."""
    engine.runner.pool = engine.runner.spec.allocate()


@pytest.fixture
def interrupted(tiny, tmp_path):
    """(snapshot, pool as it comes back from a folder) of an engine in the middle of its work, and the texts."""
    engine = tiny()
    add(engine)
    want = {name: output.outputs[0].token_ids for name, output in run(engine).items()}
    engine = tiny()
    wipe(engine)
    add(engine)
    for _ in range(12):
        engine.step()
    store = Store(tmp_path)
    store.save(store.begin(), b"state", read_cache(engine.blocks, engine.runner))
    store.close()
    store = Store(tmp_path)
    _, _, pool = store.load()
    store.close()
    snapshot = engine.snapshot()
    engine.abort_all()
    run(engine)
    wipe(engine)
    return snapshot, pool, want


def test_what_was_computed_is_found(tiny, interrupted):
    snapshot, pool, want = interrupted
    engine = tiny()
    count = adopt_cache(pool, engine.blocks, engine.runner)
    assert count == len(pool["tokens"]) > 0
    engine.blocks.check_invariants()
    engine.restore(snapshot)
    engine.step()
    assert engine.blocks.stats.hits >= 4 * count - 8, "all but the last block of each, which is not full"
    got = run(engine)
    assert {name: output.outputs[0].token_ids for name, output in got.items()} == want


def test_a_smaller_pool_takes_what_was_used_last(tiny, interrupted):
    _, pool, _ = interrupted
    engine = tiny(num_blocks=21)
    assert adopt_cache(pool, engine.blocks, engine.runner) == 20 < len(pool["tokens"])
    engine.blocks.check_invariants()
    engine.add_request("b", {"prompt_token_ids": PROMPTS["b"][:20]}, dataclasses.replace(GREEDY, max_tokens=8))
    run(engine)


def test_another_kind_of_pool_is_left_alone(tiny, interrupted):
    _, pool, _ = interrupted
    engine = tiny()
    other = {**pool, "layers": {name: layer.astype(np.float16) for name, layer in pool["layers"].items()}}
    for tree in ({}, other, {**pool, "weights_version": np.array(1)}, {**pool, "tokens": pool["tokens"][:, :2]}):
        assert adopt_cache(tree, engine.blocks, engine.runner) == 0
    uncached = tiny(enable_prefix_caching=False)
    assert adopt_cache(pool, uncached.blocks, uncached.runner) == 0
    assert read_cache(uncached.blocks, uncached.runner) == {}
