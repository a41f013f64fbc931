"""Every implementation of paged attention against the gather oracle, on shapes chosen to hit every mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import paged_decode_attention, paged_prefill_attention, pool_shape, write_kv
from pallas_kernels.paged_attention.reference import paged_attention

# rows, query heads, KV heads, head size, block size, table width, sliding window, soft cap
CASES = {
    "smollm2": (5, 9, 3, 64, 16, 23, None, None),
    "one row": (1, 4, 4, 16, 16, 7, None, None),
    "soft cap": (3, 4, 2, 80, 16, 5, None, 5.0),
    "MQA, window": (8, 8, 1, 33, 8, 12, 9, None),
    "all at once": (17, 6, 2, 16, 4, 40, 21, 20.0),
    "table of one": (3, 9, 3, 64, 16, 1, None, None),
    "more rows than a group": (40, 3, 3, 24, 8, 9, None, None),
    "window of one": (6, 4, 2, 16, 8, 6, 1, None),
}


def make(case, dtype=jnp.float32, seed=0):
    """A pool of noise, tables without shared blocks, and lengths at every edge: 0, 1, block - 1, block, block + 1, full."""
    rows, heads, kv_heads, size, block, width, window, cap = CASES[case]
    rng = np.random.default_rng(seed)
    count = rows * width + 1
    kv = jnp.asarray(rng.standard_normal(pool_shape(count, block, kv_heads, size)), dtype)
    tables = 1 + rng.permutation(count - 1).reshape(rows, width).astype(np.int32)
    edges = [width * block, 1, block - 1, block, min(block + 1, width * block), 0]
    lengths = np.array(
        [edges[i] if i < len(edges) else rng.integers(0, width * block + 1) for i in range(rows)], np.int32
    )
    for row, length in enumerate(lengths):
        tables[row, -(-length // block) :] = 0  # entries beyond the length are the null block
    options = {"scale": size**-0.5, "sliding_window": window, "logit_soft_cap": cap}
    return rng, kv, jnp.asarray(tables), lengths, heads, options


@pytest.mark.parametrize("case", CASES)
def test_decode(case):
    rng, kv, tables, lengths, heads, options = make(case)
    q = jnp.asarray(rng.standard_normal((len(lengths), heads, kv.shape[-1])), jnp.float32)
    got = jax.jit(lambda *args: paged_decode_attention(*args, **options))(q, kv, tables, lengths)
    expected = paged_attention(q[:, None], kv, tables, lengths - 1, (lengths > 0).astype(np.int32), **options)[:, 0]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert not np.asarray(got)[lengths == 0].any(), "padding gives zeros"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", [1, 5, 16])
def test_prefill(case, tile):
    rng, kv, tables, ends, heads, options = make(case)
    starts = np.maximum(ends - tile, 0).astype(np.int32)
    lengths = (ends - starts).astype(np.int32)  # from 0 to a full tile
    q = jnp.asarray(rng.standard_normal((len(ends), tile, heads, kv.shape[-1])), jnp.float32)
    got = jax.jit(lambda *args: paged_prefill_attention(*args, **options))(q, kv, tables, starts, lengths)
    expected = paged_attention(q, kv, tables, starts, lengths, **options)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_bfloat16_pool():
    rng, kv, tables, lengths, heads, options = make("smollm2", jnp.bfloat16)
    q = jnp.asarray(rng.standard_normal((len(lengths), heads, kv.shape[-1])), jnp.bfloat16)
    got = paged_decode_attention(q, kv, tables, lengths, **options)
    assert got.dtype == jnp.bfloat16
    expected = paged_attention(q[:, None], kv, tables, lengths - 1, (lengths > 0).astype(np.int32), **options)[:, 0]
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=2e-2)


def test_the_null_block_is_never_read():
    """Whatever padding wrote there: a row's result does not feel it."""
    rng, kv, tables, lengths, heads, options = make("smollm2")
    q = jnp.asarray(rng.standard_normal((len(lengths), heads, kv.shape[-1])), jnp.float32)
    one = paged_decode_attention(q, kv, tables, lengths, **options)
    other = paged_decode_attention(q, kv.at[0].set(7.0), tables, lengths, **options)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_write_kv(count):
    rng, kv, *_ = make("smollm2")
    blocks, _, kv_heads, block, size = kv.shape
    k = rng.standard_normal((count, kv_heads, size)).astype(np.float32)
    slots = (block + rng.permutation((blocks - 1) * block)[:count]).astype(np.int32)
    got = np.asarray(jax.jit(write_kv)(kv, k, k + 1, slots))
    expected = np.array(kv)
    for i, slot in enumerate(slots):
        expected[slot // block, 0, :, slot % block] = k[i]
        expected[slot // block, 1, :, slot % block] = k[i] + 1
    np.testing.assert_array_equal(got[1:], expected[1:])  # the null block may hold anything
