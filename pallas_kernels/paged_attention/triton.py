"""Paged attention for NVIDIA GPUs in Pallas's Triton backend: flash-decoding, and flash attention for tiles of queries.

A program takes the query heads of one KV head together, so that a block is read once for all of them (GQA), and walks
over tiles of cached tokens with the online softmax of `triton_softmax`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import Device
from pallas_kernels.paged_attention import triton_softmax as softmax
from pallas_kernels.paged_attention.quantized import KV, QuantizedKV, pool_values
from pallas_kernels.paged_attention.shared import SharedPrefixes
from pallas_kernels.paged_attention.splits import num_items, plan_splits
from pallas_kernels.paged_attention.tiles import Tiles, decode_tiles, prefill_tiles

FEWEST_TOKENS = 256  # a split of fewer costs more than 3 % of its bytes in partial results
MERGE_SPLITS = 16  # partial results that the merge takes at once


def unsupported(q: jax.Array, kv: KV, device: Device) -> str | None:
    """Why these kernels cannot take these arguments on this device; None: they can."""
    values = pool_values(kv)
    size = values.shape[-1]
    if device.platform != "cuda" or device.capability < 80:
        return "needs an NVIDIA GPU of capability 8.0 or more"
    if values.shape[1] == 1:
        return "reads keys and values apart, and this pool holds keys that are values too"
    if size % 16 or len(softmax.pieces_of(size)) > 2 or size > 256:
        return f"has no head size {size}: 16 to 256, a multiple of 16 that is a power of two or the sum of two"
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"has no queries of {q.dtype}"
    if isinstance(kv, QuantizedKV):
        if values.dtype == jnp.float8_e4m3fn and device.capability < 89:
            return "reads float8_e4m3fn from capability 8.9 on"
        if 2**31 <= values.size <= 2**32:
            return "would take 32-bit offsets for a pool between 2 and 4 GiB of 8-bit values"
    elif values.dtype != q.dtype:
        return f"has no queries of {q.dtype} for a pool of {values.dtype}"
    return None


def _decode_kernel(*refs, shape: softmax.Shape, unflatten: Callable):
    """Program (item, KV head): one item of the work list. Rows of one item are done; others leave a partial result."""
    items, inputs, (out, lse, part, part_lse) = unflatten(refs)
    item = pl.program_id(0)
    row, first, stop, split, splits = (items[item, i] for i in range(5))
    kv_head, _, head, real = softmax.members(shape)

    @pl.when(row >= 0)
    def attend():
        end = inputs.lengths[row]
        q = softmax.load_pieces(shape, inputs.q, (row, head[:, None]), real)

        def seen(position):
            mask = position < end
            return mask if shape.window is None else mask & (position >= end - shape.window)

        body = functools.partial(softmax.tile, shape, inputs, row, kv_head, q, seen, end)
        carry = lax.fori_loop(first, stop, body, softmax.start(shape, inputs, head, split == 0))
        log_sum, pieces = softmax.finish(carry)
        log_sum = jnp.where(end > 0, log_sum, -jnp.inf)  # of padding, whatever its sink

        @pl.when(splits == 1)
        def whole_row():
            softmax.store_pieces(shape, out, (row, head[:, None]), pieces, real)
            if lse is not None:
                plgpu.store(lse.at[row, head], log_sum / softmax.LOG2_E, mask=real)

        @pl.when(splits > 1)
        def part_of_row():
            softmax.store_pieces(shape, part, (item, head[:, None]), pieces, real)
            plgpu.store(part_lse.at[item, head], log_sum, mask=real)


def _merge_kernel(*refs, shape: softmax.Shape, unflatten: Callable):
    """Program (row, query head): weighs the row's partial results, in their order: no other row changes the sums."""
    rows, part, part_lse, _, (out, lse) = unflatten(refs)
    row, head = pl.program_id(0), pl.program_id(1)
    first, splits = rows[row, 0], rows[row, 1]

    def body(i, carry):
        high, total, sums = carry
        split = i * MERGE_SPLITS + jnp.arange(MERGE_SPLITS)
        real = split < splits
        log_sum = plgpu.load(part_lse.at[first + split, head], mask=real, other=-jnp.inf)
        higher = jnp.maximum(high, log_sum.max())
        weights, shrink = jnp.exp2(log_sum - higher), jnp.exp2(high - higher)
        values = softmax.load_pieces(shape, part, ((first + split)[:, None], head), real)
        sums = tuple(s * shrink + (weights[:, None] * v).sum(axis=0) for s, v in zip(sums, values, strict=True))
        return higher, total * shrink + weights.sum(), sums

    @pl.when(splits > 1)
    def merge():
        start = (
            jnp.float32(softmax.LOWEST),
            jnp.float32(0),
            tuple(jnp.zeros(size, jnp.float32) for _, size in shape.pieces),
        )
        high, total, sums = lax.fori_loop(0, pl.cdiv(splits, MERGE_SPLITS), body, start)
        for (begin, size), value in zip(shape.pieces, sums, strict=True):
            plgpu.store(out.at[row, head, begin + jnp.arange(size)], (value / total).astype(out.dtype))
        if lse is not None:
            lse[row, head] = (high + jnp.log2(total)) / softmax.LOG2_E


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
        plgpu.store(lse.at[row, query, head], jnp.where(asked, log_sum, -jnp.inf) / softmax.LOG2_E, mask=written)


