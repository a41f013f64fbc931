"""Moves of whole blocks against NumPy."""

import jax
import numpy as np
import pytest

from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks

NUM_BLOCKS, SHAPE = 12, (2, 3, 4, 5)


def pool_and_values(dtype=np.float32, layers=3):
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(NUM_BLOCKS, *SHAPE)).astype(dtype) for _ in range(layers)]
    return tuple(jax.numpy.asarray(v) for v in values), [v.copy() for v in values]


copy = jax.jit(copy_blocks, donate_argnums=0)


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_copy(count):
    """Only the first `count` are real; what stands behind them is not even looked at."""
    pool, expected = pool_and_values()
    sources = np.array([4, 4, 9, 1, 4], np.int32)  # one block may have many copies
    destinations = np.array([2, 3, 5, 7, 11], np.int32)
    for layer in expected:
        layer[destinations[:count]] = layer[sources[:count]]
    pointers = [layer.unsafe_buffer_pointer() for layer in pool]
    pool = copy(pool, sources, destinations, np.int32(count))
    assert [layer.unsafe_buffer_pointer() for layer in pool] == pointers, "in place"
    for layer, values in zip(pool, expected, strict=True):
        np.testing.assert_array_equal(layer, values)


def test_copy_of_a_bfloat16_pool():
    pool, _ = pool_and_values(jax.numpy.bfloat16)
    before = [np.asarray(layer[3]) for layer in pool]
    pool = copy(pool, np.array([3], np.int32), np.array([8], np.int32), np.int32(1))
    for layer, values in zip(pool, before, strict=True):
        np.testing.assert_array_equal(np.asarray(layer[8]), values)


def test_gather_and_scatter():
    pool, expected = pool_and_values()
    blocks = np.array([5, 2, 9, 0, 0], np.int32)
    contents = jax.jit(gather_blocks)(pool, blocks)
    for layer, values in zip(contents, expected, strict=True):
        np.testing.assert_array_equal(layer, values[blocks])
    targets = np.array([1, 11, 2, 0, 0], np.int32)
    pool = jax.jit(scatter_blocks)(pool, targets, contents)
    for layer, values in zip(pool, expected, strict=True):
        values[targets[:3]] = values[blocks[:3]]
        np.testing.assert_array_equal(layer[1:], values[1:])
