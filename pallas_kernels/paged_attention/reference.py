"""The test oracle: gather whole contexts through the block tables, mask, softmax. Clear, and slow.

A layer's pool is [num_blocks, 2, Hkv, block_size, D]; [:, 0] are keys, [:, 1] are values.
"""

import jax
import jax.numpy as jnp


def paged_attention(
    q: jax.Array,  # [N, C, Hq, D]: C consecutive queries of each of N rows
    kv: jax.Array,  # [num_blocks, 2, Hkv, block_size, D]
    tables: jax.Array,  # int32 [N, W]
    starts: jax.Array,  # int32 [N]: position of the first query
    lengths: jax.Array,  # int32 [N]: real queries; the others give zeros
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
) -> jax.Array:  # [N, C, Hq, D]
    n, c, heads, size = q.shape
    gathered = kv[tables].transpose(2, 0, 1, 4, 3, 5)  # [2, N, W, block_size, Hkv, D]
    keys, values = gathered.reshape(2, n, -1, kv.shape[2], size)  # [N, S, Hkv, D] each
    grouped = q.reshape(n, c, kv.shape[2], -1, size).astype(jnp.float32)
    scores = jnp.einsum("nckgd,nskd->nkgcs", grouped, keys.astype(jnp.float32)) * scale
    if logit_soft_cap is not None:
        scores = logit_soft_cap * jnp.tanh(scores / logit_soft_cap)
    query = starts[:, None] + jnp.arange(c)  # [N, C] positions
    distance = query[:, :, None] - jnp.arange(keys.shape[1])  # [N, C, S]
    seen = (distance >= 0) & (jnp.arange(c) < lengths[:, None])[:, :, None]
    if sliding_window is not None:
        seen &= distance < sliding_window
    seen = seen[:, None, None]
    weights = jnp.where(seen, jnp.exp(scores - jnp.max(scores, -1, keepdims=True, where=seen, initial=-1e30)), 0.0)
    weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    out = jnp.einsum("nkgcs,nskd->nckgd", weights, values.astype(jnp.float32))
    return out.reshape(n, c, heads, size).astype(q.dtype)
