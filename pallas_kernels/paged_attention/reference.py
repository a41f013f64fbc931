"""The test oracle, in NumPy and float64: gather contexts through the block tables, mask, softmax. Clear, and slow.

A layer's pool is [num_blocks, 2, Hkv, block_size, D]; [:, 0] are keys, [:, 1] are values; with one part, both are.
"""

import numpy as np


def paged_attention(
    q,  # [N, C, Hq, D]: C consecutive queries of each of N rows
    kv,  # [num_blocks, 2 or 1, Hkv, block_size, D]
    tables,  # int [N, W]
    starts,  # int [N]: position of the first query
    lengths,  # int [N]: real queries; the others give zeros, and -inf for the log of their sum
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks=None,  # [Hq]
) -> tuple[np.ndarray, np.ndarray]:  # float64 [N, C, Hq, D] and log-sum-exp [N, C, Hq]
    q, kv = np.asarray(q).astype(np.float64), np.asarray(kv).astype(np.float64)
    starts, lengths = np.asarray(starts), np.asarray(lengths)
    n, c, heads, size = q.shape
    gathered = kv[np.asarray(tables)].transpose(2, 0, 1, 4, 3, 5)  # [2 or 1, N, W, block_size, Hkv, D]
    gathered = gathered.reshape(kv.shape[1], n, -1, kv.shape[2], size)
    keys, values = gathered[0], gathered[-1]  # [N, S, Hkv, D] each
    scores = np.einsum("nckgd,nskd->nckgs", q.reshape(n, c, kv.shape[2], -1, size), keys) * scale
    if logit_soft_cap is not None:
        scores = logit_soft_cap * np.tanh(scores / logit_soft_cap)
    query = starts[:, None] + np.arange(c)  # [N, C] positions
    distance = query[:, :, None] - np.arange(keys.shape[1])  # [N, C, S]
    asked = np.arange(c) < lengths[:, None]  # [N, C]
    seen = (distance >= 0) & asked[:, :, None]
    if sliding_window is not None:
        seen &= distance < sliding_window
    seen = seen[:, :, None, None]
    sink = np.full(heads, -np.inf) if sinks is None else np.asarray(sinks).astype(np.float64)
    sink = sink.reshape(kv.shape[2], -1)  # [Hkv, G]
    high = np.maximum(np.max(scores, -1, where=seen, initial=-1e30), sink)
    weights = np.exp(np.where(seen, scores, -np.inf) - high[..., None])
    total = weights.sum(-1) + np.exp(sink - high)
    with np.errstate(divide="ignore"):
        lse = np.where(asked[..., None, None], high + np.log(total), -np.inf)
    out = np.einsum("nckgs,nskd->nckgd", weights / np.maximum(total, 1e-300)[..., None], values)
    return out.reshape(q.shape), lse.reshape(n, c, heads)
