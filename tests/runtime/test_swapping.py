"""Swapper: what leaves the pool comes back as it was, to wherever it is wanted."""

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jpaged.runtime.swapping import CHUNKS, Swapper

NUM_BLOCKS, SHAPE, LAYERS = 400, (2, 3, 4, 5), 2
BLOCK_BYTES = LAYERS * 2 * 3 * 4 * 5 * 4


def new_pool(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jax.numpy.asarray(rng.normal(size=(NUM_BLOCKS, *SHAPE)).astype(np.float32)) for _ in range(LAYERS))


@pytest.fixture(scope="module")
def compiled():
    """One for all tests: its two programs are compiled once for each chunk size."""
    return Swapper(BLOCK_BYTES, SingleDeviceSharding(jax.devices()[0]))


@pytest.fixture
def swapper(compiled):
    compiled.out, compiled.back = type(compiled.out)(), type(compiled.back)()
    return compiled


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 65, 128, 150])
def test_there_and_back(swapper, count):
    rng = np.random.default_rng(count)
    pool = new_pool()
    before = [np.array(layer) for layer in pool]
    blocks = (1 + rng.permutation(NUM_BLOCKS - 1)[:count]).astype(np.int32)
    contents = swapper.swap_out(pool, blocks)
    sizes = [len(chunk[0]) for chunk in contents]
    assert set(sizes) <= set(CHUNKS)
    assert sum(sizes) - count < CHUNKS[0]
    assert all(layer.sharding.memory_kind == "pinned_host" for chunk in contents for layer in chunk)
    pool = jax.tree.map(lambda layer: layer.at[blocks].set(-1.0), pool)  # others have used the blocks
    targets = (1 + rng.permutation(NUM_BLOCKS - 1)[:count]).astype(np.int32)
    expected = [np.array(layer) for layer in pool]
    for layer, old in zip(expected, before, strict=True):
        layer[targets] = old[blocks]
    pointers = [layer.unsafe_buffer_pointer() for layer in pool]
    pool = swapper.swap_in(pool, contents, np.arange(count, dtype=np.int32), targets)
    assert [layer.unsafe_buffer_pointer() for layer in pool] == pointers, "in place"
    for layer, values in zip(pool, expected, strict=True):
        np.testing.assert_array_equal(layer[1:], values[1:])  # the null block may hold anything
        assert np.isfinite(np.asarray(layer[0])).all()


@pytest.mark.parametrize("wanted", [[0], [3, 70, 71, 99], list(range(64, 100)), list(range(1, 100, 2))])
def test_only_some_come_back(swapper, wanted):
    """A sequence of the group has ended: the blocks that were its own stay away, and nothing else is touched."""
    pool = new_pool(1)
    before = [np.array(layer) for layer in pool]
    blocks = np.arange(100, 200, dtype=np.int32)
    contents = swapper.swap_out(pool, blocks)
    targets = 300 + np.arange(len(wanted), dtype=np.int32)
    pool = swapper.swap_in(pool, contents, np.array(wanted, np.int32), targets)
    for layer, values in zip(pool, before, strict=True):
        values[targets] = values[blocks[wanted]]
        np.testing.assert_array_equal(layer[1:], values[1:])


def test_bytes_and_time_are_counted_in_both_directions(swapper):
    pool = new_pool()
    contents = swapper.swap_out(pool, np.arange(1, 71, dtype=np.int32))
    swapper.swap_out(pool, np.arange(1, 6, dtype=np.int32))
    assert (swapper.out.blocks, swapper.out.bytes) == (75, 75 * BLOCK_BYTES)
    assert (swapper.back.blocks, swapper.back.seconds) == (0, 0.0)
    swapper.swap_in(pool, contents, np.array([4, 5], np.int32), np.array([9, 8], np.int32))
    assert (swapper.back.blocks, swapper.back.bytes) == (2, 2 * BLOCK_BYTES)
    assert min(swapper.out.seconds, swapper.back.seconds) > 0
