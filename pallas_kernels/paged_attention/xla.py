"""Paged attention in plain XLA: the CPU path, and the fallback everywhere else.

A layer's pool is `[blocks, 2, kv_heads, block_size, head_dim]`: K and V of a block lie together, and each (block, K or V) is one contiguous
run, which is what XLA's gather copies fast. Cost follows the real lengths: rows are sorted by length, taken in small groups, and each
group loops over chunks of the block table only as far as its own longest row, with an online softmax.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

NEG_INF = -1e30  # finite, so that rows with nothing to attend to give zeros, not NaN


def write_kv(kv_pool, k, v, slots):
    """Write k, v [T, Hkv, D] at slots [T] (block * block_size + offset); in place where kv_pool is donated."""
    block_size = kv_pool.shape[3]
    if slots.shape[0] == 1:  # XLA:CPU copies the whole pool for a scatter of one row: write the null block too
        k, v, slots = (jnp.concatenate([x, jnp.zeros_like(x)]) for x in (k, v, slots))
    return kv_pool.at[slots // block_size, :, :, slots % block_size].set(jnp.stack([k, v], axis=1).astype(kv_pool.dtype))


def paged_decode_attention(q, kv_pool, block_tables, context_lens, *, scale, sliding_window=None, logit_soft_cap=None,
                           group_rows=8, chunk_blocks=4):
    """One query token per row: q [R, Hq, D], block_tables [R, W], context_lens [R] (0: padding, gives zeros) -> [R, Hq, D]."""
    R, Hq, D = q.shape
    Hkv = kv_pool.shape[2]
    end = context_lens.astype(jnp.int32)[:, None]                                           # [R, 1]
    begin = jnp.zeros_like(end) if sliding_window is None else jnp.maximum(end - sliding_window, 0)
    out = _attend(q.reshape(R, Hkv, Hq // Hkv, D) * scale, kv_pool, block_tables, begin, end, logit_soft_cap=logit_soft_cap,
                  group_rows=group_rows, chunk_blocks=chunk_blocks)
    return out.reshape(R, Hq, D).astype(q.dtype)


def paged_prefill_attention(q, kv_pool, block_tables, start, lengths, *, scale, sliding_window=None, logit_soft_cap=None,
                            group_rows=1, chunk_blocks=8):
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
                  group_rows=group_rows, chunk_blocks=chunk_blocks)
    out = out.reshape(P, Hkv, G, Tq, D).transpose(0, 3, 1, 2, 4)
    return out.reshape(P, Tq, Hq, D).astype(kv_pool.dtype)


def _attend(q, kv_pool, tables, begin, end, *, logit_soft_cap, group_rows, chunk_blocks):
    """q [R, Hkv, M, D] (scaled), begin/end [R, M or 1]: each query sees positions begin <= p < end of its row -> [R, Hkv, M, D]."""
    R = q.shape[0]
    rows = min(group_rows, R)
    pad = -R % rows
    order = jnp.argsort(-jnp.pad(end.max(-1), (0, pad), constant_values=-1))                # longest first; padding rows last
    order_clipped = jnp.minimum(order, R - 1)
    width = -(-tables.shape[1] // chunk_blocks) * chunk_blocks
    tables = jnp.pad(tables, ((0, 0), (0, width - tables.shape[1])))
    real = (order < R)[:, None]
    parts = (q[order_clipped], tables[order_clipped], begin[order_clipped], jnp.where(real, end[order_clipped], 0))
    parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), parts)
    loop = functools.partial(_online_softmax, kv_pool=kv_pool, logit_soft_cap=logit_soft_cap, chunk_blocks=chunk_blocks)
    out = loop(*jax.tree.map(lambda x: x[0], parts)) if R + pad == rows else lax.map(lambda part: loop(*part), parts)
    return out.reshape(-1, *q.shape[1:])[jnp.argsort(order)[:R]]


def _online_softmax(q, tables, begin, end, *, kv_pool, logit_soft_cap, chunk_blocks):
    """One group of rows, chunk by chunk: q [n, Hkv, M, D], tables [n, W], begin/end [n, M or 1] -> [n, Hkv, M, D]."""
    n, Hkv, M, D = q.shape
    N, _, _, block_size, _ = kv_pool.shape
    halves = kv_pool.reshape(2 * N, Hkv * block_size * D)                                   # row 2b: K of block b, row 2b + 1: its V
    offsets = (jnp.arange(chunk_blocks)[:, None] * block_size + jnp.arange(block_size))[:, None, None, :]   # [c, 1, 1, b]
    begin, end = begin[:, None, None, :, None], end[:, None, None, :, None]                 # [n, 1, 1, M, 1]
    take = lambda index: jnp.take(halves, index, axis=0, mode="clip").reshape(n, chunk_blocks, Hkv, block_size, D)

    def body(carry):
        chunk, m, l, acc = carry
        block = 2 * lax.dynamic_slice_in_dim(tables, chunk * chunk_blocks, chunk_blocks, axis=1)
        s = jnp.einsum("nhmd,nchbd->nchmb", q, take(block).astype(q.dtype), preferred_element_type=jnp.float32)
        if logit_soft_cap is not None:
            s = jnp.tanh(s / logit_soft_cap) * logit_soft_cap
        position = chunk * chunk_blocks * block_size + offsets
        visible = (position < end) & (position >= begin)                                    # [n, c, 1, M, b]
        s = jnp.where(visible, s, NEG_INF)
        m_new = jnp.maximum(m, s.max((1, 4)))
        p = jnp.where(visible, jnp.exp(s - m_new[:, None, :, :, None]), 0)
        alpha = jnp.exp(m - m_new)
        pv = jnp.einsum("nchmb,nchbd->nhmd", p.astype(q.dtype), take(block + 1).astype(q.dtype), preferred_element_type=jnp.float32)
        return chunk + 1, m_new, l * alpha + p.sum((1, 4)), acc * alpha[..., None] + pv

    span = chunk_blocks * block_size
    first = jnp.where(end > 0, begin, 2**30).min() // span                                  # sliding windows skip what nobody sees
    init = (jnp.minimum(first, end.max() // span).astype(jnp.int32), jnp.full((n, Hkv, M), NEG_INF, jnp.float32),
            jnp.zeros((n, Hkv, M), jnp.float32), jnp.zeros((n, Hkv, M, D), jnp.float32))
    _, _, l, acc = lax.while_loop(lambda carry: carry[0] * span < end.max(), body, init)
    return acc / jnp.maximum(l, 1e-30)[..., None]
