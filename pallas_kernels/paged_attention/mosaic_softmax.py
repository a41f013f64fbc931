"""What the Mosaic GPU kernels of decode and prefill share: shapes of tiles, and where an online softmax starts."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.merge import LOWEST

ROWS = 64
"""Of a wgmma."""
TILE_TOKENS = 64


def swizzled(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory as wgmma reads it: rows of at least 128 bytes."""
    transforms: Any = plgpu  # which mypy takes for abstract
    tiling, swizzle = transforms.TilingTransform((8, 128 // dtype.itemsize)), transforms.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype=dtype, transforms=(tiling, swizzle))


def iota(axis: int) -> jax.Array:
    """int32 [ROWS, TILE_TOKENS], laid out as a product's result."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, TILE_TOKENS), axis, layout=plgpu.Layout.WGMMA)


def nothing_seen(size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(output [ROWS, size], maximum [ROWS], sum [ROWS]) of an online softmax before its first tile."""

    def full(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    of_rows = plgpu.Layout.WGMMA.reduce(1)
    return full((ROWS, size), 0.0, plgpu.Layout.WGMMA), full((ROWS,), LOWEST, of_rows), full((ROWS,), 0.0, of_rows)
