"""Paged attention in plain XLA: the CPU path, and the fallback everywhere else.

Cost follows the real lengths: rows are sorted by how much they have to read and taken in groups, and each group loops
over chunks of its rows' block tables only as often as the longest needs, with an online softmax (arXiv 1805.02867). One
chunk of one KV head is gathered as contiguous runs, so that what arrives is already the matrix that is multiplied.

The optimization barriers keep XLA:CPU from fusing the gather into a transpose (a memcpy per block would become a loop
over elements) and the exponential into a broadcast (which then is not vectorised).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.merge import LOWEST
from pallas_kernels.paged_attention.options import Options
from pallas_kernels.paged_attention.quantized import KV, QuantizedKV, pool_values, quantize
from pallas_kernels.paged_attention.shared import SharedPrefixes

CHUNK_BLOCKS = 8
"""Of a row, in one turn of the loop; fewer if more than 8 rows are read together."""
GATHERED_BLOCKS = 64
"""Of all those rows together, at most: their keys and values must stay in the second-level cache."""


class Seen(NamedTuple):
    """An online softmax on its way."""

    high: jax.Array  # float32 [n, Hkv, M]: largest score
    total: jax.Array  # float32 [n, Hkv, M]: sum of exp(score - high)
    out: jax.Array  # float32 [n, Hkv, M, D]: sum of exp(score - high) * value


def write_kv[Pool: KV](kv: Pool, k: jax.Array, v: jax.Array | None, slots: jax.Array) -> Pool:
    """See `api.write_kv`."""
    new = jnp.stack([k] if v is None else [k, v], axis=1)  # [T, 2 or 1, Hkv, D]
    if not isinstance(kv, QuantizedKV):
        return _write(kv, new, slots)  # type: ignore[return-value]  # the same type
    values, scales = quantize(new, kv.values.dtype)
    return type(kv)(_write(kv.values, values, slots), _write(kv.scales[..., None], scales[..., None], slots)[..., 0])


def _write(kv: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    if slots.shape[0] == 1:  # XLA:CPU copies the whole pool for a scatter of one row: write the null block too
        new, slots = (jnp.concatenate([x, jnp.zeros_like(x)]) for x in (new, slots))
    block_size = kv.shape[3]
    return kv.at[slots // block_size, :, :, slots % block_size].set(new.astype(kv.dtype))


def paged_decode_attention(
    q: jax.Array,
    kv: KV,
    tables: jax.Array,
    lengths: jax.Array,
    sinks: jax.Array | None,
    shared: SharedPrefixes | None,
    options: Options,
) -> Any:
    """See `api.paged_decode_attention`. There are no splits; how long chunks are depends on the number of rows."""
    rows, heads, size = q.shape
    kv_heads = pool_values(kv).shape[2]
    end = lengths.astype(jnp.int32)[:, None]  # [R, 1]
    q = q.reshape(rows, kv_heads, -1, size) * options.scale
    begin = _begin(end, options.window)
    seen = _nothing_seen(q, None if sinks is None else sinks.reshape(kv_heads, -1))
    if shared is not None:
        seen, begin = _attend_shared(q, kv, tables, begin, seen, shared, options)
    out, lse = _attend(q, kv, tables, begin, end, seen, options, 16 if rows >= 16 else 8)
    out = out.reshape(rows, heads, size).astype(q.dtype)
    return (out, lse.reshape(rows, heads)) if options.return_lse else out


def paged_prefill_attention(
    q: jax.Array,
    kv: KV,
    tables: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    sinks: jax.Array | None,
    options: Options,
) -> Any:
    """See `api.paged_prefill_attention`. A tile's queries of one KV head are stacked: [Hq / Hkv * C, D] a product."""
    tiles, c, heads, size = q.shape
    kv_heads = pool_values(kv).shape[2]
    group = heads // kv_heads
    offsets = jnp.arange(c, dtype=jnp.int32)
    end = jnp.where(offsets < lengths[:, None], starts[:, None] + offsets + 1, 0)  # [P, C]
    begin = _begin(end, options.window)
    stacked = q.reshape(tiles, c, kv_heads, group, size).transpose(0, 2, 3, 1, 4).reshape(tiles, kv_heads, -1, size)
    out, lse = _attend(
        stacked * options.scale,
        kv,
        tables,
        jnp.tile(begin, (1, group)),
        jnp.tile(end, (1, group)),
        _nothing_seen(stacked, None if sinks is None else jnp.repeat(sinks.reshape(kv_heads, group), c, axis=1)),
        options,
        max(1, 128 // c),
    )  # tiles together until products are worth two threads
    out = out.reshape(tiles, kv_heads, group, c, size).transpose(0, 3, 1, 2, 4)
    out = out.reshape(tiles, c, heads, size).astype(q.dtype)
    if not options.return_lse:
        return out
    return out, lse.reshape(tiles, kv_heads, group, c).transpose(0, 3, 1, 2).reshape(tiles, c, heads)


def _begin(end: jax.Array, window: int | None) -> jax.Array:
    return jnp.zeros_like(end) if window is None else jnp.maximum(end - window, 0)


def _nothing_seen(q: jax.Array, sinks: jax.Array | None) -> Seen:
    """Where the online softmax of queries [R, Hkv, M, D] starts; a sink [Hkv, M] is a score that has no value."""
    shape = q.shape[:-1]
    if sinks is None:
        return Seen(jnp.full(shape, LOWEST), jnp.zeros(shape), jnp.zeros(q.shape))
    return Seen(jnp.broadcast_to(sinks.astype(jnp.float32), shape), jnp.ones(shape), jnp.zeros(q.shape))


def _attend_shared(q, kv, tables, begin, seen, shared, options) -> tuple[Seen, jax.Array]:
    """Reads what rows share, once for all of them: their queries are stacked as if they were one row's.

    Returns: what the rows have seen, and where the rest of each begins ([R, 1]).
    """
    rows, kv_heads, m, _ = q.shape
    members = shared.rows.shape[1]
    # Padding reads and writes a row beyond the last.
    q, begin, seen = jax.tree.map(lambda x: jnp.pad(x, ((0, 1),) + ((0, 0),) * (x.ndim - 1)), (q, begin, seen))

    def stack(x):  # [S, Hkv, M, ...] -> [1, Hkv, S * M, ...]
        return jnp.swapaxes(x, 0, 1).reshape(1, kv_heads, members * m, *x.shape[3:])

    def unstack(x):
        return jnp.swapaxes(x.reshape(kv_heads, members, m, *x.shape[3:]), 0, 1)

    def body(carry):
        i, begin, seen = carry
        mine, length = shared.rows[i], shared.lengths[i]
        mine = jnp.where(mine < 0, rows, mine)
        piece = _online_softmax(
            kv,
            options,
            CHUNK_BLOCKS,
            stack(q[mine]),
            tables[mine[:1]],
            jnp.repeat(begin[mine, 0], m)[None],
            jnp.full((1, members * m), length),
            Seen(*(stack(x[mine]) for x in seen)),
        )
        seen = Seen(*(x.at[mine].set(unstack(new)) for x, new in zip(seen, piece, strict=True)))
        return i + 1, begin.at[mine, 0].max(length), seen

    count = (shared.lengths > 0).sum()  # those without padding come first
    _, begin, seen = lax.while_loop(lambda carry: carry[0] < count, body, (0, begin, seen))
    return jax.tree.map(lambda x: x[:rows], seen), begin[:rows]


def _attend(q, kv, tables, begin, end, seen, options, group_rows) -> tuple[jax.Array, jax.Array]:
    """Queries q [R, Hkv, M, D] see the positions begin <= p < end ([R, M or 1]) of their row, and what `seen` has.

    Returns: float32 like q, and the log of the sum of exponentials [R, Hkv, M].
    """
    rows = len(tables)
    taken = min(group_rows, rows)
    chunk_blocks = max(1, min(CHUNK_BLOCKS, GATHERED_BLOCKS // taken))
    pad = -rows % taken
    left = jnp.pad(end.max(-1) - jnp.where(end > 0, begin, end).min(-1), (0, pad), constant_values=-1)
    order = jnp.argsort(-left)  # those with most to read first; made-up rows last

    def in_groups(x):
        return jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1))[order].reshape(-1, taken, *x.shape[1:])

    loop = functools.partial(_online_softmax, kv, options, chunk_blocks)
    results = lax.map(lambda group: loop(*group), jax.tree.map(in_groups, (q, tables, begin, end, seen)))
    back = jnp.argsort(order)[:rows]
    high, total, out = (x.reshape(rows + pad, *x.shape[2:])[back] for x in results)
    total = jnp.maximum(total, 1e-30)
    return out / total[..., None], jnp.where(end[:, None] > 0, high + jnp.log(total), -jnp.inf)


def _online_softmax(kv: KV, options: Options, chunk_blocks, q, tables, begin, end, seen: Seen) -> Seen:
    """One group of rows, chunk by chunk: q [n, Hkv, M, D], tables [n, W], begin, end [n, M or 1].

    A row starts at the first chunk that it sees. Chunks are counted from position 0, so that sums do not depend on it.
    """
    n, kv_heads, m, size = q.shape
    values, scales = kv if isinstance(kv, QuantizedKV) else (kv, None)
    parts, block_size = values.shape[1], values.shape[3]
    span = chunk_blocks * block_size
    runs = values.reshape(-1, block_size * size)  # row (parts * block + is_value) * Hkv + head
    heads = jnp.arange(kv_heads)[:, None]
    q = q.reshape(n * kv_heads, m, size)
    last = end.max(-1)  # [n]
    first = jnp.minimum(jnp.where(end > 0, begin, last[:, None]).min(-1), last) // span
    count = (-(-last // span) - first).max()
    ahead = jnp.arange(tables.shape[1] + -tables.shape[1] % chunk_blocks)
    tables = jnp.take_along_axis(tables, first[:, None] * chunk_blocks + ahead, axis=1, mode="clip")
    begin, end = begin[:, None, :, None], end[:, None, :, None]  # [n, 1, M or 1, 1]

    def gather(index):  # [n, Hkv, chunk_blocks] -> [n * Hkv, span, D]
        run = lax.optimization_barrier(jnp.take(runs, index.reshape(-1), axis=0, mode="clip"))
        run = run.reshape(n * kv_heads, span, size).astype(q.dtype)
        if scales is None:
            return run
        factors = jnp.take(scales.reshape(-1, block_size), index.reshape(-1), axis=0, mode="clip")
        return run * factors.reshape(n * kv_heads, span, 1).astype(q.dtype)

    def body(carry):
        i, high, total, out = carry
        blocks = lax.dynamic_slice_in_dim(tables, i * chunk_blocks, chunk_blocks, axis=1)[:, None]
        index = parts * kv_heads * blocks + heads
        keys = gather(index)
        scores = jnp.einsum("xmd,xkd->xmk", q, keys, preferred_element_type=jnp.float32)
        scores = scores.reshape(n, kv_heads, m, span)
        if options.cap is not None:
            scores = jnp.tanh(scores / options.cap) * options.cap
        position = ((first + i)[:, None] * span + jnp.arange(span))[:, None, None]  # [n, 1, 1, span]
        unseen = lax.optimization_barrier(jnp.where((position < end) & (position >= begin), 0.0, -jnp.inf))
        scores = lax.optimization_barrier(scores + unseen)
        higher = lax.optimization_barrier(jnp.maximum(high, scores.max(-1)))  # finite, as the first one is
        weights = lax.optimization_barrier(jnp.exp(lax.optimization_barrier(scores - higher[..., None])))
        shrink = jnp.exp(high - higher)
        new = jnp.einsum(
            "xmk,xkd->xmd",
            weights.reshape(-1, m, span).astype(q.dtype),
            keys if parts == 1 else gather(index + kv_heads),
            preferred_element_type=jnp.float32,
        )
        out = out * shrink[..., None] + new.reshape(out.shape)
        return i + 1, higher, total * shrink + weights.sum(-1), out

    _, *after = lax.while_loop(lambda carry: carry[0] < count, body, (0, *seen))
    return Seen(*after)
