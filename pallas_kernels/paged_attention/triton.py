"""Paged attention for NVIDIA GPUs in Pallas's Triton backend: flash-decoding, and flash attention for tiles of queries.

A program takes the query heads of one KV head together, so that a block is read once for all of them (GQA), and walks
over tiles of cached tokens with the online softmax of `triton_softmax`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Device
from pallas_kernels.paged_attention import triton_softmax as softmax
from pallas_kernels.paged_attention.quantized import KV, QuantizedKV, pool_values
from pallas_kernels.paged_attention.triton_decode import paged_decode_attention
from pallas_kernels.paged_attention.triton_prefill import paged_prefill_attention

__all__ = ["paged_decode_attention", "paged_prefill_attention", "unsupported"]


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
