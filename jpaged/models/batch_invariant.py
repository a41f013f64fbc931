"""Batch invariance: a token's numbers are the same bits, whatever is computed beside it.

A matrix product adds in another order when it has other rows beside it, and XLA fuses, vectorises and contracts other
loops when shapes change. So here nothing that rounds has a shape that depends on the batch: tokens go through the
model in tiles of TILE rows, and their queries meet the context in chunks of SPAN positions, counted from position 0.
These are the bodies of loops, closed off by optimization barriers: the same programs in training and in serving,
whatever the chunks, the batch, the blocks. What is left between them moves numbers and rounds nothing.

One layer, where `attend` is the only thing that looks at other tokens:

    x --tiles: the layer up to `attend` (Tap)--> q, k, v --write_kv, chunks--> out --tiles: the layer from there on--> x

Gradients are those of the ordinary forward pass. The idea: Thinking Machines, "Defeating nondeterminism in LLM
inference" (2025); vLLM's VLLM_BATCH_INVARIANT.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.models.layers import Angles, DecoderLayer
from jpaged.models.layout import PagedLayout, Tap
from pallas_kernels.paged_attention import write_kv
from pallas_kernels.paged_attention.merge import LOWEST

TILE = 8
"""Tokens that go through the model together."""
SPAN = 128
"""Positions of the context in one product of attention; a multiple of the pool's block size."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_tiles(function: Callable[..., Any], lead: int, params: Any, *rows: Any) -> Any:
    """function(params, *rows), where each result row depends on the same row of the arguments alone, TILE at a time.

    Args:
      function: called with arrays whose first axis is TILE.
      lead: so many first axes of `rows`, and of the results, count rows.
      rows: arrays, or trees of them.
    """
    shape = jax.tree.leaves(rows)[0].shape[:lead]
    count = math.prod(shape)

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(count, *x.shape[lead:])
        return jnp.pad(x, ((0, -count % TILE),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, TILE, *x.shape[1:])

    def tile(rows):
        return lax.optimization_barrier(function(params, *lax.optimization_barrier(rows)))

    results = lax.map(tile, jax.tree.map(cut, rows))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count].reshape(*shape, *x.shape[2:]), results)


def _in_tiles_forward(function, lead, params, *rows):
    return in_tiles(function, lead, params, *rows), (params, rows)


def _in_tiles_backward(function, lead, saved, gradient):
    params, rows = saved
    return jax.vjp(function, params, *rows)[1](gradient)


in_tiles.defvjp(_in_tiles_forward, _in_tiles_backward)


@functools.partial(jax.jit, static_argnums=0)
def apply_layer(
    layer: DecoderLayer, variables, x: jax.Array, angles: Angles, kv: jax.Array | None, layout: PagedLayout | None
) -> tuple[jax.Array, jax.Array | None]:
    """`layer.apply`, batch-invariant: x [B, T, E] without a pool, [T, E] with one."""
    if kv is None or layout is None:
        return _without_pool(layer, variables, x, angles), kv
    return _in_two_halves(layer, variables, x, angles, functools.partial(_over_pool, kv, layout))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _without_pool(layer: DecoderLayer, variables, x: jax.Array, angles: Angles) -> jax.Array:
    return _in_two_halves(layer, variables, x, angles, _over_itself)[0]


def _without_pool_forward(layer, variables, x, angles):
    return _without_pool(layer, variables, x, angles), (variables, x, angles)


def _without_pool_backward(layer, saved, gradient):
    return jax.vjp(lambda *arguments: layer.apply(*arguments, None, None)[0], *saved)[1](gradient)


_without_pool.defvjp(_without_pool_forward, _without_pool_backward)


