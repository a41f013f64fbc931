"""Paged attention in plain XLA: the CPU path, and the fallback everywhere else.

A layer's pool is `[blocks, 2, kv_heads, block_size, head_dim]`: K and V of a block lie together, and each (block, K or V) is one contiguous
run, which is what XLA's gather copies fast. Cost follows the real lengths: rows are sorted by length, taken in small groups, and each
group loops over chunks of the block table only as far as its own longest row, with an online softmax.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

NEG_INF = -1e30  # where the running maximum starts: finite, so that a row that sees nothing gives zeros, not NaN


def write_kv(kv_pool, k, v, slots):
    """Write k, v [T, Hkv, D] at slots [T] (block * block_size + offset); in place where kv_pool is donated."""
    if slots.shape[0] == 1:  # XLA:CPU copies the whole pool for a scatter of one row: write the null block too
        k, v, slots = (jnp.concatenate([x, jnp.zeros_like(x)]) for x in (k, v, slots))
    block_size = kv_pool.shape[3]
    return kv_pool.at[slots // block_size, :, :, slots % block_size].set(jnp.stack([k, v], axis=1).astype(kv_pool.dtype))


def paged_decode_attention(q, kv_pool, block_tables, context_lens, *, scale, sliding_window=None, logit_soft_cap=None,
                           group_rows=8, chunk_blocks=4):
    """One query token per row: q [R, Hq, D], block_tables [R, W], context_lens [R] (0: padding, gives zeros) -> [R, Hq, D]."""
    R, Hq, D = q.shape
    Hkv = kv_pool.shape[2]
    end = context_lens.astype(jnp.int32)[:, None]                                           # [R, 1]
    begin = jnp.zeros_like(end) if sliding_window is None else jnp.maximum(end - sliding_window, 0)
    out = _attend(q.reshape(R, Hkv, Hq // Hkv, D) * scale, kv_pool, block_tables, begin, end, logit_soft_cap=logit_soft_cap,
                  group_rows=group_rows, chunk_blocks=chunk_blocks, parts=chunk_blocks)
    return out.reshape(R, Hq, D).astype(q.dtype)


def paged_prefill_attention(q, kv_pool, block_tables, start, lengths, *, scale, sliding_window=None, logit_soft_cap=None,
                            chunk_blocks=8):
    """Tiles of query tokens: q [P, Tq, Hq, D] at positions start + [0, lengths) of block_tables [P, W] -> [P, Tq, Hq, D].

    Each token attends to all cached positions up to its own. Tokens past `lengths` give zeros.
    """
    P, Tq, Hq, D = q.shape
    Hkv = kv_pool.shape[2]
    G = Hq // Hkv
    t = jnp.arange(Tq, dtype=jnp.int32)
    end = jnp.where(t < lengths[:, None], start[:, None] + t + 1, 0)                        # [P, Tq]
    begin = jnp.zeros_like(end) if sliding_window is None else jnp.maximum(end - sliding_window, 0)
    q = q.reshape(P, Tq, Hkv, G, D).transpose(0, 2, 3, 1, 4).reshape(P, Hkv, G * Tq, D)
    out = _attend(q * scale, kv_pool, block_tables, jnp.tile(begin, (1, G)), jnp.tile(end, (1, G)), logit_soft_cap=logit_soft_cap,
                  group_rows=1, chunk_blocks=chunk_blocks, parts=1)
    out = out.reshape(P, Hkv, G, Tq, D).transpose(0, 3, 1, 2, 4)
    return out.reshape(P, Tq, Hq, D).astype(q.dtype)


def _attend(q, kv_pool, tables, begin, end, *, logit_soft_cap, group_rows, chunk_blocks, parts):
    """q [R, Hkv, M, D] (scaled), begin/end [R, M or 1]: each query sees positions begin <= p < end of its row -> [R, Hkv, M, D]."""
    R, W = tables.shape
    rows = min(group_rows, R)
    pad = -R % rows
    order = jnp.argsort(-jnp.pad(end.max(-1), (0, pad), constant_values=-1))                # longest first; made-up rows last
    tables = jnp.pad(tables, ((0, 0), (0, -W % chunk_blocks)))
    pick = lambda x: jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1))[order].reshape(-1, rows, *x.shape[1:])
    loop = functools.partial(_online_softmax, kv_pool, logit_soft_cap, chunk_blocks, parts)
    out = lax.map(lambda group: loop(*group), (pick(q), pick(tables), pick(begin), pick(end)))
    return out.reshape(R + pad, *q.shape[1:])[jnp.argsort(order)[:R]]


def _online_softmax(kv_pool, logit_soft_cap, chunk_blocks, parts, q, tables, begin, end):
    """One group of rows, chunk by chunk: q [n, Hkv, M, D], tables [n, W], begin/end [n, M or 1] -> [n, Hkv, M, D].

    A chunk is `parts` (s) batches of matrix products. With few queries a part is one block, which is used as it lies (no transpose);
    with many queries one part, the whole chunk, makes larger products. The barriers keep XLA from fusing the gather with a
    transpose (a memcpy per block becomes an element loop) and the exponential with broadcasts (which then is not vectorised).
    """
    n, Hkv, M, D = q.shape
    N, _, _, block_size, _ = kv_pool.shape
    span, per_part = chunk_blocks * block_size, chunk_blocks // parts * block_size
    halves = kv_pool.reshape(2 * N, -1)                                                     # row 2b: K of block b, row 2b + 1: its V
    begin, end = begin[:, None, None, :, None], end[:, None, None, :, None]                 # [n, 1, 1, M, 1]
    offsets = jnp.arange(span).reshape(parts, 1, 1, per_part)
    q = jnp.broadcast_to(q[:, None], (n, parts, Hkv, M, D)).reshape(-1, M, D)

    def take(index):                                                                        # [n, chunk_blocks] -> [n s Hkv, per_part, D]
        x = lax.optimization_barrier(jnp.take(halves, index.reshape(-1), axis=0, mode="clip"))
        x = x.reshape(n * parts, chunk_blocks // parts, Hkv, block_size, D).transpose(0, 2, 1, 3, 4)
        return x.reshape(-1, per_part, D).astype(q.dtype)

    def body(carry):
        chunk, m, l, acc = carry
        block = 2 * lax.dynamic_slice_in_dim(tables, chunk * chunk_blocks, chunk_blocks, axis=1)
        s = jnp.einsum("xmd,xkd->xmk", q, take(block), preferred_element_type=jnp.float32).reshape(n, parts, Hkv, M, per_part)
        if logit_soft_cap is not None:
            s = jnp.tanh(s / logit_soft_cap) * logit_soft_cap
        position = chunk * span + offsets
        s = jnp.where((position < end) & (position >= begin), s, -jnp.inf)                  # [n, s, Hkv, M, k]
        m_new = jnp.maximum(m, s.max((1, 4)))                                               # finite, as the first m is
        p = jnp.exp(lax.optimization_barrier(s - m_new[:, None, :, :, None]))
        alpha = jnp.exp(m - m_new)
        pv = jnp.einsum("xmk,xkd->xmd", p.reshape(-1, M, per_part).astype(q.dtype), take(block + 1), preferred_element_type=jnp.float32)
        pv = pv.reshape(n, parts, Hkv, M, D).sum(1)
        return chunk + 1, m_new, l * alpha + p.sum((1, 4)), acc * alpha[..., None] + pv

    last = end.max()
    first = jnp.minimum(jnp.where(end > 0, begin, last).min(), last) // span                # a sliding window skips what nobody sees
    carry = (first, jnp.full((n, Hkv, M), NEG_INF), jnp.zeros((n, Hkv, M)), jnp.zeros((n, Hkv, M, D)))
    _, _, l, acc = lax.while_loop(lambda carry: carry[0] * span < last, body, carry)
    return acc / jnp.maximum(l, 1e-30)[..., None]
