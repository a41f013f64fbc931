"""Moves of whole blocks against NumPy: every implementation, pools of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.paged_attention import QuantizedKV

NUM_BLOCKS = 12
POOLS = {  # shapes and dtypes of a layer's arrays
    "float32": [((2, 3, 4, 5), "float32")],
    "bfloat16, two programs": [((2, 3, 16, 40), "bfloat16")],
    "int8 with scales": [((2, 3, 4, 16), "int8"), ((2, 3, 4), "float32")],
    "e4m3 with scales": [((2, 2, 8, 24), "float8_e4m3fn"), ((2, 2, 8), "float32")],
}
RUNS = [(pool, implementation) for pool in POOLS for implementation in ("xla", "triton")]


def pool_and_values(kind, layers=3):
    """A pool of noise, and the same as NumPy arrays."""
    rng = np.random.default_rng(0)
    pool = []
    for _ in range(layers):
        arrays = [jnp.asarray(10 * rng.normal(size=(NUM_BLOCKS, *shape)), dtype) for shape, dtype in POOLS[kind]]
        pool.append(arrays[0] if len(arrays) == 1 else QuantizedKV(*arrays))
    return tuple(pool), [np.array(leaf) for leaf in jax.tree.leaves(pool)]


@pytest.mark.parametrize(("kind", "implementation"), RUNS)
def test_copy(kind, implementation):
    """Only the first `count` are real; what stands behind them is not even looked at."""
    copy = jax.jit(functools.partial(copy_blocks, implementation=implementation), donate_argnums=0)
    sources = np.array([4, 4, 9, 1, 4], np.int32)  # one block may have many copies
    destinations = np.array([2, 3, 5, 7, 11], np.int32)
    for count in (0, 3, 5):
        pool, expected = pool_and_values(kind)
        for values in expected:
            values[destinations[:count]] = values[sources[:count]]
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(pool)]
        pool = copy(pool, sources, destinations, np.int32(count))
        # With jax 0.11, XLA:CPU copies pools of narrower floats.
        in_place = jax.__version_info__ >= (0, 12) or all(leaf.dtype.itemsize == 4 for leaf in jax.tree.leaves(pool))
        if implementation == "xla" and in_place:
            assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(pool)] == pointers, "in place"
        for leaf, values in zip(jax.tree.leaves(pool), expected, strict=True):
            np.testing.assert_array_equal(leaf, values)


@pytest.mark.parametrize(("kind", "implementation"), RUNS)
def test_gather_and_scatter(kind, implementation):
    pool, expected = pool_and_values(kind)
    blocks = np.array([5, 2, 9, 0, 0], np.int32)
    contents = jax.jit(functools.partial(gather_blocks, implementation=implementation))(pool, blocks)
    assert jax.tree.structure(contents) == jax.tree.structure(pool)
    for leaf, values in zip(jax.tree.leaves(contents), expected, strict=True):
        np.testing.assert_array_equal(leaf, values[blocks])
    targets = np.array([1, 11, 2, 0, 0], np.int32)
    pool = jax.jit(functools.partial(scatter_blocks, implementation=implementation))(pool, targets, contents)
    for leaf, values in zip(jax.tree.leaves(pool), expected, strict=True):
        values[targets[:3]] = values[blocks[:3]]
        np.testing.assert_array_equal(leaf[1:], values[1:])


def test_an_implementation_that_is_not_there():
    pool, _ = pool_and_values("float32")
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        gather_blocks(pool, np.array([1], np.int32), implementation="cuda")
