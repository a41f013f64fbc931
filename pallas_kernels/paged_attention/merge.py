"""Partial results of a row, weighed and summed in XLA: what flash-decoding ends with where no kernel does it."""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.softcap import LOG2_E
from pallas_kernels.paged_attention.splits import Splits

LOWEST = -1e30
"""Where a running maximum starts: finite, so that what sees nothing gives zeros and no NaN."""


def merge_items(
    sums: jax.Array,
    high: jax.Array,
    total: jax.Array,
    splits: Splits,
    most: int,
    lengths: jax.Array,
    sinks: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Results of rows from those of the items that `plan_splits` cut them into.

    A scatter would add a row's items in any order. Here each item takes in its neighbour, then what is two items
    before, then four: how a row is summed depends on nothing but the number of its own items.

    Args:
      sums: float32 [N, Hkv, G, D]: values weighed by exp2(score - high), not normalised.
      high, total: float32 [N, Hkv, G]: the largest score, in units of log2, and the sum of exp2(score - high).
      most: items that a row may have.
      lengths: int32 [R]: of rows; 0 marks padding.
      sinks: [Hkv * G]: each head's score that has no value.

    Returns: float32 [R, Hkv * G, D], and the log-sum-exp [R, Hkv * G], -inf for padding.
    """
    rows, heads = lengths.shape[0], high.shape[1] * high.shape[2]
    state, distance = (high, total, sums), 1
    while distance < most:
        before = jax.tree.map(lambda x, by=distance: jnp.roll(x, by, axis=0), state)
        has_one = (splits.items[:, 3] >= distance)[:, None, None]
        merged = _merge(before, state)
        state = jax.tree.map(lambda new, old, mask=has_one: _where(mask, new, old), merged, state)
        distance *= 2
    high, total, sums = jax.tree.map(lambda x: x[splits.rows.sum(axis=1) - 1], state)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(high.shape[1:]) * LOG2_E, high.shape)
        high, total, sums = _merge((high, total, sums), (sink, jnp.ones_like(total), jnp.zeros_like(sums)))
    safe = jnp.maximum(total, 1e-37)
    lse = ((high + jnp.log2(safe)) / LOG2_E).reshape(rows, heads)
    return (sums / safe[..., None]).reshape(rows, heads, -1), jnp.where(lengths[:, None] > 0, lse, -jnp.inf)


def _merge(a: tuple, b: tuple) -> tuple:
    """Two online softmaxes as one: (maximum, sum, output)."""
    high = jnp.maximum(a[0], b[0])
    of_a, of_b = jnp.exp2(a[0] - high), jnp.exp2(b[0] - high)
    return high, a[1] * of_a + b[1] * of_b, a[2] * of_a[..., None] + b[2] * of_b[..., None]


def _where(mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(mask.reshape(mask.shape[:1] + (1,) * (new.ndim - 1)), new, old)
