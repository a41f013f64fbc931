"""Attention of tiles of queries in Pallas's Triton backend: flash attention over blocks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention import triton_softmax as softmax
from pallas_kernels.paged_attention.options import Options
from pallas_kernels.paged_attention.quantized import KV
from pallas_kernels.paged_attention.softcap import LOG2_E
from pallas_kernels.paged_attention.tiles import Tiles
from pallas_kernels.paged_attention.triton_call import call, like
from pallas_kernels.paged_attention.tuned import tiles_for


def _prefill_kernel(*refs, shape: softmax.Shape, parts: int, unflatten: Callable):
    """Program (part of a tile of queries, KV head)."""
    inputs, (out, lse) = unflatten(refs)
    row, first_query = pl.program_id(0) // parts, pl.program_id(0) % parts * shape.queries
    kv_head, query, head, real = softmax.members(shape)
    query = first_query + query
    start, length = inputs.starts[row], inputs.lengths[row]
    count = jnp.clip(length - first_query, 0, shape.queries)  # real queries of this program
    begin = start + first_query  # position of the first
    end = jnp.where(count > 0, begin + count, 0)  # what the last one sees
    written = real & (query < out.shape[1])
    index = (row, query[:, None], head[:, None])
    q = softmax.load_pieces(shape, inputs.q, index, real & (query < length))
    position_of_query = (start + query)[:, None]

    def seen(position):
        mask = (position <= position_of_query) & (query < length)[:, None]
        return mask if shape.window is None else mask & (position > position_of_query - shape.window)

    tile = functools.partial(softmax.tile, shape, inputs, row, kv_head, q)
    carry = softmax.start(shape, inputs, head, True)
    stop = pl.cdiv(end, shape.tile_tokens)
    if shape.window is None:  # tiles that every query sees whole need no mask: most of a long context
        masked_from = jnp.minimum((begin + 1) // shape.tile_tokens, stop)
        carry = lax.fori_loop(0, masked_from, functools.partial(tile, None, end), carry)
    else:
        masked_from = jnp.maximum(begin + 1 - shape.window, 0) // shape.tile_tokens
    carry = lax.fori_loop(masked_from, stop, functools.partial(tile, seen, end), carry)
    log_sum, pieces = softmax.finish(carry)
    asked = query < length
    pieces = tuple(jnp.where(asked[:, None], x, 0.0) for x in pieces)
    softmax.store_pieces(shape, out, index, pieces, written)
    if lse is not None:
        plgpu.store(lse.at[row, query, head], jnp.where(asked, log_sum, -jnp.inf) / LOG2_E, mask=written)


def paged_prefill_attention(
    q: jax.Array,
    kv: KV,
    tables: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    sinks: jax.Array | None,
    options: Options,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Any:
    """See `api.paged_prefill_attention`. One launch."""
    rows, c, _, size = q.shape
    tiles = tiles or tiles_for("prefill", size, q.dtype.itemsize)
    shape = softmax.shape_of(q, kv, tiles, c, options)
    inputs = softmax.inputs_of(q, kv, tables, lengths.astype(jnp.int32), starts.astype(jnp.int32), sinks)
    parts = pl.cdiv(c, shape.queries)
    done = call(
        functools.partial(_prefill_kernel, shape=shape, parts=parts),
        "paged_prefill",
        (rows * parts, shape.kv_heads * shape.group_parts),
        (inputs,),
        (like(q, q.shape, q.dtype), like(q, q.shape[:-1], jnp.float32) if options.return_lse else None),
        interpret=interpret,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return done if options.return_lse else done[0]
