"""interim"""
import jax, jax.numpy as jnp
from pallas_kernels.paged_attention import reference

def pool_shape(num_blocks, block_size, num_kv_heads, head_dim):
    return (num_blocks, block_size, 2, num_kv_heads, head_dim)

def write_kv(kv, k, v, slots):
    n, bs = kv.shape[:2]
    flat = kv.reshape(n * bs, *kv.shape[2:])
    return flat.at[slots].set(jnp.stack([k, v], 1)).reshape(kv.shape)

def paged_decode_attention(q, kv, tables, lengths, **o):
    return reference.paged_attention(q[:, None], kv, tables, lengths - 1, (lengths > 0).astype(jnp.int32), **o)[:, 0]

def paged_prefill_attention(q, kv, tables, starts, lengths, **o):
    return reference.paged_attention(q, kv, tables, starts, lengths, **o)
