"""The online softmax over tiles of cached tokens, in Pallas's Triton backend: what decode and prefill kernels share.

Tokens are gathered one by one through the block table, so that tiles and blocks need not be of one size; a token's keys
of one head are contiguous, which is what the memory system wants. Head sizes that are no power of two are taken in
pieces that are (80 = 64 + 16), without padding.

Scores are kept in units of log2, so that the exponential is one instruction. A running maximum starts at a finite
LOWEST and unseen scores are -inf, so that what sees nothing gives zeros and no NaN.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paged_attention.merge import LOWEST
from pallas_kernels.paged_attention.options import Options
from pallas_kernels.paged_attention.quantized import KV, QuantizedKV, pool_values
from pallas_kernels.paged_attention.softcap import LOG2_E, soft_capped
from pallas_kernels.paged_attention.tiles import Tiles


class Shape(NamedTuple):
    """What a kernel knows when it is compiled."""

    block_size: int
    kv_heads: int
    group: int  # query heads of a KV head
    heads: int  # of them, how many one program takes
    queries: int  # of a program
    m: int  # rows of its products: a power of two, at least queries * heads
    tile_tokens: int
    pieces: tuple[tuple[int, int], ...]  # (start, size) along the head size
    scale: float
    window: int | None
    cap: float | None

    @property
    def group_parts(self) -> int:
        return -(-self.group // self.heads)


def pieces_of(size: int) -> tuple[tuple[int, int], ...]:
    """Powers of two that make up a head size, the largest first."""
    bits = [1 << i for i in reversed(range(size.bit_length())) if size >> i & 1]
    return tuple((size >> bit.bit_length() << bit.bit_length(), bit) for bit in bits)


class Inputs(NamedTuple):
    """References to what every kernel reads. Kernels get them as a flat list; absent ones are None."""

    q: jax.Array  # [..., Hq, D]
    kv: jax.Array  # [num_blocks * 2 * Hkv * block_size, D]
    tables: jax.Array  # [rows, W]
    lengths: jax.Array  # [rows]
    starts: jax.Array | None  # [rows]: first position of a tile of queries; first position that a decoding row sees
    scales: jax.Array | None  # [num_blocks * 2 * Hkv * block_size]
    sinks: jax.Array | None  # [Hq]


def load(ref, index, mask=None):
    """Every axis is indexed by an array, which is what the interpreter takes; masked lanes give zeros."""
    zero = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0  # Triton has no cast from integers to 8-bit floats
    return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else zero)


def columns(piece: tuple[int, int]) -> jax.Array:
    return (piece[0] + jnp.arange(piece[1]))[None, :]


def load_pieces(shape: Shape, ref, index: tuple, mask: jax.Array) -> list[jax.Array]:
    """Rows [m, D] in pieces: `index` has an array [m, 1] or a scalar for each axis but the last."""
    return [load(ref, (*index, columns(piece)), mask[:, None]) for piece in shape.pieces]


def store_pieces(shape: Shape, ref, index: tuple, pieces: tuple, mask: jax.Array) -> None:
    for piece, value in zip(shape.pieces, pieces, strict=True):
        plgpu.store(ref.at[(*index, columns(piece))], value.astype(ref.dtype), mask=mask[:, None])


def start(shape: Shape, inputs: Inputs, head: jax.Array, has_sink) -> tuple:
    """The online softmax before the first tile. A sink is a score that was seen already, with no value."""
    high, total = jnp.full((shape.m,), LOWEST, jnp.float32), jnp.zeros((shape.m,), jnp.float32)
    if inputs.sinks is not None:
        known = head < inputs.sinks.shape[0]
        sink = load(inputs.sinks, jnp.where(known, head, 0)).astype(jnp.float32) * LOG2_E
        high, total = jnp.where(has_sink, sink, high), jnp.where(has_sink, 1.0, total)
    return high, total, tuple(jnp.zeros((shape.m, size), jnp.float32) for _, size in shape.pieces)


def dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """float32 products are exact products, not TF32: a model in float32 was asked for its precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, trans_b=transposed, precision=precision)


