"""Partial results of a row, weighed and summed in XLA: what flash-decoding ends with where no kernel does it."""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.softcap import LOG2_E

LOWEST = -1e30
"""Where a running maximum starts: finite, so that what sees nothing gives zeros and no NaN."""


def merge_items(
    sums: jax.Array, high: jax.Array, total: jax.Array, owners: jax.Array, lengths: jax.Array, sinks: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Results of rows from those of the items that `plan_splits` cut them into.

    Args:
      sums: float32 [N, Hkv, G, D]: values weighed by exp2(score - high), not normalised.
      high, total: float32 [N, Hkv, G]: the largest score, in units of log2, and the sum of exp2(score - high).
      owners: int32 [N]: each item's row; -1: nobody's.
      lengths: int32 [R]: of rows; 0 marks padding.
      sinks: [Hkv * G]: each head's score that has no value.

    Returns: float32 [R, Hkv * G, D], and the log-sum-exp [R, Hkv * G], -inf for padding.
    """
    rows, heads = lengths.shape[0], high.shape[1] * high.shape[2]
    owners = jnp.where(owners < 0, rows, owners)
    highest = jnp.maximum(jax.ops.segment_max(high, owners, rows + 1), LOWEST)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(high.shape[1:]) * LOG2_E
        highest = jnp.maximum(highest, sink)
    shrink = jnp.where(total > 0, jnp.exp2(high - highest[owners]), 0.0)
    total = jax.ops.segment_sum(total * shrink, owners, rows + 1)
    if sinks is not None:
        total = total + jnp.exp2(sink - highest)
    out = jax.ops.segment_sum(sums * shrink[..., None], owners, rows + 1)
    safe = jnp.maximum(total, 1e-37)
    out = (out / safe[..., None])[:rows].reshape(rows, heads, -1)
    lse = ((highest + jnp.log2(safe)) / LOG2_E)[:rows].reshape(rows, heads)
    return out, jnp.where(lengths[:, None] > 0, lse, -jnp.inf)
