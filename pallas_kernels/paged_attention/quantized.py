"""KV pools of 8-bit numbers: int8 or float8_e4m3fn values, with one float32 scale a token and KV head.

A scale for each token and head means that writing a token never touches what was written before, so that the bits of a
block depend on its tokens alone: a block found in the prefix cache is the block that would have been computed. Scales
add 4 bytes to the D of a head: 3 % at a head size of 128.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


class QuantizedKV(NamedTuple):
    """A layer's pool whose value at [b, s, h, t, d] is values[b, s, h, t, d] * scales[b, s, h, t]."""

    values: jax.Array  # int8 or float8_e4m3fn [num_blocks, 2, Hkv, block_size, D]
    scales: jax.Array  # float32 [num_blocks, 2, Hkv, block_size]


KV = jax.Array | QuantizedKV
"""A layer's pool."""


def pool_values(kv: KV) -> jax.Array:
    return kv.values if isinstance(kv, QuantizedKV) else kv


def quantize(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """[..., D] -> (values of `dtype` like x, float32 scales [...]). The largest of the D values is met exactly.

    Errors are at most half a step: 1/254 of a vector's largest value with int8; with e4m3 1/16 of each value's own
    size (three bits of mantissa), or 2**-10 of the step scale among the smallest.
    """
    largest = LARGEST[jnp.dtype(dtype).name]
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / largest
    ratio = x / jnp.where(scales > 0, scales, 1.0)[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        ratio = jnp.round(ratio)
    return jnp.clip(ratio, -largest, largest).astype(dtype), scales


def dequantize(kv: QuantizedKV) -> jax.Array:
    """The pool in float32."""
    return kv.values.astype(jnp.float32) * kv.scales[..., None]
