"""Decode attention in Pallas's Triton backend: flash-decoding, and blocks that rows share read once for all of them.

paged_decode_shared   program (item, KV head): an item is a run of the tiles that the rows of one piece share
paged_decode          program (item, KV head): an item is a run of the tiles that only one row reads
paged_decode_merge    program (row, query head): weighs the row's partial results, those of its piece included
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention import triton_softmax as softmax
from pallas_kernels.paged_attention.merge import LOWEST
from pallas_kernels.paged_attention.options import Options
from pallas_kernels.paged_attention.quantized import KV
from pallas_kernels.paged_attention.shared import SharedPrefixes
from pallas_kernels.paged_attention.softcap import LOG2_E
from pallas_kernels.paged_attention.splits import num_items, plan_splits
from pallas_kernels.paged_attention.tiles import Tiles
from pallas_kernels.paged_attention.triton_call import call, like
from pallas_kernels.paged_attention.tuned import tiles_for

FEWEST_TOKENS = 256  # a split of fewer costs more than 3 % of its bytes in partial results
FEWEST_SHARED_TOKENS = 1024  # which have a partial result for each row of the piece
MERGE_SPLITS = 16  # partial results that the merge takes at once


class _Partial(NamedTuple):
    """Partial results, of which the merge weighs those of each row."""

    out: jax.Array  # float32 [n, Hq, D], each normalised
    log_sum: jax.Array  # float32 [n, Hq], in units of log2
    runs: jax.Array  # int32 [R, 3]: the row's first, how many it has, how far apart they are


def _shared_kernel(*refs, shape: softmax.Shape, parts: int, unflatten: Callable):
    """Program (part of the members of an item of the work list, KV head): what they share, without their sinks.

    `inputs.lengths` are of pieces, `inputs.starts` of rows: what a sliding window leaves of each.
    """
    items, rows, inputs, (part, part_lse) = unflatten(refs)
    item = pl.program_id(0) // parts
    piece, first, stop = (items[item, i] for i in range(3))
    kv_head, member, head, real = softmax.members(shape)
    member = pl.program_id(0) % parts * shape.queries + member
    real &= member < rows.shape[1]

    @pl.when(piece >= 0)
    def attend():
        row = softmax.load(rows, (piece, member), real)
        asked = real & (row >= 0)
        row = jnp.where(asked, row, 0)
        q = softmax.load_pieces(shape, inputs.q, (row[:, None], head[:, None]), asked)
        end = inputs.lengths[piece]
        begin = None if inputs.starts is None else softmax.load(inputs.starts, (row,), asked)[:, None]

        def seen(position):
            mask = position < end
            return mask if begin is None else mask & (position >= begin)

        body = functools.partial(softmax.tile, shape, inputs, rows[piece, 0], kv_head, q, seen, end)
        log_sum, pieces = softmax.finish(lax.fori_loop(first, stop, body, softmax.start(shape, inputs, head, False)))
        at = item * rows.shape[1] + member
        softmax.store_pieces(shape, part, (at[:, None], head[:, None]), pieces, real)
        plgpu.store(part_lse.at[at, head], log_sum, mask=real)


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
            return mask if inputs.starts is None else mask & (position >= inputs.starts[row])

        body = functools.partial(softmax.tile, shape, inputs, row, kv_head, q, seen, end)
        carry = lax.fori_loop(first, stop, body, softmax.start(shape, inputs, head, split == 0))
        log_sum, pieces = softmax.finish(carry)
        log_sum = jnp.where(end > 0, log_sum, -jnp.inf)  # of padding, whatever its sink

        @pl.when(splits == 1)
        def whole_row():
            softmax.store_pieces(shape, out, (row, head[:, None]), pieces, real)
            if lse is not None:
                plgpu.store(lse.at[row, head], log_sum / LOG2_E, mask=real)

        @pl.when(splits > 1)
        def part_of_row():
            softmax.store_pieces(shape, part, (item, head[:, None]), pieces, real)
            plgpu.store(part_lse.at[item, head], log_sum, mask=real)


def _merge_kernel(*refs, shape: softmax.Shape, unflatten: Callable):
    """Program (row, query head): weighs the row's partial results, in their order: no other row changes the sums."""
    partials, _, (out, lse) = unflatten(refs)
    row, head = pl.program_id(0), pl.program_id(1)

    def body(partial: _Partial, i, carry):
        first, count, step = (partial.runs[row, j] for j in range(3))
        high, total, sums = carry
        split = i * MERGE_SPLITS + jnp.arange(MERGE_SPLITS)
        real, at = split < count, first + split * step
        log_sum = jnp.where(real, softmax.load(partial.log_sum, (at, head), real), -jnp.inf)
        higher = jnp.maximum(high, log_sum.max())
        weights, shrink = jnp.exp2(log_sum - higher), jnp.exp2(high - higher)
        values = softmax.load_pieces(shape, partial.out, (at[:, None], head), real)
        sums = tuple(s * shrink + (weights[:, None] * v).sum(axis=0) for s, v in zip(sums, values, strict=True))
        return higher, total * shrink + weights.sum(), sums

    @pl.when(functools.reduce(jnp.add, [partial.runs[row, 1] for partial in partials]) > 1)
    def merge():
        empty = tuple(jnp.zeros(size, jnp.float32) for _, size in shape.pieces)
        carry = jnp.float32(LOWEST), jnp.float32(0), empty
        for partial in partials:
            steps = pl.cdiv(partial.runs[row, 1], MERGE_SPLITS)
            carry = lax.fori_loop(0, steps, functools.partial(body, partial), carry)
        high, total, sums = carry
        for (begin, size), value in zip(shape.pieces, sums, strict=True):
            plgpu.store(out.at[row, head, begin + jnp.arange(size)], (value / total).astype(out.dtype))
        if lse is not None:
            lse[row, head] = (high + jnp.log2(total)) / LOG2_E


