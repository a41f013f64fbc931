"""Arguments of paged attention, made on the device and large where they are measured."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import pool_shape

BLOCK_SIZE = 16


def noise_pool(num_bytes: int, kv_heads: int, head_size: int, dtype) -> jax.Array:
    """A layer's pool of about so many bytes. A repeated pattern of noise: zeros would let the GPU clock higher."""
    block_bytes = 2 * kv_heads * BLOCK_SIZE * head_size * jnp.dtype(dtype).itemsize
    repeats = max(num_bytes // (block_bytes * 32), 2)

    @jax.jit
    def make():
        pattern = jax.random.normal(jax.random.key(0), pool_shape(32, BLOCK_SIZE, kv_heads, head_size), dtype)
        return jnp.tile(pattern, (repeats, 1, 1, 1, 1))

    return make()


def scattered_tables(rows: int, context: int, num_blocks: int, copies: int, seed: int = 0) -> np.ndarray:
    """int32 [copies, rows, W]: block tables without a common block, in random order, as after a long time of use.

    Raises:
      ValueError: the pool has too few blocks.
    """
    width = -(-context // BLOCK_SIZE)
    if copies * rows * width > num_blocks - 1:
        raise ValueError(f"{copies * rows * width} blocks of a pool of {num_blocks}")
    order = 1 + np.random.default_rng(seed).permutation(num_blocks - 1)[: copies * rows * width]
    return order.reshape(copies, rows, width).astype(np.int32)
