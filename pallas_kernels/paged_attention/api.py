"""Paged attention: one function per operation, whatever platform implements it.

A layer's pool is one array [num_blocks, 2, Hkv, block_size, D]: a block holds `block_size` tokens, its keys at [:, 0]
and its values at [:, 1], so that copying or swapping a block moves one contiguous run. Block 0 is the null block:
padding writes there, and nothing that matters reads it.
"""

import jax

from pallas_kernels.paged_attention import xla


def pool_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Shape of one layer's pool."""
    return (num_blocks, 2, num_kv_heads, block_size, head_dim)


def write_kv(kv: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> jax.Array:
    """Writes the keys and values of T tokens to their slots.

    Args:
      kv: [num_blocks, 2, Hkv, block_size, D]; updated in place where it is donated.
      k, v: [T, Hkv, D].
      slots: int32 [T]: block * block_size + offset. Slots may repeat in the null block only.

    Returns: the layer's pool.
    """
    return xla.write_kv(kv, k, v, slots)


def paged_decode_attention(
    q: jax.Array,
    kv: jax.Array,
    block_tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
) -> jax.Array:
    """Attention of one query per row over the row's cached tokens (paper, section 4.1).

    Args:
      q: [R, Hq, D]; Hq is a multiple of the pool's Hkv.
      kv: [num_blocks, 2, Hkv, block_size, D].
      block_tables: int32 [R, W]: logical to physical blocks.
      lengths: int32 [R]: cached tokens to attend to, the query's own included. 0 marks padding and gives zeros.
      scale: factor on the scores, usually D ** -0.5.
      sliding_window: attend to the last so many tokens only.
      logit_soft_cap: scores become cap * tanh(score / cap).

    Returns: [R, Hq, D], q's dtype. Sums are float32.
    """
    return xla.paged_decode_attention(
        q, kv, block_tables, lengths, scale=scale, sliding_window=sliding_window, logit_soft_cap=logit_soft_cap
    )


def paged_prefill_attention(
    q: jax.Array,
    kv: jax.Array,
    block_tables: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
) -> jax.Array:
    """Causal attention of tiles of consecutive queries, whose own keys and values are in the pool already.

    Args:
      q: [P, C, Hq, D]: tile p holds the queries at positions starts[p], starts[p] + 1, ...
      block_tables: int32 [P, W].
      starts: int32 [P].
      lengths: int32 [P]: real queries of each tile; the rest of the C gives zeros.
      kv, scale, sliding_window, logit_soft_cap: as in `paged_decode_attention`.

    Returns: [P, C, Hq, D], q's dtype.
    """
    return xla.paged_prefill_attention(
        q, kv, block_tables, starts, lengths, scale=scale, sliding_window=sliding_window, logit_soft_cap=logit_soft_cap
    )