def _in_two_halves(layer: DecoderLayer, variables, x: jax.Array, angles: Angles, attention: Callable):
    """(x, what attention(q, k, v, sinks, options) returns besides its output). XLA drops what a half does not need."""
    options: dict[str, Any] = {}

    def before(variables, x, angles):
        tap = Tap()
        layer.apply(variables, x, angles, None, tap)
        options.update(tap.options)
        sinks = None if tap.sinks is None else jnp.broadcast_to(tap.sinks, (TILE, *tap.sinks.shape))
        return tap.q, tap.k, tap.v, sinks

    def after(variables, x, angles, out):
        return layer.apply(variables, x, angles, None, Tap(out))[0]

    lead = x.ndim - 1
    q, k, v, sinks = in_tiles(before, lead, variables, x, angles)
    sinks = None if sinks is None else sinks[(0,) * lead]
    out, kv = attention(q, k, v, sinks=sinks, **options)
    return in_tiles(after, lead, variables, x, angles, out), kv


def _over_pool(kv: jax.Array, layout: PagedLayout, q, k, v, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Attention of a step's tokens, [R + P * C, heads, D]; see `PagedLayout`. Returns (like q, the layer's pool)."""
    kv = write_kv(kv, k, None if kv.shape[1] == 1 else v, layout.slots)
    rows, tiles = layout.num_decodes, layout.num_tiles
    decodes = jnp.pad(q[:rows, None], ((0, 0), (0, TILE - 1), (0, 0), (0, 0)))  # [R, TILE, Hq, D], the first is real
    lengths = layout.decode_lengths
    lanes = [(decodes, layout.decode_tables, jnp.maximum(lengths - 1, 0), jnp.minimum(lengths, 1))]
    if tiles:
        prompts = q[rows:].reshape(tiles, -1, *q.shape[1:])  # [P, C, Hq, D]
        lanes.append(_cut(prompts, layout.prefill_tables, layout.prefill_starts, layout.prefill_lengths))
    out = _attend(kv, *(jnp.concatenate(parts) for parts in zip(*lanes, strict=True)), **options)
    results = [out[:rows, 0]]
    if tiles:
        results.append(out[rows:].reshape(tiles, -1, *out.shape[2:])[:, : prompts.shape[1]].reshape(-1, *out.shape[2:]))
    return jnp.concatenate(results)[..., : v.shape[-1]], kv


def _over_itself(q, k, v, **options: Any) -> tuple[jax.Array, None]:
    """Causal attention inside a batch, [B, T, heads, D], over a pool of blocks of SPAN tokens that is made for it."""
    batch, length = q.shape[:2]
    parts = [k] if v.shape[-1] < k.shape[-1] else [k, v]
    padded = jnp.pad(jnp.stack(parts, axis=2), ((0, 0), (0, -length % SPAN), (0, 0), (0, 0), (0, 0)))
    kv = jnp.moveaxis(padded.reshape(-1, SPAN, *padded.shape[2:]), 1, 3)  # [blocks, parts, Hkv, SPAN, D]
    tables = jnp.arange(len(kv)).reshape(batch, -1)
    out = _attend(kv, *_cut(q, tables, jnp.zeros(batch, jnp.int32), jnp.full(batch, length)), **options)
    return out.reshape(batch, -1, *out.shape[2:])[:, :length, :, : v.shape[-1]], None


def _cut(q: jax.Array, tables: jax.Array, starts: jax.Array, lengths: jax.Array):
    """Runs of consecutive queries [N, C, Hq, D], with their tables, starts and lengths, as runs of TILE queries."""
    runs = jnp.pad(q, ((0, 0), (0, -q.shape[1] % TILE), (0, 0), (0, 0)))
    pieces = runs.shape[1] // TILE
    offsets = jnp.arange(pieces) * TILE
    return (
        runs.reshape(-1, TILE, *q.shape[2:]),
        jnp.repeat(tables, pieces, axis=0),
        (starts[:, None] + offsets).reshape(-1),
        jnp.clip(lengths[:, None] - offsets, 0, TILE).reshape(-1),
    )


def _attend(kv, q, tables, starts, lengths, *, scale, sliding_window, logit_soft_cap, sinks) -> jax.Array:
    """Attention of runs of queries [N, TILE, Hq, D], the first `lengths` of them real, over a pool.

    An online softmax (arXiv 1805.02867) over chunks of SPAN positions. A chunk that a query does not see changes
    none of its bits, so it does not matter how far its neighbours see.
    """
    heads, size = q.shape[2:]
    parts, kv_heads, block_size = kv.shape[1:4]
    group, blocks = heads // kv_heads, SPAN // block_size
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % blocks)))
    runs = kv.reshape(-1, block_size * size)  # row (block * parts + part) * Hkv + head
    queries = jnp.arange(TILE)
    column = jnp.zeros(heads) if sinks is None else sinks.astype(jnp.float32)
    column = jnp.repeat(column.reshape(kv_heads, group), TILE, axis=1)  # [Hkv, M], M = group * TILE

    def run(arguments):
        q, table, start, length = lax.optimization_barrier(arguments)
        end = jnp.where(queries < length, start + queries + 1, 0)
        begin = jnp.zeros_like(end) if sliding_window is None else jnp.maximum(end - sliding_window, 0)
        first, last = jnp.where(end > 0, begin, end.max()).min() // SPAN, end.max()
        ends, begins = jnp.tile(end, group)[:, None], jnp.tile(begin, group)[:, None]  # [M, 1]
        q = (q * scale).reshape(TILE, kv_heads, group, size).transpose(1, 2, 0, 3).reshape(kv_heads, -1, size)

        def gather(index):  # [Hkv, blocks] -> [Hkv, SPAN, D]
            rows = jnp.take(runs, index.reshape(-1), axis=0, mode="clip")
            return lax.optimization_barrier(rows).reshape(kv_heads, SPAN, size).astype(q.dtype)

        def chunk(carry):
            i, high, total, out = lax.optimization_barrier(carry)
            index = (
                parts * kv_heads * lax.dynamic_slice_in_dim(table, i * blocks, blocks) + jnp.arange(kv_heads)[:, None]
            )
            keys = gather(index)
            values = keys if parts == 1 else gather(index + kv_heads)
            scores = jnp.einsum("hmd,hsd->hms", q, keys, preferred_element_type=jnp.float32)
            if logit_soft_cap is not None:
                scores = jnp.tanh(scores / logit_soft_cap) * logit_soft_cap
            position = i * SPAN + jnp.arange(SPAN)
            scores = jnp.where((position < ends) & (position >= begins), scores, -jnp.inf)
            higher = jnp.maximum(high, scores.max(-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(high - higher)
            new = jnp.einsum("hms,hsd->hmd", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
            return i + 1, higher, total * shrink + weights.sum(-1), out * shrink[..., None] + new

        none = jnp.zeros(q.shape[:-1], jnp.float32)
        start = (first, none + LOWEST, none, jnp.zeros(q.shape, jnp.float32))
        if sinks is not None:  # a score that has no value
            start = (first, column, none + 1, start[3])
        _, _, total, out = lax.optimization_barrier(lax.while_loop(lambda c: c[0] * SPAN < last, chunk, start))
        out = (out / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)
        out = out.reshape(kv_heads, group, TILE, size).transpose(2, 0, 1, 3).reshape(TILE, heads, size)
        return lax.optimization_barrier(out)

    return lax.map(run, (q, tables, starts, lengths))


def log_normaliser(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(high, rest) [..., 1] such that logits - high - rest are log-probabilities; logits float32 [..., V]."""
    return in_tiles(_log_normaliser, logits.ndim - 1, (), logits)


def _log_normaliser(params, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    # As log_softmax does it: taking the largest off first loses no bits, while a sum of that size would be rounded.
    high = lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    return high, jnp.log(jnp.exp(logits - high).sum(axis=-1, keepdims=True))