def _like(q: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes that q varies over, which `shard_map` wants to be told."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(q).manual_axis_type)


def _call(kernel, name: str, grid: tuple[int, ...], operands: tuple, results: tuple, *, aliased=0, interpret, **params):
    """pallas_call over whole arrays, of which some may be absent (None). The last `aliased` inputs are the results."""
    flat, structure = jax.tree.flatten(results)
    inputs = jax.tree.leaves(operands)
    unflatten = functools.partial(jax.tree.unflatten, jax.tree.structure((*operands, results)))
    out = pl.pallas_call(
        functools.partial(kernel, unflatten=unflatten),
        grid=grid,
        out_shape=flat,
        input_output_aliases={len(inputs) - aliased + i: i for i in range(aliased)},
        compiler_params=plgpu.CompilerParams(**params),
        interpret=interpret,
        name=name,
    )(*inputs)
    return jax.tree.unflatten(structure, out)


def paged_decode_attention(
    q: jax.Array,
    kv: KV,
    tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    split_tokens: int | None = None,
    shared: SharedPrefixes | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Any:
    """See `api.paged_decode_attention`. Two launches: the splits, and their merge where rows can have several.

    What rows share is read by each of them.
    """
    del shared
    rows, heads, size = q.shape
    tiles = tiles or decode_tiles(size, q.dtype.itemsize)
    options = {"scale": scale, "window": sliding_window, "cap": logit_soft_cap}
    shape = softmax.shape_of(q, kv, tiles, 1, options)
    lengths = lengths.astype(jnp.int32)
    kv_programs = shape.kv_heads * shape.group_parts
    cut: dict[str, Any] = {
        "width_tiles": pl.cdiv(tables.shape[1] * shape.block_size, tiles.tokens),
        "programs": pl.cdiv(tiles.programs, kv_programs),
        "fewest": pl.cdiv(FEWEST_TOKENS, tiles.tokens),
        "fixed": None if split_tokens is None else pl.cdiv(split_tokens, tiles.tokens),
    }
    begin = jnp.zeros_like(lengths) if sliding_window is None else jnp.maximum(lengths - sliding_window, 0)
    splits = plan_splits(begin, lengths, tile=tiles.tokens, **cut)
    count = num_items(rows, **cut)
    inputs = softmax.inputs_of(q, kv, tables, lengths, None, sinks)
    results = _like(q, q.shape, q.dtype), _like(q, (rows, heads), jnp.float32) if return_lse else None
    partial = _like(q, (count, heads, size), jnp.float32), _like(q, (count, heads), jnp.float32)
    *done, part, part_lse = _call(
        functools.partial(_decode_kernel, shape=shape),
        "paged_decode",
        (count, kv_programs),
        (splits.items, inputs),
        (*results, *partial),
        interpret=interpret,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if count > rows:
        done = _call(
            functools.partial(_merge_kernel, shape=shape),
            "paged_decode_merge",
            (rows, heads),
            (splits.rows, part, part_lse, tuple(done)),
            results,
            aliased=1 + return_lse,
            interpret=interpret,
            num_warps=2,
            num_stages=2,
        )
    return tuple(done) if return_lse else done[0]


def paged_prefill_attention(
    q: jax.Array,
    kv: KV,
    tables: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Any:
    """See `api.paged_prefill_attention`. One launch."""
    rows, c, _, size = q.shape
    tiles = tiles or prefill_tiles(size, q.dtype.itemsize)
    options = {"scale": scale, "window": sliding_window, "cap": logit_soft_cap}
    shape = softmax.shape_of(q, kv, tiles, c, options)
    inputs = softmax.inputs_of(q, kv, tables, lengths.astype(jnp.int32), starts.astype(jnp.int32), sinks)
    parts = pl.cdiv(c, shape.queries)
    done = _call(
        functools.partial(_prefill_kernel, shape=shape, parts=parts),
        "paged_prefill",
        (rows * parts, shape.kv_heads * shape.group_parts),
        (inputs,),
        (_like(q, q.shape, q.dtype), _like(q, q.shape[:-1], jnp.float32) if return_lse else None),
        interpret=interpret,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return done if return_lse else done[0]
