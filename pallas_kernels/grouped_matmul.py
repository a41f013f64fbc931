"""Grouped matmul: runs of rows, each multiplied with a matrix of its own. The heart of a mixture of experts.

`jax.lax.ragged_dot` says exactly this, and compiles to it where XLA knows how. XLA:CPU does not: it multiplies all rows
with all matrices and masks. There, a loop over tiles of rows reads only the matrices that have rows.
"""

import jax
import jax.numpy as jnp
from jax import lax

_MIN_TILE, _MAX_TILE = 8, 128  # rows of a product: few enough for small groups, enough to be worth a matrix


@jax.custom_vjp
def grouped_matmul(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """The first sizes[0] rows times weights[0], the next sizes[1] rows times weights[1], and so on.

    Args:
      x: [N, A], sorted by group.
      weights: [G, A, B].
      sizes: int32 [G], adding up to N. Groups may be empty.

    Returns: [N, B], x's dtype. Sums are float32.
    """
    return lax.platform_dependent(x, weights, sizes, cpu=_tiles, default=_ragged)


def _ragged(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, weights, sizes, preferred_element_type=jnp.float32).astype(x.dtype)


def _tiles(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """A tile that reaches past its group writes rows of the next ones, which come later and write them again."""
    rows, groups = x.shape[0], weights.shape[0]
    tile = min(max(_MIN_TILE, 1 << (rows // groups).bit_length()), _MAX_TILE)
    ends = jnp.cumsum(sizes)
    last_tiles = jnp.cumsum(-(-sizes // tile))  # [G]: tiles up to and including a group's
    x = jnp.pad(x, ((0, tile), (0, 0)))

    def body(index, out):
        group = jnp.searchsorted(last_tiles, index, side="right")
        before = last_tiles[group] - -(-sizes[group] // tile)
        start = ends[group] - sizes[group] + (index - before) * tile
        part = lax.dynamic_slice_in_dim(x, start, tile)
        weight = lax.dynamic_index_in_dim(weights, group, keepdims=False)
        new = jnp.dot(part, weight, preferred_element_type=jnp.float32).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(out, new, start, axis=0)

    out = jnp.zeros((rows + tile, weights.shape[2]), x.dtype)
    return lax.fori_loop(0, last_tiles[-1], body, out)[:rows]


def _forward(x: jax.Array, weights: jax.Array, sizes: jax.Array):
    return grouped_matmul(x, weights, sizes), (x, weights, sizes)


def _backward(saved, gradient: jax.Array):
    x, weights, sizes = saved
    _, pullback = jax.vjp(lambda x, weights: _ragged(x, weights, sizes), x, weights)
    return *pullback(gradient), None


grouped_matmul.defvjp(_forward, _backward)