def paged_decode_attention(
    q: jax.Array,
    kv: KV,
    tables: jax.Array,
    lengths: jax.Array,
    sinks: jax.Array | None,
    shared: SharedPrefixes | None,
    options: Options,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Any:
    """See `api.paged_decode_attention`. Up to three launches: what rows share, their splits, and the merge."""
    rows, heads, size = q.shape
    tiles = tiles or tiles_for("decode", size, q.dtype.itemsize)
    shape = softmax.shape_of(q, kv, tiles, 1, options)
    lengths = lengths.astype(jnp.int32)
    begins = None if options.window is None else jnp.maximum(lengths - options.window, 0)
    partials = []
    if shared is not None and options.split_tokens is None:  # a fixed split of a row does not depend on its neighbours
        pieces, begins = _attend_shared(q, kv, tables, begins, shared, tiles, options, interpret)
        partials.append(pieces)
    cut = _cut(shape, tiles, tables, FEWEST_TOKENS, options.split_tokens)
    splits = plan_splits(jnp.zeros_like(lengths) if begins is None else begins, lengths, tile=tiles.tokens, **cut)
    count, items = num_items(rows, **cut), splits.items
    if partials:
        items = items.at[:, 4].add(partials[0].runs[items[:, 0], 1])
    results = like(q, q.shape, q.dtype), like(q, (rows, heads), jnp.float32) if options.return_lse else None
    *done, part, part_lse = call(
        functools.partial(_decode_kernel, shape=shape),
        "paged_decode",
        (count, shape.kv_heads * shape.group_parts),
        (items, softmax.inputs_of(q, kv, tables, lengths, begins, sinks)),
        (*results, like(q, (count, heads, size), jnp.float32), like(q, (count, heads), jnp.float32)),
        interpret=interpret,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if count > rows or partials:
        partials.append(_Partial(part, part_lse, jnp.pad(splits.rows, ((0, 0), (0, 1)), constant_values=1)))
        done = call(
            functools.partial(_merge_kernel, shape=shape),
            "paged_decode_merge",
            (rows, heads),
            (tuple(partials), tuple(done)),
            results,
            aliased=1 + options.return_lse,
            interpret=interpret,
            num_warps=2,
            num_stages=2,
        )
    return tuple(done) if options.return_lse else done[0]


def _attend_shared(
    q: jax.Array,
    kv: KV,
    tables: jax.Array,
    begins: jax.Array | None,
    shared: SharedPrefixes,
    tiles: Tiles,
    options: Options,
    interpret: bool,
) -> tuple[_Partial, jax.Array]:
    """(Results over what the rows of each piece share, int32 [R] where the rest of each row begins)."""
    (rows, heads, size), (pieces, members) = q.shape, shared.rows.shape
    shape = softmax.shape_of(q, kv, tiles, members, options)
    lengths = shared.lengths.astype(jnp.int32)
    begin = jnp.zeros(rows, jnp.int32) if begins is None else begins
    earliest = jnp.where(shared.rows < 0, lengths[:, None], begin[shared.rows]).min(axis=1)
    cut = _cut(shape, tiles, tables, FEWEST_SHARED_TOKENS, None)
    splits = plan_splits(earliest, lengths, tile=tiles.tokens, **cut)
    count, parts = num_items(pieces, **cut), pl.cdiv(members, shape.queries)
    part, part_lse = call(
        functools.partial(_shared_kernel, shape=shape, parts=parts),
        "paged_decode_shared",
        (count * parts, shape.kv_heads * shape.group_parts),
        (splits.items, shared.rows, softmax.inputs_of(q, kv, tables, lengths, begins, None)),
        (like(q, (count * members, heads, size), jnp.float32), like(q, (count * members, heads), jnp.float32)),
        interpret=interpret,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    first, many = splits.rows[:, :1], splits.rows[:, 1:]
    run = jnp.stack(jnp.broadcast_arrays(first * members + jnp.arange(members), many, members), axis=-1)
    where = jnp.where(shared.rows < 0, rows, shared.rows)
    runs = jnp.zeros((rows, 3), jnp.int32).at[where].set(run, mode="drop")
    return _Partial(part, part_lse, runs), begin.at[where].max(lengths[:, None], mode="drop")


def _cut(shape: softmax.Shape, tiles: Tiles, tables: jax.Array, fewest: int, fixed: int | None) -> dict[str, Any]:
    """How `plan_splits` is to cut the contexts of this batch; `fewest` and `fixed` are tokens."""
    return {
        "width_tiles": pl.cdiv(tables.shape[1] * shape.block_size, tiles.tokens),
        "programs": pl.cdiv(tiles.programs, shape.kv_heads * shape.group_parts),
        "fewest": pl.cdiv(fewest, tiles.tokens),
        "fixed": None if fixed is None else pl.cdiv(fixed, tiles.tokens),
    }
