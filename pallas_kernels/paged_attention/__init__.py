"""Attention over a KV cache kept in fixed-size blocks (PagedAttention, arXiv 2309.06180, section 4.1)."""

from pallas_kernels.paged_attention.api import (
    paged_decode_attention,
    paged_prefill_attention,
    pool_shape,
    write_kv,
)
from pallas_kernels.paged_attention.quantized import KV, QuantizedKV, pool_values
from pallas_kernels.paged_attention.shared import SharedPrefixes

__all__ = [
    "KV",
    "QuantizedKV",
    "SharedPrefixes",
    "paged_decode_attention",
    "paged_prefill_attention",
    "pool_shape",
    "pool_values",
    "write_kv",
]
