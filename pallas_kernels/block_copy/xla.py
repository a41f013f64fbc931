"""Moves of whole blocks in plain XLA."""

import jax
from jax import lax


def copy_blocks(pool, sources: jax.Array, destinations: jax.Array, count: jax.Array):
    """See `api.copy_blocks`. A loop that runs `count` times, because a scatter would always move all N."""

    def copy(i, pool):
        return jax.tree.map(lambda kv: lax.dynamic_update_index_in_dim(kv, kv[sources[i]], destinations[i], 0), pool)

    return lax.fori_loop(0, count, copy, pool)


def gather_blocks(pool, blocks: jax.Array):
    """See `api.gather_blocks`."""
    return jax.tree.map(lambda kv: kv[blocks], pool)


def scatter_blocks(pool, blocks: jax.Array, contents):
    """See `api.scatter_blocks`."""
    return jax.tree.map(lambda kv, new: kv.at[blocks].set(new), pool, contents)