def tile(
    shape: Shape, inputs: Inputs, row, kv_head, q: list[jax.Array], seen: Callable | None, stop, tile, carry: tuple
) -> tuple:
    """One tile of the online softmax (arXiv 1805.02867): carry and result are (maximum, sum, output in pieces).

    `seen(positions [1, tile_tokens])` is the mask of the scores; None: all of this tile is seen. Positions from `stop`
    on are not read.
    """
    high, total, out = carry
    position = tile * shape.tile_tokens + jnp.arange(shape.tile_tokens)
    real = None if seen is None else position < stop
    block = load(inputs.tables, (row, position // shape.block_size), real)
    index = (2 * block * shape.kv_heads + kv_head) * shape.block_size + position % shape.block_size
    value_index = index + shape.kv_heads * shape.block_size
    lanes = None if real is None else real[:, None]
    dtype = q[0].dtype

    def part(index, piece):
        return load(inputs.kv, (index[:, None], columns(piece)), lanes).astype(dtype)

    products = [dot(x, part(index, piece), True) for x, piece in zip(q, shape.pieces, strict=True)]
    scores = functools.reduce(jnp.add, products)
    if inputs.scales is not None:
        scores = scores * load(inputs.scales, (index,), real)[None, :]
    scores, factor = soft_capped(scores, shape.scale, shape.cap)
    if seen is not None:
        scores = jnp.where(seen(position[None, :]), scores, -jnp.inf)
    higher = jnp.maximum(high, scores.max(axis=1) * factor)
    weights = jnp.exp2(scores * factor - higher[:, None])
    shrink = jnp.exp2(high - higher)
    total = total * shrink + weights.sum(axis=1)
    if inputs.scales is not None:
        weights = weights * load(inputs.scales, (value_index,), real)[None, :]
    weights = weights.astype(dtype)
    out = tuple(
        x * shrink[:, None] + dot(weights, part(value_index, piece)) for x, piece in zip(out, shape.pieces, strict=True)
    )
    return higher, total, out


def finish(carry: tuple) -> tuple[jax.Array, tuple]:
    """(log2 of the sum of exponentials [m], normalised output in pieces)."""
    high, total, out = carry
    lse = jnp.where(total > 0, high + jnp.log2(jnp.maximum(total, 1e-37)), -jnp.inf)
    scale = 1.0 / jnp.where(total > 0, total, 1.0)
    return lse, tuple(x * scale[:, None] for x in out)


def members(shape: Shape) -> tuple:
    """(KV head, query of the program [m], query head [m], which of the m rows are real [m]) of this program.

    Rows beyond the real ones are not clamped: in the interpreter a masked store writes the old value back, and must
    not meet another row's store.
    """
    kv_head, group_part = pl.program_id(1) // shape.group_parts, pl.program_id(1) % shape.group_parts
    row = jnp.arange(shape.m)
    query, member = (row // shape.heads, row % shape.heads) if shape.queries > 1 else (jnp.zeros_like(row), row)
    real = (query < shape.queries) & (member < shape.heads)
    member = group_part * shape.heads + member
    return kv_head, query, kv_head * shape.group + member, real & (member < shape.group)


def shape_of(q: jax.Array, kv: KV, chosen: Tiles, queries: int, options: Options) -> Shape:
    _, _, kv_heads, block_size, size = pool_values(kv).shape
    group = q.shape[-2] // kv_heads
    heads = min(group, chosen.rows)
    queries = min(queries, max(chosen.rows // heads, 1))
    return Shape(
        block_size=block_size,
        kv_heads=kv_heads,
        group=group,
        heads=heads,
        queries=queries,
        m=max(16, pl.next_power_of_2(queries * heads)),
        tile_tokens=chosen.tokens,
        pieces=pieces_of(size),
        scale=options.scale,
        window=options.window,
        cap=options.cap,
    )


def inputs_of(q: jax.Array, kv: KV, tables, lengths, starts, sinks) -> Inputs:
    values = pool_values(kv)
    scales = kv.scales.reshape(-1) if isinstance(kv, QuantizedKV) else None
    return Inputs(q, values.reshape(-1, values.shape[-1]), tables, lengths, starts, scales, sinks)
