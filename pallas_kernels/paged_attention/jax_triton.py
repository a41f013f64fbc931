"""Decode attention in Triton itself, called through jax-triton: the announced successor of Pallas's Triton backend.

A program (item of the work list, KV head) walks over tiles of cached tokens with an online softmax; partial results are
merged in XLA. Interpreted and compiled, never run: it must be asked for by name. What rows share is read by each of
them. Needs the package jax-triton, which jpaged's extra `cuda` installs.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Device
from pallas_kernels.paged_attention.merge import merge_items
from pallas_kernels.paged_attention.options import Options
from pallas_kernels.paged_attention.quantized import KV, QuantizedKV, pool_values
from pallas_kernels.paged_attention.shared import SharedPrefixes
from pallas_kernels.paged_attention.splits import most_items, num_items, plan_splits
from pallas_kernels.paged_attention.triton import unsupported as unsupported_in_triton
from pallas_kernels.paged_attention.tuned import tiles_for

FEWEST_TOKENS = 256  # of a split, as in Pallas's Triton backend
MOST_HEADS = 64  # query heads of a program


def unsupported(q: jax.Array, kv: KV, device: Device) -> str | None:
    """Why this kernel cannot take these arguments on this device; None: it can."""
    if importlib.util.find_spec("jax_triton") is None:
        return "needs the package jax-triton (pip install jax-triton)"
    if q.shape[-2] // pool_values(kv).shape[2] > MOST_HEADS:
        return f"takes at most {MOST_HEADS} query heads for one of keys"
    return unsupported_in_triton(q, kv, device)


def paged_decode_attention(
    q: jax.Array,
    kv: KV,
    tables: jax.Array,
    lengths: jax.Array,
    sinks: jax.Array | None,
    shared: SharedPrefixes | None,
    options: Options,
    *,
    interpret: bool = False,
) -> Any:
    """See `api.paged_decode_attention`.

    Raises:
      ImportError: jax-triton cannot be imported, or Triton is to interpret and was imported without TRITON_INTERPRET=1.
    """
    del shared
    # Here, and not above: `unsupported` is for everybody, the kernel for those who have Triton.
    from pallas_kernels.paged_attention.jax_triton_kernel import attend_items

    (rows, heads, size), values = q.shape, pool_values(kv)
    kv_heads, block_size = values.shape[2:4]
    tiles = tiles_for("decode", size, q.dtype.itemsize)
    lengths = lengths.astype(jnp.int32)
    begins = jnp.zeros_like(lengths) if options.window is None else jnp.maximum(lengths - options.window, 0)
    cut: dict[str, Any] = {
        "width_tiles": -(-tables.shape[1] * block_size // tiles.tokens),
        "programs": -(-tiles.programs // kv_heads),
        "fewest": -(-FEWEST_TOKENS // tiles.tokens),
        "fixed": None if options.split_tokens is None else -(-options.split_tokens // tiles.tokens),
    }
    splits = plan_splits(begins, lengths, tile=tiles.tokens, **cut)
    scales = kv.scales if isinstance(kv, QuantizedKV) else None
    sums, high, total = attend_items(
        (q, values, scales, tables, begins, lengths, splits.items),
        (num_items(rows, **cut), kv_heads, heads // kv_heads, size),
        {"block_size": block_size, "scale": options.scale, "cap": options.cap},
        tiles,
        interpret,
    )
    out, lse = merge_items(sums, high, total, splits, most_items(**cut), lengths, sinks)
    return (out.astype(q.dtype), lse) if options.return_lse else out.astype(q.dtype)
