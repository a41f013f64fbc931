"""Attention of tiles of queries for Hopper in Pallas's Mosaic GPU backend: warp-specialised flash attention.

A program (part of a tile of queries, KV head) has three warp groups. Two compute, 64 rows each, a row being a query and
one of the query heads that share the keys; while one does its softmax the other may have the tensor cores. The third
only asks for blocks, a TMA for each block's keys and one for its values, STAGES tiles ahead, with few registers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.merge import LOWEST
from pallas_kernels.paged_attention.mosaic_softmax import ROWS, TILE_TOKENS, iota, nothing_seen, swizzled
from pallas_kernels.paged_attention.options import Options
from pallas_kernels.paged_attention.softcap import LOG2_E, soft_capped

GROUPS = 2
"""Warp groups that compute."""
STAGES = 3  # tiles of keys and values in shared memory: 32 KB each at a head size of 128
COMPUTE_REGISTERS, FETCH_REGISTERS = 232, 40  # of a thread; 65,536 in all


class _Shape(NamedTuple):
    group: int  # query heads of a KV head
    queries: int  # of a tile, padding included
    parts: int  # programs of a tile
    scale: float
    window: int | None
    cap: float | None
    interpret: bool


def _kernel(q, kv, tables, starts, lengths, out, lse, *scratch, shape: _Shape):
    *memory, k_here, v_here, free = scratch
    tile, part = lax.div(lax.axis_index("part"), shape.parts), lax.rem(lax.axis_index("part"), shape.parts)
    head, warp_group = lax.axis_index("head"), lax.axis_index("warp_group")
    start, length = starts[tile], lengths[tile]
    first_row = part * GROUPS * ROWS
    first_query = lax.div(first_row, shape.group)
    last_query = jnp.minimum(lax.div(first_row + GROUPS * ROWS - 1, shape.group), length - 1)
    seen_by_all = start + first_query + 1
    stop = jnp.where(last_query < first_query, 0, lax.div(start + last_query + TILE_TOKENS, TILE_TOKENS))
    begin = 0 if shape.window is None else lax.div(jnp.maximum(seen_by_all - shape.window, 0), TILE_TOKENS)

    @pl.when(warp_group < GROUPS)
    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        row = first_row + warp_group * ROWS
        at = (tile, head, pl.ds(pl.multiple_of(row, ROWS), ROWS))
        masked_from = begin if shape.window is not None else lax.div(seen_by_all, TILE_TOKENS)
        span = jnp.minimum(begin, stop), jnp.minimum(masked_from, stop), stop
        _attend(q.at[at], out.at[at], lse.at[at], row, start, span, memory, (k_here, v_here, free), shape)

    @pl.when(warp_group == GROUPS)
    def fetch():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        k_tile, v_tile = memory[1:3]
        block_size = kv.shape[3]

        def body(tile_of_tokens, _):
            turn = tile_of_tokens - begin
            slot = lax.rem(turn, STAGES)

            @pl.when(turn >= STAGES)
            def wait():
                plgpu.barrier_wait(free.at[slot])

            for j in range(TILE_TOKENS // block_size):
                block = tables[tile, tile_of_tokens * (TILE_TOKENS // block_size) + j]
                place = pl.ds(j * block_size, block_size)
                plgpu.copy_gmem_to_smem(kv.at[block, 0, head], k_tile.at[slot, place], k_here.at[slot])
                plgpu.copy_gmem_to_smem(kv.at[block, 1, head], v_tile.at[slot, place], v_here.at[slot])

        def wait_for_the_last(turn, _):
            plgpu.barrier_wait(free.at[lax.rem(turn, STAGES)])

        lax.fori_loop(begin, stop, body, None)
        lax.fori_loop(jnp.maximum(stop - begin - STAGES, 0), stop - begin, wait_for_the_last, None)


def _attend(q, out, lse, first_row, start, span, memory, barriers, shape: _Shape) -> None:
    """A warp group's rows [ROWS, D] of q, out and lse.

    Args:
      span: the first tile of tokens, the first that not every query sees whole, the one after the last.
    """
    q_tile, k_tile, v_tile, weights_tile, lse_tile, q_here = memory
    (k_here, v_here, free), mine, size = barriers, lax.axis_index("warp_group"), q.shape[1]
    q_tile, lse_tile = q_tile.at[mine], lse_tile.at[mine]
    plgpu.copy_gmem_to_smem(q, q_tile, q_here.at[mine])
    plgpu.barrier_wait(q_here.at[mine])
    last_seen = start + lax.div(first_row + iota(0), shape.group)

    def body(masked, tile, carry):
        sums, high, total = carry
        slot = lax.rem(tile - span[0], STAGES)
        plgpu.barrier_wait(k_here.at[slot])

        def product(acc):
            plgpu.wgmma(acc, q_tile, k_tile.at[slot].transpose((1, 0)))
            return acc[...]

        scores = pl.run_scoped(product, plgpu.ACC((ROWS, TILE_TOKENS), jnp.float32))
        scores, factor = soft_capped(scores, shape.scale, shape.cap)
        if masked:
            position = tile * TILE_TOKENS + iota(1)
            seen = position <= last_seen
            if shape.window is not None:
                seen &= position > last_seen - shape.window
            scores = jnp.where(seen, scores, LOWEST)
        higher = jnp.maximum(high, scores.max(axis=1) * factor)
        shrink = jnp.exp2(high - higher)
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(higher, (ROWS, TILE_TOKENS), [0]))
        total = total * shrink + weights.sum(axis=1)
        sums *= lax.broadcast_in_dim(shrink, (ROWS, size), [0])
        sums = _weigh(sums, weights.astype(q.dtype), weights_tile, v_tile.at[slot], v_here.at[slot], shape.interpret)
        plgpu.barrier_arrive(free.at[slot])
        return sums, higher, total

    carry = lax.fori_loop(span[0], span[1], functools.partial(body, False), nothing_seen(size))
    sums, high, total = lax.fori_loop(span[1], span[2], functools.partial(body, True), carry)
    q_tile[...] = (sums / lax.broadcast_in_dim(jnp.maximum(total, 1e-37), (ROWS, size), [0])).astype(q.dtype)
    lse_tile[...] = high / LOG2_E + jnp.log(jnp.maximum(total, 1e-37))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, out)
    plgpu.copy_smem_to_gmem(lse_tile, lse)
    plgpu.wait_smem_to_gmem(0)


def _weigh(sums, weights, weights_tile, values, here, interpret: bool) -> jax.Array:
    """sums + weights @ values. The interpreter has no wgmma with an operand in registers, and none that adds."""
    if not interpret:

        def add(acc):
            plgpu.barrier_wait(here)
            plgpu.wgmma(acc, weights, values)

        return pl.run_state(add)(plgpu.ACC.init(sums))
    mine = weights_tile.at[lax.axis_index("warp_group")]
    mine[...] = weights
    plgpu.commit_smem()
    plgpu.barrier_wait(here)

    def product(acc):
        plgpu.wgmma(acc, mine, values)
        return acc[...]

    return sums + pl.run_scoped(product, plgpu.ACC(sums.shape, jnp.float32))


def paged_prefill_attention(
    q: jax.Array,
    kv: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    sinks: jax.Array | None,
    options: Options,
    *,
    interpret: bool = False,
) -> Any:
    """See `api.paged_prefill_attention`. Sinks are merged in XLA."""
    (tiles, c, heads, size), (_, _, kv_heads, block_size, _) = q.shape, kv.shape
    group, blocks = heads // kv_heads, TILE_TOKENS // block_size
    parts = pl.cdiv(c * group, GROUPS * ROWS)
    rows = parts * GROUPS * ROWS
    starts, lengths = starts.astype(jnp.int32), lengths.astype(jnp.int32)
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % blocks)))
    stacked = q.reshape(tiles, c, kv_heads, group, size).swapaxes(1, 2).reshape(tiles, kv_heads, c * group, size)
    stacked = jnp.pad(stacked, ((0, 0), (0, 0), (0, rows - c * group), (0, 0)))
    tile = functools.partial(swizzled, dtype=q.dtype)
    shape = _Shape(group, c, parts, options.scale, options.window, options.cap, interpret)
    out, lse = plgpu.kernel(
        functools.partial(_kernel, shape=shape),
        out_type=[
            jax.ShapeDtypeStruct(stacked.shape, q.dtype),
            jax.ShapeDtypeStruct(stacked.shape[:-1], jnp.float32),
        ],
        grid=(tiles * parts, kv_heads),
        grid_names=("part", "head"),
        num_threads=GROUPS + 1,
        thread_name="warp_group",
        kernel_name="paged_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[
            tile((GROUPS, ROWS, size)),
            tile((STAGES, TILE_TOKENS, size)),
            tile((STAGES, TILE_TOKENS, size)),
            tile((GROUPS, ROWS, TILE_TOKENS)),
            plgpu.SMEM((GROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=GROUPS),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=blocks),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=blocks),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=GROUPS),
        ],
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(stacked, kv, tables, starts, lengths)

    def of_queries(x):  # [P, Hkv, rows, ...] -> [P, C, Hq, ...]
        x = x[:, :, : c * group].reshape(tiles, kv_heads, c, group, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(tiles, c, heads, *x.shape[4:])

    out, lse = of_queries(out), of_queries(lse)
    asked = (jnp.arange(c) < lengths[:, None])[..., None]
    if sinks is not None:
        with_sinks = jnp.logaddexp(lse, sinks.astype(jnp.float32))
        out, lse = out * jnp.exp(lse - with_sinks)[..., None], with_sinks
    out = jnp.where(asked[..., None], out, 0).astype(q.dtype)
    return (out, jnp.where(asked, lse, -jnp.inf)) if options.return_lse else out
