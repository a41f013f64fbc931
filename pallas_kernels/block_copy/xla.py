"""Moves of whole blocks in plain XLA."""

import jax
from jax import lax


def copy_blocks(pool, sources: jax.Array, destinations: jax.Array, count: jax.Array):
    """See `api.copy_blocks`. Each layer by itself, so that whoever compiles for CPU can compile one layer's for all."""
    return jax.tree.map(lambda kv: _copy_blocks_of_layer(kv, sources, destinations, count), pool)


@jax.jit
def _copy_blocks_of_layer(kv: jax.Array, sources: jax.Array, destinations: jax.Array, count: jax.Array) -> jax.Array:
    """A loop that runs `count` times, because a scatter would always move all N."""

    def copy(i, kv):
        return lax.dynamic_update_index_in_dim(kv, kv[sources[i]], destinations[i], 0)

    return lax.fori_loop(0, count, copy, kv)


def gather_blocks(pool, blocks: jax.Array):
    """See `api.gather_blocks`."""
    return jax.tree.map(lambda kv: kv[blocks], pool)


def scatter_blocks(pool, blocks: jax.Array, contents):
    """See `api.scatter_blocks`."""
    return jax.tree.map(lambda kv, new: kv.at[blocks].set(new), pool, contents)
