"""Paged attention for Hopper in Pallas's Mosaic GPU backend: a TMA for each block, wgmma for both products.

Interpreted and compiled, never run: it must be asked for by name.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Device
from pallas_kernels.paged_attention.mosaic_decode import paged_decode_attention
from pallas_kernels.paged_attention.mosaic_prefill import paged_prefill_attention
from pallas_kernels.paged_attention.mosaic_softmax import ROWS
from pallas_kernels.paged_attention.quantized import KV, QuantizedKV

__all__ = ["paged_decode_attention", "paged_prefill_attention", "unsupported"]


def unsupported(q: jax.Array, kv: KV, device: Device) -> str | None:
    """Why these kernels cannot take these arguments on this device; None: they can."""
    if device.platform != "cuda" or device.capability != 90:
        return "needs an NVIDIA GPU of capability 9.0"
    if isinstance(kv, QuantizedKV) or kv.dtype not in (jnp.bfloat16, jnp.float16) or kv.dtype != q.dtype:
        return "reads pools of bfloat16 or float16, of the queries' dtype"
    _, parts, kv_heads, block_size, size = kv.shape
    if parts == 1:
        return "reads keys and values apart, and this pool holds keys that are values too"
    if size not in (64, 128):
        return f"has no head size {size}: 64 or 128"
    if block_size not in (8, 16, 32, 64):
        return f"has no block size {block_size}: 8, 16, 32 or 64"
    if q.shape[-2] // kv_heads > ROWS:
        return f"takes at most {ROWS} query heads for one of keys"
    return None
