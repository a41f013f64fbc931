"""Decode attention for Hopper in Pallas's Mosaic GPU backend: a TMA for each block, wgmma for both products.

A program (item of the work list, KV head) is one warp group. It walks over tiles of cached tokens; the next two tiles'
blocks are on their way while one is worked on. Its products have 64 rows, the height of a wgmma, of which the query
heads of the KV head fill the first. Partial results are merged in XLA.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.merge import LOWEST, merge_items
from pallas_kernels.paged_attention.mosaic_softmax import ROWS, TILE_TOKENS, iota, nothing_seen, swizzled
from pallas_kernels.paged_attention.options import Options
from pallas_kernels.paged_attention.shared import SharedPrefixes
from pallas_kernels.paged_attention.softcap import soft_capped
from pallas_kernels.paged_attention.splits import most_items, num_items, plan_splits

PROGRAMS = 132 * 2  # of which each multiprocessor has room for one at a head size of 128 (152 KB of shared memory)
FEWEST_TOKENS = 256
STAGES = 3  # tiles in shared memory: those ahead are 64 KB in flight, of which an H200 needs 25


def _kernel(q, kv, tables, items, begins, ends, out, high_out, total_out, *scratch, scale: float, cap: float | None):
    q_tile, k_tile, v_tile, weights_tile, out_tile, q_here, k_here, v_here = scratch
    item, head = lax.axis_index("item"), lax.axis_index("head")
    row, first, stop = (items[item, i] for i in range(3))
    row = jnp.maximum(row, 0)
    begin, end = begins[row], ends[row]
    block_size, size = kv.shape[3:]
    blocks = TILE_TOKENS // block_size

    def fetch(tile, slot):
        for j in range(blocks):
            block, place = tables[row, tile * blocks + j], pl.ds(j * block_size, block_size)
            plgpu.copy_gmem_to_smem(kv.at[block, 0, head], k_tile.at[slot, place], k_here.at[slot])
            plgpu.copy_gmem_to_smem(kv.at[block, 1, head], v_tile.at[slot, place], v_here.at[slot])

    plgpu.copy_gmem_to_smem(q.at[row, head], q_tile, q_here)

    for i in range(STAGES - 1):
        pl.when(first + i < stop)(functools.partial(fetch, first + i, i))

    plgpu.barrier_wait(q_here)

    def body(tile, carry):
        sums, high, total = carry
        slot = lax.rem(tile - first, STAGES)
        plgpu.barrier_wait(k_here.at[slot])

        def product(acc):
            plgpu.wgmma(acc, q_tile, k_tile.at[slot].transpose((1, 0)))
            return acc[...]

        scores = pl.run_scoped(product, plgpu.ACC((ROWS, TILE_TOKENS), jnp.float32))
        scores, factor = soft_capped(scores, scale, cap)
        position = tile * TILE_TOKENS + iota(1)
        scores = jnp.where((position >= begin) & (position < end), scores * factor, LOWEST)
        higher = jnp.maximum(high, scores.max(axis=1))
        shrink = jnp.exp2(high - higher)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(higher, (ROWS, TILE_TOKENS), [0]))
        total = total * shrink + weights.sum(axis=1)
        weights_tile[...] = weights.astype(q.dtype)
        plgpu.commit_smem()  # every warp is done with the tile before this one

        ahead = tile + STAGES - 1
        pl.when(ahead < stop)(lambda: fetch(ahead, lax.rem(ahead - first, STAGES)))

        plgpu.barrier_wait(v_here.at[slot])

        def weigh(acc):
            plgpu.wgmma(acc, weights_tile, v_tile.at[slot])
            return acc[...]

        new = pl.run_scoped(weigh, plgpu.ACC((ROWS, size), jnp.float32))
        return sums * lax.broadcast_in_dim(shrink, (ROWS, size), [0]) + new, higher, total

    sums, high, total = lax.fori_loop(first, stop, body, nothing_seen(size))
    out_tile[...] = sums
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(0, out.shape[2])], out.at[item, head])
    high_out[item, head], total_out[item, head] = high, total
    plgpu.wait_smem_to_gmem(0)


def paged_decode_attention(
    q: jax.Array,
    kv: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    sinks: jax.Array | None,
    shared: SharedPrefixes | None,
    options: Options,
    *,
    interpret: bool = False,
) -> Any:
    """See `api.paged_decode_attention`. What rows share is read by each of them."""
    del shared
    (rows, heads, size), (_, _, kv_heads, block_size, _) = q.shape, kv.shape
    group, f32 = heads // kv_heads, jnp.float32
    lengths = lengths.astype(jnp.int32)
    begins = jnp.zeros_like(lengths) if options.window is None else jnp.maximum(lengths - options.window, 0)
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % (TILE_TOKENS // block_size))))
    cut: dict[str, Any] = {
        "width_tiles": tables.shape[1] * block_size // TILE_TOKENS,
        "programs": pl.cdiv(PROGRAMS, kv_heads),
        "fewest": FEWEST_TOKENS // TILE_TOKENS,
        "fixed": None if options.split_tokens is None else pl.cdiv(options.split_tokens, TILE_TOKENS),
    }
    splits, count = plan_splits(begins, lengths, tile=TILE_TOKENS, **cut), num_items(rows, **cut)
    stacked = jnp.pad(q.reshape(rows, kv_heads, group, size), ((0, 0), (0, 0), (0, ROWS - group), (0, 0)))
    kept = -(-group // 8) * 8
    tile = functools.partial(swizzled, dtype=q.dtype)
    arrivals = TILE_TOKENS // block_size
    sums, high, total = plgpu.kernel(
        functools.partial(_kernel, scale=options.scale, cap=options.cap),
        out_type=[
            jax.ShapeDtypeStruct((count, kv_heads, kept, size), f32),
            jax.ShapeDtypeStruct((count, kv_heads, ROWS), f32),
            jax.ShapeDtypeStruct((count, kv_heads, ROWS), f32),
        ],
        grid=(count, kv_heads),
        grid_names=("item", "head"),
        kernel_name="paged_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[
            tile((ROWS, size)),
            tile((STAGES, TILE_TOKENS, size)),
            tile((STAGES, TILE_TOKENS, size)),
            tile((ROWS, TILE_TOKENS)),
            plgpu.SMEM((ROWS, size), f32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=arrivals),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=arrivals),
        ],
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(stacked, kv, tables, splits.items, begins, lengths)
    out, lse = merge_items(
        sums[:, :, :group], high[..., :group], total[..., :group], splits, most_items(**cut), lengths, sinks
    )
    return (out.astype(q.dtype), lse) if options.return_lse else out.astype(q.dtype)
